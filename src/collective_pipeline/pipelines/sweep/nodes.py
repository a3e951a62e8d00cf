"""The life of a sweep."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from plotly.graph_objects import Figure

from collective_pipeline.config import Arm, Parameters, UserError
from collective_pipeline.data.splits import Splits
from collective_pipeline.evaluation.comparison import RUN_COLUMNS, compare_overall, compare_sizes
from collective_pipeline.evaluation.latency import measure_latency
from collective_pipeline.evaluation.sweep_figures import no_figure, plot_importance, plot_pruning, plot_trials
from collective_pipeline.evaluation.sweep_report import write_sweep_report
from collective_pipeline.evaluation.verdict import answer_search, answer_sizes
from collective_pipeline.models.matching import count_collective
from collective_pipeline.pipelines.comparison.nodes import describe_run
from collective_pipeline.tuning import tracking
from collective_pipeline.tuning.outcome import collect_models, collect_runs, collect_trials, rank_importance
from collective_pipeline.tuning.space import check_space
from collective_pipeline.tuning.work import Task, check_sizes, run_workers

Arms = dict[tuple[str, int], Arm]
Latencies = dict[tuple[str, int], float]


def join_study(settings: Parameters, splits: Splits, study: Path, states: Path) -> Task:
    """Everything that a worker needs; refuses before any work what cannot be done, or is of another study."""
    check_space(settings)
    check_sizes(settings, splits)
    task = Task(settings, splits, study, states)
    return replace(task, tracking=tracking.begin(task.open()))


def run_study(
    task: Task, device: torch.device
) -> tuple[pd.DataFrame, Arms, dict[str, list[str]], pd.DataFrame, pd.DataFrame]:
    """Work until all of it is done, by whomever; what was tested, its arms, its models, all trials, what mattered."""
    run_workers(task, device)
    study = task.open()
    tracking.end(task.tracking)
    runs, arms = collect_runs(study, task.settings)
    if runs.empty:
        raise UserError(
            f"the study '{study.name}' has no result: every training failed; MLflow and the log above say why"
        )
    models = collect_models(study, task.settings, task.folder)
    return runs, arms, models, collect_trials(study, task.settings), rank_importance(study, task.settings)


def measure(arms: Arms, device: torch.device) -> Latencies:
    """Every arm's latency in milliseconds."""
    return {name: measure_latency(arm, device) for name, arm in arms.items()}


def compare(
    settings: Parameters, splits: Splits, results: pd.DataFrame, latency: Latencies, models: dict[str, list[str]]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """All runs, one row for each arm and size, one for each arm over all sizes, and the answer with its models."""
    reference = settings.comparison.reference
    names = zip(results["model_type"], results["target_params"], strict=True)
    runs = results.assign(latency_ms=[latency[name] for name in names])
    if settings.sweep.mode == "search":
        # Each arm has the size that its search found best: they are compared as they are, all in one family.
        own_size = runs.groupby("model_type")["target_params"].first()
        at_once = runs.assign(target_params=0)
        comparison = compare_sizes(at_once, settings.comparison, reference=reference)
        overall = compare_overall(at_once, settings.comparison, reference=reference)
        told = answer_search(comparison, settings.comparison, reference=reference)
        comparison["target_params"] = comparison["model_type"].map(own_size)
    else:
        comparison = compare_sizes(runs, settings.comparison, reference=reference)
        overall = compare_overall(runs, settings.comparison, reference=reference)
        near = count_collective(settings.collective, in_dim=splits.in_dim, num_classes=splits.num_classes)
        told = answer_sizes(overall, comparison, settings.comparison, near=near, reference=reference)
    labels = comparison["model_type"] + " " + comparison["params"].astype(str)
    accuracies = dict(zip(labels, comparison["test_accuracy_mean"].round(3).tolist(), strict=True))
    summary: dict[str, Any] = {"answer": told, "reference": reference, "test_accuracy": accuracies}
    if models:
        first = next(iter(models.values()))[0]
        use = ["kedro", "run", "--pipeline", "predict", "--params", f"images=photos/,checkpoint={first}"]
        summary |= {"models": models, "use": shlex.join(use)}
    return runs[list(RUN_COLUMNS)], comparison, overall, summary


def show_trials(trials: pd.DataFrame) -> Figure:
    """All trials, or a word where there were none."""
    return no_figure("No search was run (sweep.mode=grid)") if trials.empty else plot_trials(trials)


def show_pruning(trials: pd.DataFrame) -> Figure:
    """What pruning saved, or a word where there was none."""
    return no_figure("No search was run (sweep.mode=grid)") if trials.empty else plot_pruning(trials)


def show_importance(importance: pd.DataFrame) -> Figure:
    """The importance of hyperparameters, or a word where it is unknown."""
    return no_figure("Too few trials to tell what mattered") if importance.empty else plot_importance(importance)


def report(
    settings: Parameters,
    splits: Splits,
    device: torch.device,
    summary: dict[str, Any],
    *tables: pd.DataFrame,
) -> str:
    """The page that answers the question over sizes, and says how the answer came about."""
    runs, comparison, overall, trials, importance = tables
    facts = describe_run(settings, splits, device, "sweep")
    if "models" in summary:
        models = {name: ", ".join(files) for name, files in summary["models"].items()}
        facts = {"Best models": models | {"to use one": summary["use"]}, **facts}
    grid = settings.sweep.mode == "grid"
    question = "Does a collective use its parameters better, at any size?" if grid else "What did the search find best?"
    return write_sweep_report(
        title=f"{question} {settings.dataset}",
        answer=summary["answer"],
        runs=runs,
        comparison=comparison,
        overall=overall,
        trials=trials,
        importance=importance,
        facts=facts,
        reference=settings.comparison.reference,
    )
