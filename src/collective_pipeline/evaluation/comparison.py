"""Is one arm better than the others, by how much, and how sure is that?

The unit of observation is the seed: every arm is trained with the same seeds, so arms are compared in pairs. All
intervals and tests therefore speak about training again with other seeds, not about other test images.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from collective_pipeline.config import BASELINES, ComparisonConfig
from collective_pipeline.evaluation.gpu import GPU_COLUMNS

RUN_COLUMNS = (
    "model_type",
    "seed",
    "params",
    "target_params",
    "param_error_pct",
    "macs",
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
)
COMPARISON_COLUMNS = (
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
    "latency_ms",
    "train_seconds",
    "difference_to_reference",
    "difference_ci_low",
    "difference_ci_high",
    "p_value_holm",
    "num_diverged",
    *GPU_COLUMNS,
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
    accuracy = _accuracy_by_seed(results)
    arms = results.groupby("model_type", sort=False)
    params = arms["params"].first()
    mean = accuracy.mean().round(DECIMALS)
    low, high = _intervals(accuracy, config)

    has_reference = reference in accuracy
    differences = accuracy.sub(accuracy[reference] if has_reference else np.nan, axis=0).round(DECIMALS)
    difference_low, difference_high = _intervals(differences, config)
    if has_reference:
        difference_low[reference] = difference_high[reference] = 0.0
    others = [arm for arm in accuracy if arm != reference] if has_reference else []
    tested = [arm for arm in others if differences[arm].notna().any()]
    p_values = holm([_sign_flip_p_value(differences[arm].dropna().to_numpy()) for arm in tested])

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
            "latency_ms": arms["latency_ms"].mean(),
            "train_seconds": arms["train_seconds"].mean(),
            "difference_to_reference": differences.mean().round(DECIMALS),
            "difference_ci_low": difference_low,
            "difference_ci_high": difference_high,
            "p_value_holm": pd.Series(p_values, index=tested, dtype=float),
            "num_diverged": arms["diverged"].sum().astype(int),
            **arms[list(GPU_COLUMNS)].mean(),
        },
        index=accuracy.columns,
    )
    return table.rename_axis("model_type").reset_index()[list(COMPARISON_COLUMNS)]


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


def seeds_needed(num_comparisons: int, alpha: float) -> int:
    """The fewest seeds with which the corrected sign-flip test can reach `alpha` at all.

    With n seeds the smallest two-sided p value is 2 / 2^n, and Holm multiplies it by `num_comparisons`.
    """
    return next(n for n in itertools.count(1) if 2 / 2**n * num_comparisons <= alpha)


def answer(comparison: pd.DataFrame, config: ComparisonConfig, *, reference: str = "collective") -> str:
    """Whether `reference` is better than the other arms, in one sentence for someone who knows no statistics."""
    arms = comparison.set_index("model_type")
    verdict = _answer(arms, config, reference)
    diverged = [f"{number} of {name}'s" for name, number in arms["num_diverged"].items() if number]
    if not diverged:
        return verdict
    return f"{verdict} The loss of {_join(diverged)} seeds diverged: their last good weights count, if there are any."


def _answer(arms: pd.DataFrame, config: ComparisonConfig, reference: str) -> str:
    failed = arms.index[arms["num_seeds"] == 0].tolist()
    arms = arms.drop(index=failed)
    if reference in failed or arms.empty:
        return f"There is no result: {_join(failed)} diverged with every seed."
    if failed:
        return f"{_answer(arms, config, reference)} There is no result of {_join(failed)}."
    if len(arms) == 1:
        return f"{_describe(arms.iloc[0], config)}."
    best = arms.drop(index=reference, errors="ignore").sort_values("test_accuracy_mean", kind="stable").iloc[-1]
    if reference not in arms.index:
        return f"There is no {reference} to compare the {len(arms)} arms to; observed best, {_describe(best, config)}."

    others = arms.drop(index=reference)
    alpha = 1 - config.confidence
    num_seeds, needed = int(arms["num_seeds"].min()), seeds_needed(len(others), alpha)
    group = f"{_group(others.index.tolist())} at {_param_range(arms)}"
    if num_seeds >= needed:
        verdict = _verdict(others, alpha, num_seeds, group, reference)
    else:
        verdict = (
            f"With {_seeds(num_seeds)} it cannot be told whether the {reference} is better than {group}: at least "
            f"{needed} seeds are needed; what was observed is no verdict yet:"
        )
    return f"{verdict} {_observe(arms.loc[[reference]].iloc[0], best, len(others), config)}."


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
    bounds = stats.bootstrap(
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
    test = stats.permutation_test(
        (differences,),
        _rounded_mean,
        permutation_type="samples",
        n_resamples=MAX_SIGN_PATTERNS,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _rounded_mean(values: Floats, axis: int = -1) -> Floats:
    return np.asarray(values.mean(axis=axis)).round(DECIMALS)


def _verdict(others: pd.DataFrame, alpha: float, num_seeds: int, group: str, reference: str) -> str:
    sure = others["p_value_holm"] <= alpha
    worse, better = ((sure & (sign * others["difference_to_reference"] > 0)) for sign in (1, -1))
    by_chance = f"by more than chance between {num_seeds} seeds explains"
    each = group if len(others) == 1 else f"each of {group}"
    if better.all():
        return f"Yes: the {reference} is better than {each}, {by_chance};"
    if worse.all():
        return f"No: the {reference} is worse than {each}, {by_chance};"
    if not sure.any():
        return (
            f"With {num_seeds} seeds no difference was found between the {reference} and {each}, "
            "which does not show that they are equal;"
        )
    findings = [
        f"{word} than {_join(others.index[which].tolist())}"
        for word, which in (("better", better), ("worse", worse))
        if which.any()
    ]
    verdict = f"Of {group}, the {reference} is {' but '.join(findings)}, {by_chance}"
    if sure.all():
        return f"{verdict};"
    unclear = _join(others.index[~sure].tolist())
    return f"{verdict}, and no difference was found to {unclear}, which does not show that they are equal;"


def _observe(own: pd.Series, best: pd.Series, num_others: int, config: ComparisonConfig) -> str:
    """The reference's accuracy beside that of the best other arm, seen from the reference."""
    lead = -best["difference_to_reference"]
    if f"{abs(lead):.2f}" == "0.00":
        relation = "equals, to two decimals,"
    else:
        relation = f"is {abs(lead):.2f} percentage points {'above' if lead > 0 else 'below'}"
    if np.isnan(best["difference_ci_low"]):
        interval = "one seed gives no interval"
    else:
        interval = (
            f"{_percent(config)} interval of this one difference {-best['difference_ci_high']:+z.2f} "
            f"to {-best['difference_ci_low']:+z.2f}"
        )
    return (
        f"its test accuracy of {own['test_accuracy_mean']:.2f} % {relation} the {best['test_accuracy_mean']:.2f} % "
        f"of {best.name}{', the best of the others' if num_others > 1 else ''} ({interval})"
    )


def _describe(arm: pd.Series, config: ComparisonConfig) -> str:
    if arm["num_seeds"] == 1:
        how = " with one seed, which gives no interval"
    else:
        low, high = arm["test_accuracy_ci_low"], arm["test_accuracy_ci_high"]
        how = f", mean of {_seeds(arm['num_seeds'])}, {_percent(config)} interval {low:.2f} to {high:.2f}"
    reached = f"{arm['test_accuracy_mean']:.2f} % test accuracy"
    return f"{arm.name} with {arm['params']:,.0f} parameters reaches {reached}{how}"


def _group(names: Sequence[str]) -> str:
    noun = "single network" if set(names) <= set(BASELINES) else "other arm"
    return f"the {noun} {names[0]}" if len(names) == 1 else f"the {len(names)} {noun}s"


def _join(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _param_range(arms: pd.DataFrame) -> str:
    fewest, most = arms["params"].min(), arms["params"].max()
    return f"{most:,} parameters" if fewest == most else f"{fewest:,} to {most:,} parameters"


def _seeds(count: float) -> str:
    return "1 seed" if count == 1 else f"{count:.0f} seeds"


def _percent(config: ComparisonConfig) -> str:
    return f"{100 * config.confidence:g} %"
