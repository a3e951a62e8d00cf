"""Is one arm better than the others, by how much, and how sure is that?

The unit of observation is the seed: every arm is trained with the same seeds, so arms are compared in pairs. All
intervals and tests therefore speak about training again with other seeds, not about other test images.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy  # imports `stats` where it is used: every command would wait for it

from collective_pipeline.config import ComparisonConfig
from collective_pipeline.evaluation.gpu import COST_COLUMNS, GPU_COLUMNS

RUN_COLUMNS = (
    "model_type",
    "seed",
    "params",
    "target_params",
    "param_error_pct",
    "macs",
    "executed_macs",
    "epochs",
    "best_epoch",
    "val_accuracy",
    "test_accuracy",
    "test_loss",
    "train_seconds",
    "samples_per_second",
    "diverged",
    "joules",
    "images_per_joule",
    *COST_COLUMNS,
)
_ARM_COLUMNS = (
    "model_type",
    "num_seeds",
    "params",
    "param_error_pct",
    "test_accuracy_mean",
    "test_accuracy_ci_low",
    "test_accuracy_ci_high",
    "param_efficiency",
    "accuracy_per_million_params",
    "accuracy_per_log10_params",
    "macs",
    "executed_macs",
    "latency_ms",
    "train_seconds",
    "difference_to_reference",
    "difference_ci_low",
    "difference_ci_high",
    "p_value_holm",
    "num_diverged",
    "probability_of_improvement",
    *GPU_COLUMNS,
)
COMPARISON_COLUMNS = (*_ARM_COLUMNS, *COST_COLUMNS)
# What an arm costs, and the factor below which two costs count as equal. Two arms of one size miss it by up to 0.1 %
# each (`baselines.tolerance`): what differs by less than both together is how well they were matched, no saving.
MATCHED = 1.001 / 0.999
COSTS = {"params": MATCHED, "macs": MATCHED, "latency_ms": 1.0, "train_seconds": 1.0}
SIZE_COLUMNS = (
    "target_params",
    *_ARM_COLUMNS,
    "test_loss_mean",
    "test_loss_ci_low",
    "test_loss_ci_high",
    *(f"on_front_{cost}" for cost in COSTS),
    *COST_COLUMNS,
)
OVERALL_COLUMNS = (
    "model_type",
    "num_seeds",
    "test_accuracy_mean",
    "test_accuracy_ci_low",
    "test_accuracy_ci_high",
    "difference_to_reference",
    "difference_ci_low",
    "difference_ci_high",
    "p_value_holm",
    "num_diverged",
    "probability_of_improvement",
)

Floats = npt.NDArray[np.float64]

# Accuracies are counts of images: what differs after nine decimals is binary noise, and would turn ties into ranks.
DECIMALS = 9
# All sign patterns of up to 16 seeds; more seeds than that draw this many patterns at random.
MAX_SIGN_PATTERNS = 2**16


def compare_arms(results: pd.DataFrame, config: ComparisonConfig, *, reference: str = "collective") -> pd.DataFrame:
    """One row per arm, in order of first appearance: accuracy, efficiency, cost and difference to `reference`.

    Differences are arm minus reference, so that a negative one says that the reference is better. Their p values
    come from a sign-flip test (exact up to 16 seeds), two-sided, Holm-corrected over all arms but the reference.
    A seed that diverged counts with its last good weights; without any it has no accuracy and is left out of the
    means of its arm and of the pairs with it.

    Args:
        results: `RUN_COLUMNS`, `GPU_COLUMNS` and `latency_ms`, a row per arm and seed.
        config: How sure the intervals are to be.
        reference: The arm that the others are compared to; without it the columns of the difference are NaN.

    Raises:
        ValueError: If an arm has a seed twice, or lacks one that another arm has.
    """
    table = _compare(results, config, reference)
    return table.assign(p_value_holm=_holm_column(table["p_value"]))[list(COMPARISON_COLUMNS)]


def compare_sizes(results: pd.DataFrame, config: ComparisonConfig, *, reference: str = "collective") -> pd.DataFrame:
    """`compare_arms` at every size, the smallest first; Holm corrects over all arms and sizes.

    Args:
        results: As for `compare_arms`, a row per size, arm and seed; `target_params` is the size.
        config: How sure the intervals are to be.
        reference: The arm that the others are compared to at each size.

    Returns:
        `SIZE_COLUMNS`. Whether an arm of a size is on the Pareto front of accuracy and a cost is judged by the means,
        over all arms and sizes.
    """
    sizes = []
    for size, at_size in results.groupby("target_params", sort=True):
        table = _compare(at_size, config, reference)
        losses = at_size.pivot(index="seed", columns="model_type", values="test_loss")[table["model_type"].tolist()]
        low, high = _intervals(losses, config)
        loss = {"test_loss_mean": losses.mean(), "test_loss_ci_low": low, "test_loss_ci_high": high}
        sizes.append(table.assign(target_params=size, **{name: column.to_numpy() for name, column in loss.items()}))
    table = pd.concat(sizes, ignore_index=True)
    accuracy = table["test_accuracy_mean"]
    fronts = {f"on_front_{cost}": pareto_front(accuracy, table[cost], equal) for cost, equal in COSTS.items()}
    return table.assign(p_value_holm=_holm_column(table["p_value"]), **fronts)[list(SIZE_COLUMNS)]


def compare_overall(results: pd.DataFrame, config: ComparisonConfig, *, reference: str = "collective") -> pd.DataFrame:
    """One row per arm over all sizes: the mean over sizes of its difference to `reference`, paired by seed.

    The seed is the unit here as well: what one seed has in common at several sizes (the order of the images, the
    augmentation) would otherwise be counted several times.

    Args:
        results: As for `compare_sizes`. A seed without an accuracy at some size is left out of the pairs of its arm.
        config: How sure the intervals are to be.
        reference: The arm that the others are compared to.

    Returns:
        `OVERALL_COLUMNS`, in order of first appearance; the probability of improvement is its mean over sizes.
    """
    cells = results.pivot(index=["target_params", "seed"], columns="model_type", values="test_accuracy")
    cells = cells[results["model_type"].unique().tolist()]
    num_sizes = results["target_params"].nunique()
    by_seed = cells.groupby(level="seed")
    means = by_seed.mean().where(by_seed.count() == num_sizes).round(DECIMALS)
    table = _differences(means, config, reference)
    low, high = _intervals(means, config)
    table["test_accuracy_mean"] = means.mean().round(DECIMALS)
    table["test_accuracy_ci_low"], table["test_accuracy_ci_high"] = low, high
    table["num_seeds"] = means.count()
    table["num_diverged"] = results.groupby("model_type")["diverged"].sum().astype(int)
    if reference in cells:
        for arm in cells.columns.drop(reference):
            at_sizes = [at_size for _, at_size in cells.groupby(level="target_params")]
            chances = [probability_of_improvement(at_size[arm], at_size[reference]) for at_size in at_sizes]
            table.loc[arm, "probability_of_improvement"] = pd.Series(chances).mean()
    table = table.rename_axis("model_type").reset_index()
    return table.assign(p_value_holm=_holm_column(table["p_value"]))[list(OVERALL_COLUMNS)]


def pareto_front(accuracy: pd.Series, cost: pd.Series, equal: float = 1.0) -> pd.Series:
    """Whether nothing else is at least as accurate at no more cost, and better in one of the two.

    Costs that differ by at most the factor `equal` count as equal.
    """
    front = []
    for own_accuracy, own_cost in zip(accuracy, cost, strict=True):
        no_worse = (accuracy >= own_accuracy) & (cost <= own_cost * equal)
        better = (accuracy > own_accuracy) | (cost * equal < own_cost)
        front.append(math.isfinite(own_accuracy) and math.isfinite(own_cost) and not (no_worse & better).any())
    return pd.Series(front, index=accuracy.index, dtype=bool)


def _compare(results: pd.DataFrame, config: ComparisonConfig, reference: str) -> pd.DataFrame:
    """The comparison without the corrected p values, with those that are to be corrected."""
    accuracy = _accuracy_by_seed(results)
    arms = results.groupby("model_type", sort=False)
    params = arms["params"].first()
    mean = accuracy.mean().round(DECIMALS)
    low, high = _intervals(accuracy, config)

    table = pd.DataFrame(
        {
            "num_seeds": accuracy.count(),
            "params": params,
            "param_error_pct": arms["param_error_pct"].first(),
            "test_accuracy_mean": mean,
            "test_accuracy_ci_low": low,
            "test_accuracy_ci_high": high,
            **efficiency(mean, params),
            "macs": arms["macs"].first(),
            "executed_macs": arms["executed_macs"].mean(),
            "latency_ms": arms["latency_ms"].mean(),
            "train_seconds": arms["train_seconds"].mean(),
            "num_diverged": arms["diverged"].sum().astype(int),
            **arms[[*GPU_COLUMNS, *COST_COLUMNS]].mean(),
        },
        index=accuracy.columns,
    )
    table = table.join(_differences(accuracy, config, reference))
    return table.rename_axis("model_type").reset_index()


def _differences(accuracy: pd.DataFrame, config: ComparisonConfig, reference: str) -> pd.DataFrame:
    """Every arm minus `reference`, a row per arm, from a column per arm and a row per pair."""
    has_reference = reference in accuracy
    differences = accuracy.sub(accuracy[reference] if has_reference else np.nan, axis=0).round(DECIMALS)
    low, high = _intervals(differences, config)
    if has_reference:
        low[reference] = high[reference] = 0.0
    others = [arm for arm in accuracy if arm != reference] if has_reference else []
    tested = [arm for arm in others if differences[arm].notna().any()]
    p_values = [_sign_flip_p_value(differences[arm].dropna().to_numpy()) for arm in tested]
    improvement = [probability_of_improvement(accuracy[arm], accuracy[reference]) for arm in tested]
    return pd.DataFrame(
        {
            "difference_to_reference": differences.mean().round(DECIMALS),
            "difference_ci_low": low,
            "difference_ci_high": high,
            "p_value": pd.Series(p_values, index=tested, dtype=float),
            "probability_of_improvement": pd.Series(improvement, index=tested, dtype=float),
        },
        index=accuracy.columns,
    )


def probability_of_improvement(arm: pd.Series, reference: pd.Series) -> float:
    """How probable it is that a training of `arm` ends with a higher accuracy than one of `reference`.

    Over all pairs of seeds, ties as one half (Agarwal et al. 2021, from Mann and Whitney's U).
    """
    own, other = arm.dropna().to_numpy(), reference.dropna().to_numpy()
    if not len(own) or not len(other):
        return math.nan
    return float(scipy.stats.mannwhitneyu(own, other).statistic / (len(own) * len(other)))


def _holm_column(p_values: pd.Series) -> pd.Series:
    tested = p_values.dropna()
    return pd.Series(holm(tested.tolist()), index=tested.index, dtype=float).reindex(p_values.index)


def efficiency(accuracy: Any, params: Any) -> dict[str, Any]:
    """Accuracy per 100 thousand and per million parameters, and per log10(P + 1); of numbers or of columns."""
    return {
        "param_efficiency": accuracy / params * 1e5,
        "accuracy_per_million_params": accuracy / params * 1e6,
        "accuracy_per_log10_params": accuracy / np.log10(params + 1),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: i-th smallest of m times (m - i), never below a smaller one's, at most 1."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    scaled = (p_values[i] * (len(p_values) - rank) for rank, i in enumerate(order))
    adjusted = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [min(1.0, adjusted[i]) for i in range(len(p_values))]


def _accuracy_by_seed(results: pd.DataFrame) -> pd.DataFrame:
    """Test accuracies, a row per seed and a column per arm, in the arms' order of appearance."""
    twice = results.duplicated(["model_type", "seed"])
    if twice.any():
        first = results[twice].iloc[0]
        raise ValueError(f"{first['model_type']} has seed {first['seed']} twice: give one row per arm and seed")
    wide = results.pivot(index="seed", columns="model_type", values="test_accuracy")
    present = results.pivot(index="seed", columns="model_type", values="params").notna()
    for arm, column in present.items():
        if not column.all():
            missing = ", ".join(str(seed) for seed in present.index[~column])
            raise ValueError(f"{arm} has no row for seed {missing}: arms are compared seed by seed")
    return wide[results["model_type"].unique().tolist()].round(DECIMALS)


def _intervals(values: pd.DataFrame, config: ComparisonConfig) -> tuple[pd.Series, pd.Series]:
    """Lower and upper bounds of the means of all columns."""
    bounds = {name: _interval(column.dropna().to_numpy(), config) for name, column in values.items()}
    low, high = ({name: pair[side] for name, pair in bounds.items()} for side in (0, 1))
    return pd.Series(low), pd.Series(high)


def _interval(values: Floats, config: ComparisonConfig) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan
    bounds = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=config.resamples,
        confidence_level=config.confidence,
        # BCa corrects by how much single values move the mean: identical values leave it nothing to correct with.
        method="BCa" if np.ptp(values) > 0 else "percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return round(float(bounds.low), DECIMALS), round(float(bounds.high), DECIMALS)


def _sign_flip_p_value(differences: Floats) -> float:
    """How often a mean this far from 0 arises when every seed's difference may as well have the other sign."""
    if len(differences) == 1:
        return 1.0  # both signs are equally far from 0; SciPy refuses samples of one
    test = scipy.stats.permutation_test(
        (differences,),
        _rounded_mean,
        permutation_type="samples",
        n_resamples=MAX_SIGN_PATTERNS,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _rounded_mean(values: Floats, axis: int = -1) -> Floats:
    return np.asarray(values.mean(axis=axis)).round(DECIMALS)
