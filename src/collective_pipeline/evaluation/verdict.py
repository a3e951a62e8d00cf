"""What a comparison says, in sentences for someone who knows no statistics."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from collective_pipeline.config import BASELINES, ComparisonConfig, count_of


def answer(comparison: pd.DataFrame, config: ComparisonConfig, *, reference: str = "collective") -> str:
    """Whether `reference` is better than the other arms, in one sentence for someone who knows no statistics."""
    arms = comparison.set_index("model_type")
    return f"{_answer(arms, config, reference)}{_diverged(arms)}"


def answer_worth(comparison: pd.DataFrame, config: ComparisonConfig, *, reference: str) -> str:
    """What each arm's one change to `reference` is worth: the best with its interval, and which help, hurt, or neither.

    The sentences are for someone who knows no statistics, as those of `answer`.
    """
    arms = comparison.set_index("model_type")
    failed = arms.index[arms["num_seeds"] == 0].tolist()
    changed = arms.drop(index=[reference, *failed], errors="ignore")
    if reference not in arms.index or reference in failed or changed.empty:
        return answer(comparison, config, reference=reference)
    changed = changed.sort_values("difference_to_reference", ascending=False, kind="stable")
    best = changed.iloc[0]
    low, high = best["difference_ci_low"], best["difference_ci_high"]
    interval = (
        "one seed gives no interval"
        if np.isnan(low)
        else f"{_percent(config)} interval of this one difference {low:+z.2f} to {high:+z.2f}"
    )
    own, num_seeds = arms.loc[[reference]].iloc[0], int(arms.drop(index=failed)["num_seeds"].min())
    told = (
        f"Of {count_of(len(changed), 'change')} to the {reference} network, {best.name} is worth the most: "
        f"{best['difference_to_reference']:+z.2f} percentage points on {own['test_accuracy_mean']:.2f} % test accuracy "
        f"({interval}). {_sort_out(changed, config, num_seeds)}"
    )
    nothing = f" There is no result of {_join(failed)}." if failed else ""
    return f"{told}{nothing}{_diverged(arms)}"


def _sort_out(changed: pd.DataFrame, config: ComparisonConfig, num_seeds: int) -> str:
    """Which changes help and which hurt, as far as the tests allow to say it."""
    gains, alpha = changed["difference_to_reference"], 1 - config.confidence
    needed = seeds_needed(len(changed), alpha)
    ways = {"help": gains > 0, "hurt": gains < 0, "change nothing": gains == 0}
    if num_seeds < needed:
        observed = _list({f"seem to {way}": changed.index[which].tolist() for way, which in ways.items()})
        return (
            f"With {count_of(num_seeds, 'seed')} it cannot be told what is more than chance, which takes at least "
            f"{needed}: {observed}."
        )
    sure = changed["p_value_holm"] <= alpha
    found = _list({way: changed.index[which & sure].tolist() for way, which in ways.items()})
    unclear = changed.index[~sure].tolist()
    left = f"for {_join(unclear)} no difference was found, which does not show that they are worth nothing"
    if not found:
        return f"With {num_seeds} seeds, {left}."
    sentence = f"By more than chance between {num_seeds} seeds explains, {found}"
    return f"{sentence}; {left}." if unclear else f"{sentence}."


def _list(who_does: Mapping[str, Sequence[str]]) -> str:
    """Names with the verb of each group, without groups that are empty."""

    def inflect(verb: str, count: int) -> str:
        first, _, others = verb.partition(" ")
        return f"{first}s {others}".rstrip() if count == 1 else verb

    return "; ".join(f"{_join(names)} {inflect(verb, len(names))}" for verb, names in who_does.items() if names)


def _diverged(arms: pd.DataFrame) -> str:
    """A sentence about losses that were no longer finite, with the space before it; nothing if there are none."""
    diverged = [f"{number} of {name}'s" for name, number in arms["num_diverged"].items() if number]
    if not diverged:
        return ""
    return f" The loss of {_join(diverged)} seeds diverged: their last good weights count, if there are any."


def answer_search(comparison: pd.DataFrame, config: ComparisonConfig, *, reference: str = "collective") -> str:
    """Whether `reference` is better than the other arms, each of the size that its search found best."""
    told = answer(comparison, config, reference=reference)
    return told if len(comparison) == 1 else f"{told} {unmatched_sizes(comparison)}"


def unmatched_sizes(comparison: pd.DataFrame) -> str:
    """How far the arms of a search are from one size."""
    ratio = comparison["params"].max() / comparison["params"].min()
    return (
        "The arms are not matched in size: each has the size that its search found best, and these differ by up to "
        f"{ratio:.{1 if ratio >= 1.1 else 3}f} times."
    )


def answer_sizes(
    overall: pd.DataFrame,
    comparison: pd.DataFrame,
    config: ComparisonConfig,
    *,
    near: int,
    reference: str = "collective",
) -> str:
    """Whether `reference` is better than the other arms over all sizes, and by how much at the size nearest to `near`.

    Args:
        overall: As `compare_overall` returns it.
        comparison: As `compare_sizes` returns it.
        config: How sure it is to be.
        near: A number of parameters.
        reference: The arm that the others are compared to.
    """
    sizes = sorted(comparison["target_params"].unique())
    if len(sizes) == 1 or reference not in set(overall["model_type"]) or len(overall) == 1:
        return " ".join(answer(part, config, reference=reference) for _, part in comparison.groupby("target_params"))
    arms = overall.set_index("model_type")
    failed = arms.index[arms["num_seeds"] == 0].tolist()
    others = arms.drop(index=[reference, *failed], errors="ignore")
    if reference in failed or others.empty:
        return f"There is no result over all sizes: {_join(failed)} diverged with every seed at one of them."
    group = (
        f"{_group(others.index.tolist())} over {len(sizes)} sizes from {sizes[0] / 1e6:.2f} to {_millions(sizes[-1])}"
    )
    num_seeds = int(arms.drop(index=failed)["num_seeds"].min())
    verdict = _verdict(others, config, num_seeds, group, reference, observed="over all sizes")
    best = others.sort_values("difference_to_reference", kind="stable").iloc[-1]
    told = [f"{verdict} {_observe(arms.loc[[reference]].iloc[0], best, len(others), config)}"]
    size = min(sizes, key=lambda size: abs(size - near))
    at_size = comparison[(comparison["target_params"] == size) & (comparison["num_seeds"] > 0)].set_index("model_type")
    if reference in at_size.index and len(at_size) > 1:
        near_best = at_size.drop(index=reference).sort_values("test_accuracy_mean", kind="stable").iloc[-1]
        seen = _observe(at_size.loc[[reference]].iloc[0], near_best, len(at_size) - 1, config)
        told.append(f"; at {_millions(size)} {seen}")
    told.append(".")
    if failed:
        told.append(f" There is no result of {_join(failed)} at one of the sizes.")
    diverged = [f"{number} of {name}'s" for name, number in arms["num_diverged"].items() if number]
    if diverged:
        told.append(f" The loss of {_join(diverged)} trainings diverged: their last good weights count.")
    return "".join(told)


def seeds_needed(num_comparisons: int, alpha: float) -> int:
    """The fewest seeds with which the corrected sign-flip test can reach `alpha` at all.

    With n seeds the smallest two-sided p value is 2 / 2^n, and Holm multiplies it by `num_comparisons`.
    """
    return next(n for n in itertools.count(1) if 2 / 2**n * num_comparisons <= alpha)


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
    group = f"{_group(others.index.tolist())} at {_param_range(arms)}"
    verdict = _verdict(others, config, int(arms["num_seeds"].min()), group, reference)
    return f"{verdict} {_observe(arms.loc[[reference]].iloc[0], best, len(others), config)}."


def _verdict(
    others: pd.DataFrame, config: ComparisonConfig, num_seeds: int, group: str, reference: str, *, observed: str = ""
) -> str:
    """What the tests allow to say; `observed` tells of what the figures are that follow where they allow nothing."""
    alpha = 1 - config.confidence
    needed = seeds_needed(len(others), alpha)
    if num_seeds < needed:
        return (
            f"With {count_of(num_seeds, 'seed')} it cannot be told whether the {reference} is better than {group}: at "
            f"least {needed} seeds are needed; what was observed is no verdict yet: {observed}".rstrip()
        )
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
        how = (
            f", mean of {count_of(int(arm['num_seeds']), 'seed')}, {_percent(config)} interval {low:.2f} to {high:.2f}"
        )
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


def _percent(config: ComparisonConfig) -> str:
    return f"{100 * config.confidence:g} %"


def _millions(params: float) -> str:
    return f"{params / 1e6:.2f} million parameters"
