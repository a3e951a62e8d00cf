"""The report: one page that says the answer first, then shows what it rests on, and opens without a network."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly  # type: ignore[import-untyped,unused-ignore]  # imports `offline` where it is used
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation.comparison import COMPARISON_COLUMNS, RUN_COLUMNS
from collective_pipeline.evaluation.experts import SEED_COLUMNS, UNIT_COLUMNS, ExpertAnalysis
from collective_pipeline.evaluation.figures import (
    curve_points,
    is_settled,
    plot_accuracy,
    plot_accuracy_against_macs,
    plot_accuracy_against_params,
    plot_differences,
    plot_experts,
    plot_samples,
    plot_training_curves,
    size_changes,
)
from collective_pipeline.evaluation.gpu import GPU_COLUMNS, amount, describe_costs, hints
from collective_pipeline.evaluation.latency import SKIPPING_COLUMNS

Columns = Mapping[str, Callable[[Any], str]]


@dataclass(frozen=True)
class Table:
    """What the page shows of a table: readable headers, one of them per cell, and the file behind it."""

    caption: str
    headers: list[str]
    rows: list[list[str]]
    file_name: str
    csv: str


@dataclass(frozen=True)
class Figure:
    """A figure whose title and description the page sets as text, so that they wrap and are read aloud."""

    title: str
    description: str
    json: Markup
    file_name: str
    csv: str


def write_report(
    *,
    title: str,
    answer: str,
    results: pd.DataFrame,
    comparison: pd.DataFrame,
    history: pd.DataFrame,
    facts: Mapping[str, Mapping[str, str]],
    top5: Mapping[str, float],
    reference: str = "collective",
    experts: ExpertAnalysis | None = None,
    images: Images | None = None,
    skipping: pd.DataFrame | None = None,
) -> str:
    """The page as HTML: answer, key figures, tables, figures, every run, and how it was run.

    Args:
        title: What was run.
        answer: One sentence.
        results: A row per arm and seed.
        comparison: A row per arm, as `compare_arms` returns it.
        history: A row per arm, seed and epoch.
        facts: Section, name and value of everything needed to run it again.
        top5: Every arm's top-5 accuracy in percent; empty where it says nothing.
        reference: The arm that the others are compared to.
        experts: What its experts, members or gated layers do, if there are any.
        images: Those that `experts` was made with.
        skipping: `latency.SKIPPING_COLUMNS`, if gates can be skipped.
    """
    runs = {**RUNS, **without_empty(SPENT, results)}
    details = [make_table("Every run, one row per arm and seed", runs, results, RUN_COLUMNS, "runs.csv")]
    figures = list(_figures(results, comparison, history, reference, compared=_is_compared(comparison)))
    if experts is not None and images is not None and not experts.units.empty:
        details += _expert_tables(experts)
        figures += _expert_figures(experts, images)
    compared = _is_compared(comparison)
    tables = _comparison_tables(comparison, reference, compared, top5)
    notes = [INTERVALS, *([difference_note(reference), P_VALUES] if compared else []), TEST_SET]
    if skipping is not None and not skipping.empty:
        tables.append(
            make_table("Shut gates skipped, on this device", SKIPPING, skipping, SKIPPING_COLUMNS, "skipping.csv")
        )
        notes.append(SKIPPED)
    return render(
        title=title,
        answer=answer,
        key_figures=_key_figures(comparison, reference) if compared else _key_figures_of_best(comparison, top5),
        heading="Comparison" if compared else "Result",
        tables=tables,
        costs=describe_costs(results),
        gpu=gpu_table(GPU, comparison, COMPARISON_COLUMNS),
        hints=hints(comparison),
        notes=notes,
        figures=figures,
        details=details,
        facts=facts,
        highlighted=reference if compared else "",
    )


def _has_shut_gates(comparison: pd.DataFrame) -> bool:
    return bool((comparison["executed_macs"] < comparison["macs"]).any())


def _is_compared(comparison: pd.DataFrame) -> bool:
    return bool(comparison["p_value_holm"].notna().any())


INTERVALS = (
    "The interval is where the mean would plausibly lie if the training were repeated with other seeds. From few "
    "seeds it is too narrow: one that is meant to hold the true mean 95 times in 100 does so about 73 times from three "
    "seeds, 90 times from ten."
)
P_VALUES = (
    "p says how often chance alone would make a difference at least as large if the two were equally good, corrected "
    "(Holm) for comparing several arms; the verdict above rests on p, not on the intervals."
)
SKIPPED = (
    "The three networks answer in turns, each time other test images; medians of 30 rounds, first seed. Where skipping "
    "takes longer than the network without gates, this device does not reward it."
)
TEST_SET = (
    "The test set was read once, with the checkpoint that validation chose. The intervals are over seeds; they do not "
    "include that other test images would give somewhat other numbers."
)


def difference_note(reference: str) -> str:
    """What a paired difference is."""
    return (
        f"The paired difference is the arm minus the {reference}, averaged over equal seeds, in percentage points: a "
        f"negative one means that the {reference} was better."
    )


def render(
    *,
    title: str,
    answer: str,
    key_figures: Mapping[str, tuple[str, str]],
    heading: str,
    tables: Sequence[Table],
    costs: str,
    gpu: Table | None,
    hints: Sequence[str],
    notes: Sequence[str],
    figures: Sequence[Figure],
    details: Sequence[Table],
    facts: Mapping[str, Mapping[str, str]],
    highlighted: str = "",
) -> str:
    """The page as HTML, with everything that it shows inside.

    Args:
        title: What was run.
        answer: One sentence or two.
        key_figures: Name to value and note.
        heading: Of the tables.
        tables: What the answer rests on.
        costs: What it cost, in a sentence, if that is known.
        gpu: What the card did, if there was one.
        hints: What could be better there.
        notes: How to read them.
        figures: In their order.
        details: Tables that are folded up.
        facts: Section, name and value of everything needed to run it again.
        highlighted: The first cell of the rows that stand out.
    """
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=title,
        answer=answer,
        key_figures=key_figures,
        heading=heading,
        tables=tables,
        costs=costs,
        gpu=gpu,
        hints=hints,
        notes=notes,
        figures=figures,
        details=details,
        facts=facts,
        highlighted=highlighted,
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
    )


def number(spec: str, value: float) -> str:
    """Formatted, or nothing for NaN."""
    return "" if pd.isna(value) else format(value, spec)


def span(spec: str, low: float, high: float) -> str:
    """From bound to bound, or nothing for NaN."""
    return "" if pd.isna(low) else f"{low:{spec}} to {high:{spec}}"


def off_target(arm: Any) -> str:
    """By how many percent an arm misses its number of parameters, or nothing where it has it or was not given one."""
    return number("+.3f", arm.param_error_pct) if round(arm.param_error_pct, 3) else ""


def p_value(value: float) -> str:
    """To three decimals."""
    return "< 0.001" if value < 0.001 else number(".3f", value)


def _if_compared(arm: Any, text: str) -> str:
    """The reference is not compared with itself: its p value is empty, and so is what stands beside it."""
    return number("", math.nan) if math.isnan(arm.p_value_holm) else text


ACCURACY: Columns = {
    "Arm": lambda arm: arm.model_type,
    "Seeds": lambda arm: f"{arm.num_seeds}, {arm.num_diverged} diverged" if arm.num_diverged else f"{arm.num_seeds}",
    "Parameters": lambda arm: f"{arm.params:,}",
    "Test accuracy (%)": lambda arm: number(".2f", arm.test_accuracy_mean),
    "Interval (%)": lambda arm: span(".2f", arm.test_accuracy_ci_low, arm.test_accuracy_ci_high),
}
DIFFERENCE: Columns = {
    "Paired difference (points)": lambda arm: _if_compared(arm, number("+z.2f", arm.difference_to_reference)),
    "Interval (points)": lambda arm: _if_compared(arm, span("+z.2f", arm.difference_ci_low, arm.difference_ci_high)),
    "p, corrected": lambda arm: p_value(arm.p_value_holm),
}
EXECUTED = "of them executed"
COST: Columns = {
    "Arm": lambda arm: arm.model_type,
    "Parameters off target (%)": off_target,
    "Accuracy per 100,000 parameters": lambda arm: number(".2f", arm.param_efficiency),
    "Accuracy per million parameters": lambda arm: number(".1f", arm.accuracy_per_million_params),
    "Accuracy per log10 of parameters": lambda arm: number(".3f", arm.accuracy_per_log10_params),
    "Multiply-adds per image": lambda arm: f"{arm.macs:,.0f}",
    EXECUTED: lambda arm: number(",.0f", arm.executed_macs),
    "Latency (ms)": lambda arm: number(".3g", arm.latency_ms),
    "Training time per seed (s)": lambda arm: number(",.1f", arm.train_seconds),
}
# Only where they are known.
SPENT: Columns = {
    "GPU-hours": lambda row: amount(row.gpu_hours),
    "Energy (kWh)": lambda row: amount(row.energy_kwh),
    "Cost": lambda row: amount(row.cost),
}
GPU: Columns = {
    "Arm": lambda arm: arm.model_type,
    "Utilisation, mean (%)": lambda arm: number(".0f", arm.gpu_utilization_mean),
    "Utilisation, peak (%)": lambda arm: number(".0f", arm.gpu_utilization_peak),
    "Memory, mean (MB)": lambda arm: number(",.0f", arm.gpu_memory_mb_mean),
    "Memory, peak (MB)": lambda arm: number(",.0f", arm.gpu_memory_mb_peak),
    "Power, mean (W)": lambda arm: number(",.0f", arm.gpu_power_watts_mean),
    "Power, peak (W)": lambda arm: number(",.0f", arm.gpu_power_watts_peak),
    "Temperature, mean (°C)": lambda arm: number(".0f", arm.gpu_temperature_celsius_mean),
    "Temperature, peak (°C)": lambda arm: number(".0f", arm.gpu_temperature_celsius_peak),
    "Energy per seed (J)": lambda arm: number(",.0f", arm.joules),
    "Images per joule": lambda arm: number(",.0f", arm.images_per_joule),
}
RUNS: Columns = {
    "Arm": lambda run: run.model_type,
    "Seed": lambda run: str(run.seed),
    "Parameters": lambda run: f"{run.params:,}",
    "Epochs": lambda run: f"{run.epochs}, diverged" if run.diverged else f"{run.epochs}",
    "Best epoch": lambda run: str(run.best_epoch or ""),
    "Validation accuracy (%)": lambda run: number(".2f", run.val_accuracy),
    "Test accuracy (%)": lambda run: number(".2f", run.test_accuracy),
    "Test loss": lambda run: number(".4f", run.test_loss),
    "Training time (s)": lambda run: number(",.1f", run.train_seconds),
    "Images per second": lambda run: number(",.0f", run.samples_per_second),
}


UNITS: Columns = {
    "Unit": lambda unit: unit.unit,
    "Arm": lambda unit: unit.model_type,
    "Seed": lambda unit: str(unit.seed),
    "Gates": lambda unit: f"{unit.num_gates:,}" if unit.num_gates else "",
    "Open (%)": lambda unit: number(".1f", unit.gate_pct),
    "Information about the class (bits)": lambda unit: number(".3f", unit.information_bits),
    "Accuracy alone (%)": lambda unit: number(".2f", unit.accuracy),
    "Lost without it (points)": lambda unit: number("+z.2f", unit.accuracy_lost_without),
    "Classes of its sub-model": lambda unit: "" if pd.isna(unit.sub_model_classes) else unit.sub_model_classes,
}
UNITS_BY_SEED: Columns = {
    "Arm": lambda run: run.model_type,
    "Seed": lambda run: str(run.seed),
    "Entropy of use (bits)": lambda run: number(".3f", run.usage_entropy_bits),
    "Accuracy (%)": lambda run: number(".2f", run.accuracy),
    "At least one right alone (%)": lambda run: number(".2f", run.oracle_accuracy),
}


SKIPPING: Columns = {
    "Images at once": lambda row: f"{row.batch_size:,}",
    "Multiply-adds of an image (% of the network without gates)": lambda row: number(".1f", row.executed_pct),
    "Without gates (ms)": lambda row: number(".3g", row.without_gates_ms),
    "With gates (ms)": lambda row: number(".3g", row.with_gates_ms),
    "Shut gates skipped (ms)": lambda row: number(".3g", row.skipping_ms),
}


def make_table(caption: str, columns: Columns, data: pd.DataFrame, csv_columns: Iterable[str], file_name: str) -> Table:
    """What `columns` make of each row, and of the same rows these columns as a file."""
    return Table(
        caption=caption,
        headers=list(columns),
        rows=[[render(row) for render in columns.values()] for row in data.itertuples()],
        file_name=file_name,
        csv=data[list(csv_columns)].to_csv(index=False),
    )


def without_empty(columns: Columns, data: pd.DataFrame) -> Columns:
    """Those that say something of any row."""
    rows = list(data.itertuples())
    return {name: tell for name, tell in columns.items() if any(tell(row) for row in rows)}


def spent_per_seed(comparison: pd.DataFrame) -> Columns:
    """What is known of GPU-hours, energy and money of an arm, which are means over its seeds."""
    return {f"{name} per seed": tell for name, tell in without_empty(SPENT, comparison).items()}


def gpu_table(columns: Columns, comparison: pd.DataFrame, csv_columns: Iterable[str]) -> Table | None:
    """What the card did while each arm trained, or None if nothing was read of any."""
    if comparison[list(GPU_COLUMNS)].isna().all(axis=None):
        return None
    return make_table("GPU while each arm trained", columns, comparison, csv_columns, "comparison.csv")


def _comparison_tables(
    comparison: pd.DataFrame, reference: str, compared: bool, top5: Mapping[str, float]
) -> list[Table]:
    columns = {**ACCURACY, **(DIFFERENCE if compared else {})}
    if top5:
        columns["Top-5 accuracy (%)"] = lambda arm: number(".2f", top5[arm.model_type])
    caption = f"Accuracy, and difference to the {reference}" if compared else "Accuracy"
    # Without gates a second column of the same numbers would only make people look for a difference.
    cost = {name: tell for name, tell in COST.items() if name != EXECUTED or _has_shut_gates(comparison)}
    cost |= spent_per_seed(comparison)
    return [
        make_table(caption, columns, comparison, COMPARISON_COLUMNS, "comparison.csv"),
        make_table(
            "Parameter efficiency and cost",
            without_empty(cost, comparison),
            comparison,
            COMPARISON_COLUMNS,
            "comparison.csv",
        ),
    ]


def _key_figures(comparison: pd.DataFrame, reference: str) -> dict[str, tuple[str, str]]:
    """Name to value and note: the reference beside the best of the others."""
    arms = comparison.sort_values("test_accuracy_mean", ascending=False, kind="stable")
    own = next(arms[arms["model_type"] == reference].itertuples())
    best: Any = next(arms[arms["model_type"] != reference].itertuples())
    lead = span("+z.2f", -best.difference_ci_high, -best.difference_ci_low)
    return {
        f"Test accuracy, {reference}": _accuracy(own),
        f"Best of the others, {best.model_type}": _accuracy(best),
        f"{reference} minus {best.model_type}": (
            f"{-best.difference_to_reference:+z.2f} points",
            f"interval {lead}" if lead else "one seed, no interval",
        ),
        f"Parameters, {reference}": _size(own),
    }


def _key_figures_of_best(comparison: pd.DataFrame, top5: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    best: Any = next(comparison.sort_values("test_accuracy_mean", ascending=False, kind="stable").itertuples())
    return {
        f"Test accuracy, {best.model_type}": _accuracy(best),
        **(
            {"Top-5 accuracy": (f"{top5[best.model_type]:.2f} %", "the class is among the five likeliest")}
            if top5
            else {}
        ),
        "Parameters": _size(best),
        "Accuracy per 100,000 parameters": (f"{best.param_efficiency:.2f}", "percent / parameters x 100,000"),
        "Training time per seed": (f"{best.train_seconds:,.1f} s", f"{best.macs:,.0f} multiply-adds per image"),
    }


def _accuracy(arm: Any) -> tuple[str, str]:
    interval = span(".2f", arm.test_accuracy_ci_low, arm.test_accuracy_ci_high)
    return f"{arm.test_accuracy_mean:.2f} %", f"interval {interval}" if interval else "one seed, no interval"


def _size(arm: Any) -> tuple[str, str]:
    missed = off_target(arm)
    return f"{arm.params:,}", f"{missed} % off the target" if missed else ""


def _figures(
    results: pd.DataFrame, comparison: pd.DataFrame, history: pd.DataFrame, reference: str, compared: bool
) -> Iterable[Figure]:
    if len(comparison) > 1:
        yield from _figures_side_by_side(results, comparison, reference, compared)
    yield make_figure(
        plot_training_curves(history),
        "Lines are means over seeds, bands reach from the lowest to the highest seed."
        + ("" if is_settled(history).all() else " The axis of accuracy leaves out the first leaps of the training.")
        + (" Dotted lines are where the size of training images changes." if size_changes(history) else ""),
        curve_points(history),
        "training_curves.csv",
    )


def _figures_side_by_side(
    results: pd.DataFrame, comparison: pd.DataFrame, reference: str, compared: bool
) -> Iterable[Figure]:
    """What says something of two arms or more; of one, all of it is in the key figures."""
    yield make_figure(
        plot_accuracy(comparison, reference=reference),
        "Points are means over seeds, bars their intervals.",
        comparison[list(COMPARISON_COLUMNS)],
        "comparison.csv",
    )
    if compared:
        yield make_figure(
            plot_differences(comparison, reference=reference),
            f"Arm minus {reference}, seed by seed. The dotted line is no difference; the intervals are not corrected "
            "for comparing several arms, the p values in the table are.",
            comparison[list(COMPARISON_COLUMNS)],
            "comparison.csv",
        )
    yield make_figure(
        plot_accuracy_against_params(results, comparison, reference=reference),
        "Faint points are single seeds, full ones means with their intervals. The horizontal axis shows a narrow "
        "range where the arms were matched in size.",
        results[list(RUN_COLUMNS)],
        "runs.csv",
    )
    if _has_shut_gates(comparison):
        yield make_figure(
            plot_accuracy_against_macs(results, comparison, reference=reference),
            "What is left of an image's multiply-adds where gates are shut, counted on the test images. Whether "
            "hardware rewards it is another matter: see the latency.",
            results[list(RUN_COLUMNS)],
            "runs.csv",
        )


def _expert_tables(experts: ExpertAnalysis) -> Iterable[Table]:
    yield make_table(
        "Experts, members and gated layers, one row per seed and unit",
        without_empty(UNITS, experts.units),
        experts.units,
        UNIT_COLUMNS,
        "expert_analysis.csv",
    )
    # Layers choose nothing, and have an accuracy only together: it stands in the table of runs.
    if experts.seeds["oracle_accuracy"].notna().any():
        yield make_table(
            "Experts and members together, one row per seed",
            without_empty(UNITS_BY_SEED, experts.seeds),
            experts.seeds,
            SEED_COLUMNS,
            "expert_analysis_by_seed.csv",
        )


def _expert_figures(experts: ExpertAnalysis, images: Images) -> Iterable[Figure]:
    yield make_figure(
        plot_experts(experts.classes),
        "On the test images of each class, how far a unit opens (percent of a layer's gates, or an expert's mean "
        "weight) and how often it is right alone (an expert with all the weight, or a linear probe of a member's "
        "features). One seed is shown; the file has all.",
        experts.classes,
        "expert_analysis_by_class.csv",
    )
    yield make_figure(
        plot_samples(experts.samples, images),
        "Random test images of different classes, what the network says of them, and below each its units: blue bars "
        "say how far a unit opens, green ones how sure a unit without a gate is. The class in a bar is what the unit "
        "says alone.",
        experts.samples,
        "sample_predictions.csv",
    )


def make_figure(figure: go.Figure, description: str, data: pd.DataFrame, file_name: str) -> Figure:
    """A figure with the table behind it."""
    title = figure.layout.title.text
    # Titles of panels, of at most two lines, stand above the topmost.
    figure.update_layout(title=None, margin_t=52 if figure.layout.annotations else 16)
    # Inside <script> only "<" can end the element, and JSON may write it as an escape.
    return Figure(
        title,
        description,
        Markup(figure.to_json().replace("<", "\\u003c")),
        file_name=file_name,
        csv=data.to_csv(index=False, float_format="%.6g"),
    )
