"""The arms side by side."""

import platform
import shlex
import sys
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import pandas as pd
import torch
from plotly.graph_objects import Figure

from collective_pipeline import __version__
from collective_pipeline.config import TECHNIQUES, Arm, Parameters, flatten, hide_password
from collective_pipeline.data.splits import Splits
from collective_pipeline.data.streaming import StreamedSplits
from collective_pipeline.evaluation.comparison import RUN_COLUMNS, compare_arms
from collective_pipeline.evaluation.experts import ExpertAnalysis, describe_experts
from collective_pipeline.evaluation.figures import plot_samples
from collective_pipeline.evaluation.latency import measure_latency, measure_skipping
from collective_pipeline.evaluation.report import write_report
from collective_pipeline.evaluation.results import OF_CLASS, summarise_runs, top5_by_arm
from collective_pipeline.evaluation.verdict import answer, answer_worth
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.pipelines.experiments import EXPERIMENTS
from collective_pipeline.training.runtime import describe_device


def measure(device: torch.device, *arms_and_results: Arm | pd.DataFrame) -> dict[str, float]:
    """Every arm's latency in milliseconds; their results are only waited for, so that nothing else is at work."""
    arms = (arm for arm in arms_and_results if isinstance(arm, Arm))
    return {arm.model_type: measure_latency(arm, device) for arm in arms}


def compare(
    settings: Parameters, latency: dict[str, float], *results: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """All runs, one row for each arm, and the answer with the figures that it rests on."""
    # A table from a file has a block of memory for each column: one more behind a thousand classes would be slow.
    runs = pd.concat([of_arm.loc[:, ~of_arm.columns.str.startswith(OF_CLASS)] for of_arm in results], ignore_index=True)
    reference: str = settings.comparison.reference
    timed = runs.assign(latency_ms=runs["model_type"].map(latency))
    comparison = compare_arms(timed, settings.comparison, reference=reference)
    tell = answer_worth if reference in TECHNIQUES else answer
    summary = {
        "answer": tell(comparison, settings.comparison, reference=reference),
        "reference": reference,
        "test_accuracy": {
            str(name): round(mean, 3) for name, mean in comparison.set_index("model_type")["test_accuracy_mean"].items()
        },
        "test_top5_accuracy": top5_by_arm(results),
    }
    return runs[list(RUN_COLUMNS)], comparison, summary


def with_reference(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """The plot as a node that takes the settings before its tables, for the arm that the others are compared to."""

    def node(settings: Parameters, *tables: pd.DataFrame) -> Figure:
        return plot(*tables, reference=settings.comparison.reference)

    return update_wrapper(node, plot)


def join_histories(*histories: pd.DataFrame) -> pd.DataFrame:
    """Of all arms."""
    return pd.concat(histories, ignore_index=True)


def measure_shut_gates(
    latency: dict[str, float], checkpoint: Checkpoint, dense: Checkpoint, splits: Splits, device: torch.device
) -> pd.DataFrame:
    """What skipping shut gates saves here; the latency is only waited for, so that nothing else is at work."""
    return measure_skipping(checkpoint, dense, splits.test, device)


def summarise(*results: pd.DataFrame) -> dict[str, Any]:
    """The fields of the original's evaluation, for every arm and seed."""
    return summarise_runs(pd.concat(results, ignore_index=True))


def analyse_experts(
    settings: Parameters, splits: Splits, device: torch.device, *checkpoints_and_classes: Checkpoint | dict[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """What experts, members and gated layers do on the test images, if there are any: by unit, class, seed, image.

    Beside the checkpoints may be the classes of the sub-models that the units of the reference were made of.
    """
    checkpoints = [one for one in checkpoints_and_classes if isinstance(one, Checkpoint)]
    found = ExpertAnalysis.join(
        [describe_experts(one, train=splits.train, images=splits.test, device=device) for one in checkpoints]
    )
    for classes in (one for one in checkpoints_and_classes if isinstance(one, dict)):
        found = found.with_sub_models(settings.comparison.reference, classes)
    return found.units, found.classes, found.seeds, found.samples


def plot_sample_predictions(samples: pd.DataFrame, splits: Splits) -> Figure:
    """Test images with what is said of them."""
    return plot_samples(samples, splits.test)


def report(
    settings: Parameters,
    splits: Splits,
    device: torch.device,
    runs: pd.DataFrame,
    comparison: pd.DataFrame,
    summary: dict[str, Any],
    units: pd.DataFrame,
    classes: pd.DataFrame,
    seeds: pd.DataFrame,
    samples: pd.DataFrame,
    history: pd.DataFrame,
    more: pd.DataFrame | dict[str, dict[str, str]] | None = None,
    *,
    experiment: str,
) -> str:
    """The page that answers the question, and says how the answer came about.

    `more` is what skipping shut gates saves, or what else is to be known of this run, by section and name.
    """
    return write_report(
        title=f"{settings.dataset}: {', '.join(comparison['model_type'])}"
        if len(comparison) == 1
        else f"{_question(settings.comparison.reference)} {settings.dataset}",
        answer=summary["answer"],
        results=runs,
        comparison=comparison,
        history=history,
        facts=(more if isinstance(more, dict) else {}) | describe_run(settings, splits, device, experiment),
        reference=settings.comparison.reference,
        top5=summary["test_top5_accuracy"],
        experts=ExpertAnalysis(units, classes, seeds, samples),
        images=splits.test,
        skipping=more if isinstance(more, pd.DataFrame) else None,
    )


def _question(reference: str) -> str:
    if reference in TECHNIQUES:
        return "What is each technique worth?"
    return "Does a collective use its parameters better?" if reference == "collective" else f"Is {reference} better?"


def describe_run(
    settings: Parameters, splits: Splits | StreamedSplits, device: torch.device, experiment: str
) -> dict[str, dict[str, str]]:
    """Everything that is needed to run the experiment again, by section and name."""
    is_read = EXPERIMENTS[experiment].is_reader_of
    return {
        "Run": {
            "command": hide_password(shlex.join(["kedro", *sys.argv[1:]])),
            "device": describe_device(device),
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "collective-pipeline": __version__,
        },
        "Data": {
            "data set": splits.name,
            "training images": f"{len(splits.train):,}",
            "validation images": f"{len(splits.val):,} (stratified, never augmented)",
            "test images": f"{len(splits.test):,} (read once, at the end)",
            "channel means": ", ".join(f"{mean:.4f}" for mean in splits.mean),
            "channel deviations": ", ".join(f"{std:.4f}" for std in splits.std),
            **(splits.describe_files() if isinstance(splits, StreamedSplits) else {}),
        },
        "Parameters": {name: str(value) for name, value in flatten(settings).items() if is_read(name)},
    }
