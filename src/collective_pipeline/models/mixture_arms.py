"""The arms of a comparison with a mixture of experts: itself, its sub-models, and three networks of its size."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, partial

from collective_pipeline.config import (
    Arm,
    Channels,
    ImageCollectiveArchitecture,
    ImageCollectiveConfig,
    MixtureArchitecture,
    MixtureModelType,
    RoutingLossConfig,
    SubModelArchitecture,
    UserError,
)
from collective_pipeline.models.build import count_model_params

ImageNetwork = MixtureArchitecture | SubModelArchitecture | ImageCollectiveArchitecture

# Kernels are fast where widths are multiples of 8. Each attempt is a grid for the first three widths, and one for the
# last, which takes up the rest; the later ones are for sizes that the first does not meet.
GRIDS = ((8, 8), (8, 1), (1, 1))
SCALES = (1 / 16, 16.0)
PARTS = range(90, 111, 2)  # percent of the best factor that are tried for the first three
IRREGULARITY = 0.1  # by this part a width may be off its proportion before the next grid is tried


def mixture_arm(architecture: MixtureArchitecture, *, num_classes: int) -> Arm:
    """The mixture as it is configured."""
    params = _count(architecture, num_classes)
    return _arm("merged_moe", architecture, params, num_classes=num_classes, target_params=params)


def sub_model_arm(mixture: MixtureArchitecture, *, num_classes: int) -> Arm:
    """A network for one group of `num_classes` classes that can be merged into the mixture."""
    architecture = _sub_model(mixture)
    params = _count(architecture, num_classes)
    return _arm("sub_model", architecture, params, num_classes=num_classes, target_params=params)


def single_expert_arm(mixture: Arm, *, tolerance: float) -> Arm:
    """A network as large as this mixture with one expert and no gate, all of its channels scaled alike.

    Raises:
        UserError: If there is none within `tolerance`, a relative error.
    """
    assert isinstance(mixture.architecture, MixtureArchitecture)
    weights = RoutingLossConfig(**dict.fromkeys(RoutingLossConfig.model_fields, 0.0))
    changes = {"n_experts": 1, "losses": weights, "initialise": "fresh"}
    return _match("single_expert", mixture, mixture.architecture.model_copy(update=changes), tolerance)


def dense_arm(mixture: Arm, *, tolerance: float) -> Arm:
    """A sub-model for all classes that is as large as this mixture, all of its channels scaled alike.

    Raises:
        UserError: If there is none within `tolerance`, a relative error.
    """
    assert isinstance(mixture.architecture, MixtureArchitecture)
    return _match("dense", mixture, _sub_model(mixture.architecture), tolerance)


def conv_collective_arm(mixture: Arm, collective: ImageCollectiveConfig, *, tolerance: float) -> Arm:
    """A collective as large as this mixture, the channels of its stem, which its experts keep, scaled alike.

    Raises:
        UserError: If there is none within `tolerance`, a relative error.
    """
    assert isinstance(mixture.architecture, MixtureArchitecture)
    shared = {"image_shape": mixture.architecture.image_shape, "channels": mixture.architecture.channels}
    architecture = ImageCollectiveArchitecture(**collective.model_dump(), **shared)
    return _match("conv_collective", mixture, architecture, tolerance, change="merged_moe.collective, the mixture's")


def _sub_model(mixture: MixtureArchitecture) -> SubModelArchitecture:
    return SubModelArchitecture(
        image_shape=mixture.image_shape, channels=mixture.channels, dropout=mixture.expert_dropout
    )


def _arm(
    model_type: MixtureModelType,
    architecture: ImageNetwork,
    params: int,
    *,
    num_classes: int,
    target_params: int,
) -> Arm:
    return Arm(
        model_type=model_type,
        in_dim=math.prod(architecture.image_shape),
        num_classes=num_classes,
        params=params,
        target_params=target_params,
        architecture=architecture,
    )


def _match(
    model_type: MixtureModelType,
    mixture: Arm,
    architecture: ImageNetwork,
    tolerance: float,
    *,
    change: str = "the mixture's",
) -> Arm:
    target, num_classes = mixture.params, mixture.num_classes

    def with_channels(channels: Channels) -> ImageNetwork:
        return architecture.model_copy(update={"channels": channels})

    @cache
    def count(channels: Channels) -> int:
        return _count(with_channels(channels), num_classes)

    def preference(candidate: tuple[Channels, int, float]) -> tuple[float, float]:
        _, params, irregularity = candidate
        return max(abs(params - target) / target, tolerance), irregularity

    factor = _solve_scale(target, lambda factor: count(_scale(architecture.channels, factor, 1)))
    candidates: list[tuple[Channels, int, float]] = []
    for grids in GRIDS:
        if not any(
            abs(params - target) <= tolerance * target and irregularity <= IRREGULARITY
            for _, params, irregularity in candidates
        ):
            candidates += _candidates(architecture.channels, factor, grids, target, count)
    channels, params, _ = min(candidates, key=preference)
    if abs(params - target) > tolerance * target:
        raise UserError(
            f"no {model_type} network has the {target:,} parameters of the mixture within {100 * tolerance:g} %: the "
            f"nearest has {params:,}; change {change} channels or the tolerance"
        )
    return _arm(model_type, with_channels(channels), params, num_classes=num_classes, target_params=target)


def _candidates(
    configured: Channels, factor: float, grids: tuple[int, int], target: int, count: Callable[[Channels], int]
) -> list[tuple[Channels, int, float]]:
    """Channels near the configured proportions, their parameters, and how far a width is at most from its own."""
    grid, last_grid = grids
    most = 2 * round(factor * configured[-1]) + 2 * last_grid
    candidates = []
    for firsts in {_scale(configured, factor * part / 100, grid)[:3] for part in PARTS}:
        last = _solve_last(target, partial(_count_last, count, firsts), range(last_grid, most, last_grid))
        channels = (*firsts, last)
        ratios = [width / (factor * own) for width, own in zip(channels, configured, strict=True)]
        candidates.append((channels, count(channels), max(abs(ratio - 1) for ratio in ratios)))
    return candidates


def _scale(channels: Channels, factor: float, grid: int) -> Channels:
    first, second, third, last = (max(1, round(width * factor / grid)) * grid for width in channels)
    return first, second, third, last


def _solve_scale(target: int, count: Callable[[float], int]) -> float:
    low, high = SCALES
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return math.sqrt(low * high)


def _count_last(count: Callable[[Channels], int], firsts: tuple[int, int, int], last: int) -> int:
    return count((*firsts, last))


def _solve_last(target: int, count: Callable[[int], int], widths: Sequence[int]) -> int:
    """Of these widths, in ascending order, the one whose count is nearest to the target; a wider one has more."""
    place = bisect_left(widths, target, key=count)
    return min(widths[max(0, place - 1) : place + 1], key=lambda last: abs(count(last) - target))


def _count(architecture: ImageNetwork, num_classes: int) -> int:
    return count_model_params(architecture, in_dim=math.prod(architecture.image_shape), num_classes=num_classes)
