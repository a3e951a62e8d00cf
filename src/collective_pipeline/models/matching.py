"""Networks as large as a parameter budget.

Single networks: widths in closed form, numbers of layers searched; nothing is built, since their parameters are a sum
over neighbouring widths. Collectives: all members scaled alike, and the head's hidden layer takes up the rest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from collective_pipeline.config import (
    BASELINES,
    Arm,
    BaselineConfig,
    BaselineName,
    CollectiveConfig,
    MlpArchitecture,
    ModelType,
    UserError,
)
from collective_pipeline.models.build import count_model_params

# Matrix kernels are fast only where all widths are multiples of 8. Each attempt is a grid for all layers but one, and
# one for the layer that is solved to meet the budget; the later ones are for budgets too small for the first.
GRID = 8
GRIDS = ((GRID, GRID), (GRID, 1), (1, 1))
# How far the members of a collective may be from the configured ones, and then its head from theirs.
SCALES = (1 / 32, 32.0)
HEAD_SCALES = {GRID: (0.5, 2.0), 1: (0.25, 4.0)}
# A layer may be off its regular width by this part before the network rather has more layers, so that their number
# does not jump from one budget to the next for the sake of a few features.
IRREGULARITY = 0.25
# Beyond this the layer would be a bottleneck of its own, and the network no longer of its type.
LARGEST_IRREGULARITY = 0.5


class OutOfReach(UserError):
    """No network of a type has the size that is asked for.

    Attributes:
        what: Which, and the nearest that there is.
        advice: What to change where the size is the configuration's own; who asks for another one says so instead.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what, advice)
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


class Family(NamedTuple):
    """What makes a network shallow, deep, ...: how many layers, how wide each is, and whether they are skipped."""

    num_layers: range
    halving: bool = False
    residual: bool = False

    def regular_dims(self, width: float, num_layers: int) -> list[float]:
        """Hidden widths: all `width`, or each half of the one before."""
        return [width / 2**layer if self.halving else width for layer in range(num_layers)]


FAMILIES: dict[BaselineName, Family] = {
    "shallow": Family(range(2, 4)),
    "balanced": Family(range(4, 6), halving=True),
    "deep": Family(range(8, 11)),
    "very_deep": Family(range(12, 16)),
    "deep_resnet": Family(range(8, 11), residual=True),
    "very_deep_resnet": Family(range(12, 16), residual=True),
}


class _Candidate(NamedTuple):
    hidden_dims: tuple[int, ...]
    params: int
    irregularity: float


def count_params(hidden_dims: Sequence[float], *, in_dim: int, num_classes: int, residual: bool = False) -> float:
    """Trainable parameters of a single network with these hidden widths.

    A layer from i to o features has a Linear (i o + o) and a BatchNorm (2 o); a residual one also a skip Linear
    (i o + o) where i and o differ; the last Linear has (i K + K).
    """
    total = (hidden_dims[-1] + 1) * num_classes
    for i, o in pairwise((in_dim, *hidden_dims)):
        linear = i * o + o
        total += linear + 2 * o + (linear if residual and i != o else 0)
    return total


def match_baseline(
    model_type: BaselineName, target_params: int, config: BaselineConfig, *, in_dim: int, num_classes: int
) -> Arm:
    """The network of this type whose parameters come closest to what a regular shape allows.

    Preferred are widths that are all multiples of 8; then the fewest layers of the type's range for which the layers
    that take up the remainder are about as wide as they would regularly be.

    Raises:
        OutOfReach: If no network of this type is within `config.tolerance`; it names the nearest.
    """
    family = FAMILIES[model_type]

    def count(dims: Sequence[float]) -> float:
        return count_params(dims, in_dim=in_dim, num_classes=num_classes, residual=family.residual)

    def error(candidate: _Candidate) -> float:
        return abs(candidate.params - target_params) / target_params

    candidates: list[_Candidate] = []
    fitting: list[_Candidate] = []
    for grids in GRIDS:
        if not fitting:
            candidates += [
                _Candidate(dims, int(count(dims)), irregularity)
                for num_layers in family.num_layers
                for dims, irregularity in _shapes(family, num_layers, grids, target_params, count)
            ]
            fitting = [candidate for candidate in candidates if error(candidate) <= config.tolerance]
    if not fitting:
        nearest = min(candidates, key=error)
        raise OutOfReach(
            f"no {model_type} network has {target_params:,} parameters within {100 * config.tolerance:g} %: the "
            f"nearest has {nearest.params:,} (hidden widths {', '.join(map(str, nearest.hidden_dims))})",
            "change baselines.target_params or baselines.tolerance",
        )

    def preference(candidate: _Candidate) -> tuple[float, int, float, float]:
        irregularity = candidate.irregularity
        return max(irregularity, IRREGULARITY), len(candidate.hidden_dims), round(irregularity, 1), error(candidate)

    best = min(fitting, key=preference)
    return Arm(
        model_type=model_type,
        in_dim=in_dim,
        num_classes=num_classes,
        params=best.params,
        target_params=target_params,
        architecture=MlpArchitecture(hidden_dims=best.hidden_dims, residual=family.residual, dropout=config.dropout),
    )


def match_collective(
    target_params: int, config: CollectiveConfig, *, tolerance: float, in_dim: int, num_classes: int
) -> Arm:
    """The collective of this many parameters whose proportions are nearest to those of `config`.

    All widths of experts and analysts are scaled by one factor; what their steps leave over goes to the hidden layer
    of the head, whose width relative to its input (`collective_hidden_scale`) stays as near as it can.

    Raises:
        OutOfReach: If no such collective is within `tolerance`; it names the nearest.
    """

    def count(candidate: CollectiveConfig) -> int:
        return count_collective(candidate, in_dim=in_dim, num_classes=num_classes)

    candidates: list[tuple[CollectiveConfig, int]] = []
    members: set[CollectiveConfig] = set()
    for grid in (GRID, 1):  # the finer one for budgets too small for the coarse
        if not any(abs(params - target_params) <= tolerance * target_params for _, params in candidates):
            factor = _solve_scale(target_params, partial(_count_scaled, config, grid, count))
            members = {_scale(config, factor * part / 100, grid) for part in range(85, 116)}
            candidates += [
                (candidate, count(candidate))
                for scaled in members
                for head_grid in {grid, 1}
                for candidate in _solve_head(scaled, target_params, head_grid, count)
            ]

    def preference(candidate: tuple[CollectiveConfig, int]) -> tuple[float, float]:
        error = abs(candidate[1] - target_params) / target_params
        changed = abs(math.log(candidate[0].collective_hidden_scale / config.collective_hidden_scale))
        return max(error, tolerance), changed

    # Where the head cannot take up the rest, the members alone are as near as it gets.
    candidates = candidates or [(scaled, count(scaled)) for scaled in members]
    best, params = min(candidates, key=preference)
    if abs(params - target_params) > tolerance * target_params:
        raise OutOfReach(
            f"no collective of these proportions has {target_params:,} parameters within {100 * tolerance:g} %: the "
            f"nearest has {params:,}",
            "change the size, collective.* or baselines.tolerance",
        )
    return Arm(
        model_type="collective",
        in_dim=in_dim,
        num_classes=num_classes,
        params=params,
        target_params=target_params,
        architecture=best,
    )


def match_size(
    model_type: ModelType,
    target_params: int,
    collective: CollectiveConfig,
    baselines: BaselineConfig,
    *,
    in_dim: int,
    num_classes: int,
) -> Arm:
    """The arm of this type and size; a collective keeps the proportions of `collective`.

    Raises:
        OutOfReach: If there is none within `baselines.tolerance`.
    """
    if model_type == "collective":
        return match_collective(
            target_params, collective, tolerance=baselines.tolerance, in_dim=in_dim, num_classes=num_classes
        )
    return match_baseline(model_type, target_params, baselines, in_dim=in_dim, num_classes=num_classes)


def match_arm(
    model_type: ModelType, collective: CollectiveConfig, baselines: BaselineConfig, *, in_dim: int, num_classes: int
) -> Arm:
    """The arm of this type: the collective as configured, or a single network of its size (or `target_params`)."""
    if model_type == "collective":
        own_params = count_collective(collective, in_dim=in_dim, num_classes=num_classes)
        return Arm(
            model_type=model_type,
            in_dim=in_dim,
            num_classes=num_classes,
            params=own_params,
            target_params=own_params,
            architecture=collective,
        )
    target_params = parameter_budget(collective, baselines, in_dim=in_dim, num_classes=num_classes)
    return match_baseline(model_type, target_params, baselines, in_dim=in_dim, num_classes=num_classes)


def match_baselines(
    collective: CollectiveConfig, baselines: BaselineConfig | None = None, *, in_dim: int = 784, num_classes: int = 10
) -> dict[BaselineName, Arm]:
    """All six single networks of the collective's size (or of `baselines.target_params`)."""
    config = baselines or BaselineConfig()
    target_params = parameter_budget(collective, config, in_dim=in_dim, num_classes=num_classes)
    return {
        name: match_baseline(name, target_params, config, in_dim=in_dim, num_classes=num_classes) for name in BASELINES
    }


def parameter_budget(collective: CollectiveConfig, baselines: BaselineConfig, *, in_dim: int, num_classes: int) -> int:
    """Trainable parameters that the single networks are to have: `target_params`, or as many as the collective."""
    return baselines.target_params or count_collective(collective, in_dim=in_dim, num_classes=num_classes)


def count_collective(collective: CollectiveConfig, *, in_dim: int, num_classes: int) -> int:
    """Trainable parameters of the collective."""
    return count_model_params(collective, in_dim=in_dim, num_classes=num_classes)


def _scale(config: CollectiveConfig, factor: float, grid: int) -> CollectiveConfig:
    """All widths of the members times `factor`, in steps that keep the encoder's width a multiple of 8 as well."""

    def scaled(width: int, grid: int = grid) -> int:
        return max(1, round(width * factor / grid)) * grid

    return config.model_copy(
        update={
            "expert_hidden": tuple(map(scaled, config.expert_hidden)),
            "expert_output": scaled(config.expert_output, 2 * grid),
            "analyst_hidden": tuple(map(scaled, config.analyst_hidden)),
            "analyst_output": scaled(config.analyst_output),
        }
    )


def _count_scaled(config: CollectiveConfig, grid: int, count: Callable[[CollectiveConfig], int], factor: float) -> int:
    return count(_scale(config, factor, grid))


def _solve_scale(target: int, count: Callable[[float], int]) -> float:
    """The factor at which a count that grows with it meets the target, or the end of the range nearest to that."""
    low, high = SCALES
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return math.sqrt(low * high)


def _solve_head(
    config: CollectiveConfig, target: int, grid: int, count: Callable[[CollectiveConfig], int]
) -> list[CollectiveConfig]:
    """The same members with the widths of the head's hidden layer next to where the budget is met."""
    width = config.head_input_dim

    def with_hidden(hidden: int) -> CollectiveConfig:
        # The width is truncated: half a feature keeps clear of what division rounds.
        return config.model_copy(update={"collective_hidden_scale": round((hidden + 0.5) / width, 6)})

    # Below twice the classes the head's hidden layer does not become smaller.
    low, high = 4 * width, 5 * width
    per_feature = (count(with_hidden(high)) - count(with_hidden(low))) / (high - low)
    solved = low + (target - count(with_hidden(low))) / per_feature
    smallest, largest = (config.collective_hidden_scale * width * scale for scale in HEAD_SCALES[grid])
    hidden = (step * grid for step in _near(solved / grid, steps=1))
    return [with_hidden(dim) for dim in hidden if smallest <= dim <= largest]


def _shapes(
    family: Family, num_layers: int, grids: tuple[int, int], target: int, count: Callable[[Sequence[float]], float]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Hidden widths near the budget, each with how far its most irregular layer is from its regular width."""
    grid, solved_grid = grids
    width = _solve_width(family, num_layers, target, count)
    # The widths that leave room for the skip of an irregular last layer are some steps below the regular one.
    for step in _near(width / grid, steps=8 if family.residual else 3):
        regular = [max(1, round(dim / grid)) * grid for dim in family.regular_dims(step * grid, num_layers)]
        yield tuple(regular), 0.0
        # The first layer has the coarsest steps, the solved one takes up the rest. A residual network would pay for
        # another skip and keeps its first layer. Of layers of one width the last has the finest steps.
        firsts = range(step, step + 1) if family.residual else _near(step, steps=3)
        for layer in range(1 if family.halving else num_layers - 1, num_layers):
            for first in firsts:
                dims = (first * grid, *regular[1:])
                for solved in _solve_layer(dims, layer, solved_grid, target, count):
                    irregularity = max(abs(first / step - 1), abs(solved / regular[layer] - 1))
                    if irregularity <= LARGEST_IRREGULARITY:
                        yield (*dims[:layer], solved, *dims[layer + 1 :]), irregularity


def _solve_width(family: Family, num_layers: int, target: int, count: Callable[[Sequence[float]], float]) -> float:
    """The real width at which a regular network has `target` parameters (the count is quadratic in it)."""

    def regular(width: float) -> float:
        return count(family.regular_dims(width, num_layers))

    # Three values of a quadratic give its coefficients; non-integers keep clear of widths that meet the input's.
    constant, one, two = regular(0.0), regular(0.5), regular(1.5)
    square = (two - 3 * one + 2 * constant) / 1.5
    linear = (one - constant - 0.25 * square) / 0.5
    root = linear**2 + 4 * square * max(target - constant, 0)
    return (math.sqrt(root) - linear) / (2 * square)


def _solve_layer(
    dims: Sequence[int], layer: int, grid: int, target: int, count: Callable[[Sequence[float]], float]
) -> list[int]:
    """The widths of one layer next to where the budget is met, all others fixed (the count is linear in it)."""

    def with_width(width: float) -> float:
        return count([*dims[:layer], width, *dims[layer + 1 :]])

    low, high = with_width(0.25), with_width(1.25)
    return [step * grid for step in _near((0.25 + (target - low) / (high - low)) / grid, steps=1)]


def _near(value: float, *, steps: int) -> range:
    """The whole numbers, at least 1, from `steps` below `value` to `steps` above it."""
    return range(max(1, math.ceil(value) - steps), max(1, math.floor(value) + steps) + 1)
