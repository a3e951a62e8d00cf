"""The page of a sweep: the answer over all sizes first, then what it rests on."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from collective_pipeline.config import count_of
from collective_pipeline.evaluation.comparison import COSTS, MATCHED, OVERALL_COLUMNS, RUN_COLUMNS, SIZE_COLUMNS
from collective_pipeline.evaluation.gpu import describe_costs, hints
from collective_pipeline.evaluation.report import (
    ACCURACY,
    COST,
    DIFFERENCE,
    GPU,
    INTERVALS,
    P_VALUES,
    RUNS,
    SPENT,
    TEST_SET,
    Columns,
    Figure,
    Table,
    difference_note,
    gpu_table,
    make_figure,
    make_table,
    number,
    render,
    span,
    spent_per_seed,
    without_empty,
)
from collective_pipeline.evaluation.sweep_figures import (
    plot_accuracy_by_size,
    plot_differences_by_size,
    plot_efficiency,
    plot_importance,
    plot_loss_by_size,
    plot_pareto,
    plot_pruning,
    plot_trials,
)
from collective_pipeline.evaluation.verdict import unmatched_sizes

SIZE: Columns = {"Size": lambda row: f"{row.target_params / 1e6:.2f} M"}
IMPROVEMENT: Columns = {
    "Probability of improvement": lambda arm: number(".2f", arm.probability_of_improvement),
}
OVERALL: Columns = {
    "Arm": lambda arm: arm.model_type,
    "Seeds": lambda arm: str(arm.num_seeds),
    "Mean test accuracy (%)": lambda arm: number(".2f", arm.test_accuracy_mean),
    "Interval (%)": lambda arm: span(".2f", arm.test_accuracy_ci_low, arm.test_accuracy_ci_high),
    **DIFFERENCE,
    **IMPROVEMENT,
}
FRONTS: Columns = {
    f"On the front of {name}": lambda arm, cost=cost: "yes" if getattr(arm, f"on_front_{cost}") else ""  # type: ignore[misc]
    for name, cost in zip(("parameters", "multiply-adds", "latency", "training time"), COSTS, strict=True)
}
TRIALS: Columns = {
    "Arm": lambda trial: trial.model_type,
    "Trial": lambda trial: str(trial.unit),
    "State": lambda trial: trial.state,
    "Parameters": lambda trial: number(",.0f", trial.params),
    "Validation accuracy (%)": lambda trial: number(".2f", trial.val_accuracy),
    "Epochs": lambda trial: number(".0f", trial.epochs),
    "Values": lambda trial: trial.values,
}
IMPORTANCE: Columns = {
    "Arm": lambda row: row.model_type,
    "Hyperparameter": lambda row: row.parameter,
    "Share of the variance": lambda row: number(".3f", row.importance),
}


def write_sweep_report(
    *,
    title: str,
    answer: str,
    runs: pd.DataFrame,
    comparison: pd.DataFrame,
    overall: pd.DataFrame,
    trials: pd.DataFrame,
    importance: pd.DataFrame,
    facts: Mapping[str, Mapping[str, str]],
    reference: str = "collective",
) -> str:
    """The page as HTML.

    Args:
        title: What was run.
        answer: In a sentence or two.
        runs: A row per arm, size and seed that was tested.
        comparison: A row per arm and size, as `compare_sizes` returns it.
        overall: A row per arm, as `compare_overall` returns it.
        trials: A row per trial of a search; empty after a grid.
        importance: A row per arm and hyperparameter; empty after a grid.
        facts: Section, name and value of everything needed to run it again.
        reference: The arm that the others are compared to.
    """
    compared = bool(overall["p_value_holm"].notna().any())
    searched = not trials.empty
    # A grid has dozens of arms and sizes: their tables are folded up, and what holds over all sizes comes first.
    overall_table = make_table("Over all sizes", OVERALL, overall, OVERALL_COLUMNS, "overall.csv")
    by_size = _tables(comparison, compared, searched)
    return render(
        title=title,
        answer=answer,
        key_figures=_key_figures(runs, comparison, trials, reference),
        heading="Comparison",
        tables=by_size if searched or not compared else [overall_table],
        costs=describe_costs(runs),
        gpu=gpu_table({**_first("Arm", GPU), **SIZE, **_rest("Arm", GPU)}, comparison, SIZE_COLUMNS),
        hints=hints(comparison),
        notes=_notes(comparison, reference, compared, searched),
        figures=list(_figures(comparison, trials, importance, reference, compared)),
        details=[*([] if searched or not compared else by_size), *_details(runs, trials, importance)],
        facts=facts,
        highlighted=reference if compared else "",
    )


def _key_figures(
    runs: pd.DataFrame, comparison: pd.DataFrame, trials: pd.DataFrame, reference: str
) -> dict[str, tuple[str, str]]:
    best = comparison.sort_values("test_accuracy_mean", ascending=False, kind="stable")
    figures = {}
    for name, arms in (("Best of all", best), (f"Best {reference}", best[best["model_type"] == reference])):
        for arm in arms.head(1).itertuples():
            note = f"{arm.model_type}, {arm.params:,} parameters"
            figures[f"{name}, test accuracy"] = f"{arm.test_accuracy_mean:.2f} %", note
    num_sizes, num_seeds = comparison["target_params"].nunique(), runs["seed"].nunique()
    figures["Trainings tested"] = f"{len(runs):,}", f"{count_of(num_sizes, 'size')}, {count_of(num_seeds, 'seed')}"
    if not trials.empty:
        planned = trials["max_epochs"].sum()
        saved = (trials["max_epochs"] - trials["epochs"])[trials["state"] == "pruned"].sum()
        figures["Epochs saved by pruning"] = (
            f"{100 * saved / planned:.0f} %",
            f"of {planned:,} in {count_of(len(trials), 'trial')}",
        )
    return figures


def _tables(comparison: pd.DataFrame, compared: bool, searched: bool) -> list[Table]:
    columns = {**_first("Arm", ACCURACY), **SIZE, **_rest("Arm", ACCURACY)}
    if compared:
        columns |= {**DIFFERENCE, **IMPROVEMENT}
    caption = "The best of the search, trained anew" if searched else "Accuracy and differences at each size"
    cost = {**_first("Arm", COST), **SIZE, **_rest("Arm", COST), **spent_per_seed(comparison), **FRONTS}
    return [
        make_table(caption, columns, comparison, SIZE_COLUMNS, "comparison.csv"),
        make_table("Efficiency and cost", cost, comparison, SIZE_COLUMNS, "comparison.csv"),
    ]


def _first(name: str, columns: Columns) -> Columns:
    return {name: columns[name]}


def _rest(name: str, columns: Columns) -> Columns:
    return {other: show for other, show in columns.items() if other != name}


def _notes(comparison: pd.DataFrame, reference: str, compared: bool, searched: bool) -> list[str]:
    notes = [INTERVALS]
    if compared:
        notes += [difference_note(reference), P_VALUES]
        notes.append(
            f"The probability of improvement is how often a training of the arm ends above one of the {reference}: "
            "0.5 where they are alike."
        )
    if compared and not searched:
        notes.append(
            "Over all sizes the accuracy of a seed is its mean over sizes, so that what its trainings have in common "
            "is counted once. At each size the correction is for all arms and sizes: few seeds cannot reach "
            "significance there. Training time depends on what trained beside it."
        )
    if searched and len(comparison) > 1:
        notes.append(f"{unmatched_sizes(comparison)} A difference between arms may be one of size.")
    if searched:
        notes.append(
            "The search saw validation images only, with seeds of its own; its best were trained anew with fresh "
            "seeds, and only those read the test images. Each model type had the same number of trials."
        )
    return [*notes, TEST_SET]


def _figures(
    comparison: pd.DataFrame, trials: pd.DataFrame, importance: pd.DataFrame, reference: str, compared: bool
) -> Iterable[Figure]:
    by_size = comparison[list(SIZE_COLUMNS)], "comparison.csv"
    yield make_figure(
        plot_accuracy_by_size(comparison, reference=reference),
        "Means over seeds, with bands from bound to bound of their intervals. Lines join the sizes that were run; "
        "nothing is extrapolated.",
        *by_size,
    )
    if compared:
        yield make_figure(
            plot_differences_by_size(comparison, reference=reference),
            f"Arm minus {reference}, seed by seed, with intervals that are not corrected for comparing many.",
            *by_size,
        )
    yield make_figure(plot_loss_by_size(comparison, reference=reference), "The same of the test loss.", *by_size)
    yield make_figure(
        plot_efficiency(comparison, reference=reference),
        "A point for each size. Accuracy falls slower than size, so that the smallest network leads in this ratio "
        "whatever it is: it says what size buys, not which arm is better.",
        *by_size,
    )
    yield make_figure(
        plot_pareto(comparison, reference=reference),
        "Every point is an arm of a size. On the grey line lies what no other beats in accuracy and in cost. "
        f"Parameters and multiply-adds that differ by less than {100 * (MATCHED - 1):.1f} % count as equal: arms of "
        "one size are matched no better.",
        *by_size,
    )
    if not trials.empty:
        yield make_figure(
            plot_trials(trials),
            "Hollow points were pruned, at the accuracy that they had by then.",
            trials,
            "trials.csv",
        )
        yield make_figure(
            plot_pruning(trials),
            "Every model type had the same number of trials and the same pruner.",
            trials,
            "trials.csv",
        )
    if not importance.empty:
        yield make_figure(
            plot_importance(importance),
            "The share of the variance of the validation accuracy that a random forest over the finished trials "
            "explains by each (fANOVA, Hutter et al. 2014). Blank: not searched for this arm, or too few trials.",
            importance,
            "importance.csv",
        )


def _details(runs: pd.DataFrame, trials: pd.DataFrame, importance: pd.DataFrame) -> Iterable[Table]:
    by_run: dict[str, Any] = {**_first("Arm", RUNS), **SIZE, **_rest("Arm", RUNS), **without_empty(SPENT, runs)}
    yield make_table("Every training that was tested", by_run, runs, RUN_COLUMNS, "runs.csv")
    if not trials.empty:
        yield make_table("Every trial of the search", TRIALS, trials, trials.columns, "trials.csv")
    if not importance.empty:
        yield make_table("Importance", IMPORTANCE, importance, importance.columns, "importance.csv")
