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
from collective_pipeline.config import Arm, Parameters, flatten, hide_password
from collective_pipeline.data.splits import Splits
from collective_pipeline.evaluation.comparison import RUN_COLUMNS, compare_arms
from collective_pipeline.evaluation.experts import describe_gates
from collective_pipeline.evaluation.figures import plot_training_curves
from collective_pipeline.evaluation.latency import measure_latency
from collective_pipeline.evaluation.report import write_report
from collective_pipeline.evaluation.verdict import answer
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.training.runtime import describe_device


def measure(device: torch.device, *arms_and_results: Arm | pd.DataFrame) -> dict[str, float]:
    """Every arm's latency in milliseconds; their results are only waited for, so that nothing else is at work."""
    arms = (arm for arm in arms_and_results if isinstance(arm, Arm))
    return {arm.model_type: measure_latency(arm, device) for arm in arms}


def compare(
    settings: Parameters, latency: dict[str, float], *results: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """All runs, one row for each arm, and the answer with the figures that it rests on."""
    runs, reference = pd.concat(results, ignore_index=True), settings.comparison.reference
    timed = runs.assign(latency_ms=runs["model_type"].map(latency))
    comparison = compare_arms(timed, settings.comparison, reference=reference)
    summary = {
        "answer": answer(comparison, settings.comparison, reference=reference),
        "reference": reference,
        "test_accuracy": {
            str(name): round(mean, 3) for name, mean in comparison.set_index("model_type")["test_accuracy_mean"].items()
        },
    }
    return runs[list(RUN_COLUMNS)], comparison, summary


def with_reference(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """The plot as a node that takes the settings before its tables, for the arm that the others are compared to."""

    def node(settings: Parameters, *tables: pd.DataFrame) -> Figure:
        return plot(*tables, reference=settings.comparison.reference)

    return update_wrapper(node, plot)


def plot_curves(*histories: pd.DataFrame) -> Figure:
    """Training curves of all arms."""
    return plot_training_curves(pd.concat(histories, ignore_index=True))


def analyse_gates(checkpoint: Checkpoint, splits: Splits, device: torch.device) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the gates of a trained network do on the test images, by unit, and by unit and class."""
    units, classes, _ = describe_gates(checkpoint, splits.test, device)
    return units, classes


def report(
    settings: Parameters,
    splits: Splits,
    device: torch.device,
    runs: pd.DataFrame,
    comparison: pd.DataFrame,
    summary: dict[str, Any],
    *gates_and_histories: pd.DataFrame,
    num_gates: int = 0,
) -> str:
    """The page that answers the question, and says how the answer came about.

    The last tables are those of `analyse_gates`, if `num_gates` of them are given, and every arm's history.
    """
    gates, histories = gates_and_histories[:num_gates], gates_and_histories[num_gates:]
    return write_report(
        title=f"{settings.dataset}: {', '.join(comparison['model_type'])}"
        if len(comparison) == 1
        else f"{_question(settings.comparison.reference)} {settings.dataset}",
        answer=summary["answer"],
        results=runs,
        comparison=comparison,
        history=pd.concat(histories, ignore_index=True),
        facts=describe_run(settings, splits, device),
        reference=settings.comparison.reference,
        units=gates[0] if gates else None,
        classes=gates[1] if gates else None,
    )


def _question(reference: str) -> str:
    return "Does a collective use its parameters better?" if reference == "collective" else f"Is {reference} better?"


def describe_run(settings: Parameters, splits: Splits, device: torch.device) -> dict[str, dict[str, str]]:
    """Everything that is needed to run it again, by section and name."""
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
        },
        "Parameters": {name: str(value) for name, value in flatten(settings).items()},
    }
