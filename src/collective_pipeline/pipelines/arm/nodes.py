"""The life of one arm."""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from kedro.io.core import generate_timestamp
from torch import nn

from collective_pipeline.config import Arm, ModelType, Parameters, list_some
from collective_pipeline.data.splits import Splits
from collective_pipeline.data.streaming import StreamedSplits
from collective_pipeline.evaluation.cost import measure_executed_macs
from collective_pipeline.evaluation.experts import describe_at_work
from collective_pipeline.evaluation.figures import plot_experts, plot_samples
from collective_pipeline.evaluation.results import tabulate
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.training.loop import Fit
from collective_pipeline.training.progress import make_progress
from collective_pipeline.training.snapshots import Snapshots
from collective_pipeline.training.tracking import Curves, is_tracked, log_figure
from collective_pipeline.training.train import match_to_splits, score, snapshots_at, train_arm

logger = logging.getLogger(__name__)


def match_sizes(settings: Parameters, splits: Splits, model_types: Sequence[ModelType | None]) -> list[Arm]:
    """Each architecture at the comparison's parameter budget; None: that of `settings.model_type`."""
    return [match_to_splits(settings, splits, model_type) for model_type in model_types]


def clear_for_training(
    splits: Splits, settings: Parameters, device: torch.device, *parts: Arm | Path | Parameters
) -> list[Snapshots]:
    """Where each arm's training saves its state; with `resume`, what is there is refused here if it is of another run.

    Args:
        splits, settings, device: Of all arms.
        parts: The arms, the file of each one's state in the same order, and their settings where they have their own.
    """
    arms = [part for part in parts if isinstance(part, Arm)]
    files = [part for part in parts if isinstance(part, Path)]
    own = [part for part in parts if isinstance(part, Parameters)] or [settings] * len(arms)
    snapshots = [
        snapshots_at(file, arm, splits, of_arm, device) for arm, file, of_arm in zip(arms, files, own, strict=True)
    ]
    clear(snapshots)
    return snapshots


def clear(snapshots: Sequence[Snapshots], *, apart_from: Collection[str] = ()) -> None:
    """Refuse what is saved if it is of another run, or of one that trains now; only then give it up.

    No training begins before nothing is left that could refuse another. What an earlier run saved and did not finish is
    set aside, since hours of training must not hang on a forgotten `resume=true`.

    Args:
        snapshots: Of all trainings of the run.
        apart_from: What each compares itself, once it is known.

    Raises:
        UserError: If one is of another run, or of one that trains now.
    """
    for saved in snapshots:
        saved.check(apart_from=apart_from)
    for saved in snapshots:
        saved.hold()
    begun = {saved.name: place for saved in snapshots if (place := saved.find_place()) is not None}
    is_finished = len(begun) == len(snapshots) and all(place["finished"] for place in begun.values())
    is_begun_anew = begun and not is_finished and not any(saved.resume for saved in snapshots)
    aside = f"aside-{generate_timestamp()}" if is_begun_anew else None
    for saved in snapshots:
        saved.clear(aside)
    if aside is not None:
        how_far = [
            f"{name} {'done' if place['finished'] else 'in epoch {}'.format(place['epoch'] + 1)}"
            for name, place in begun.items()
        ]
        logger.warning(
            "An earlier run did not finish this training (%s): it begins anew, and what was saved is set aside in "
            "folders called %s; the README says under Interrupted runs how to go on from them.",
            list_some(how_far, ", "),
            aside,
        )


def train(
    arm: Arm,
    splits: Splits,
    settings: Parameters,
    device: torch.device,
    snapshots: Snapshots,
    num_arms: int = 1,
    *,
    prepare: Callable[[nn.Module, Sequence[int]], None] | None = None,
    name: str | None = None,
) -> tuple[Checkpoint, pd.DataFrame]:
    """Train the arm with every seed; return the weights that validation chose, and the history.

    `prepare` gives the drawn network other weights; messages and the history call the arm by its `name`, if it has one.
    """
    name = name or arm.model_type
    # A thread of its own means that all arms train at the same time.
    is_alone = threading.current_thread() is threading.main_thread()
    num_beside = 1 if is_alone else num_arms
    progress = make_progress(
        name, arm, splits, settings, device, num_gpus=1 / num_beside, num_arms=num_arms if is_alone else 1
    )
    checkpoint, result = train_arm(
        arm,
        splits,
        settings.training,
        seeds=settings.seeds,
        device=device,
        callbacks=[progress, Curves()],
        watch=progress.watch,
        snapshots=snapshots,
        num_beside=num_beside,
        prepare=prepare,
        look=partial(log_experts, splits=splits, seed=settings.seeds[0], device=device),
        name=name,
    )
    return checkpoint, tabulate_history(name, result)


def tabulate_history(name: str, fit: Fit) -> pd.DataFrame:
    """One row for each seed and epoch of the training called `name`."""
    history = pd.DataFrame(fit.history)
    history.insert(0, "model_type", name)
    return history


def log_experts(epoch: int, checkpoint: Checkpoint, *, splits: Splits, seed: int, device: torch.device) -> None:
    """A heat map of what experts, members or gates do on the validation images, and some of these, in MLflow's run.

    Of one seed, as the final one, as long as it is trained.
    """
    if not is_tracked() or seed not in checkpoint.seeds:
        return
    try:
        classes, samples = describe_at_work(
            checkpoint.of_seeds([seed]), train=splits.train, images=splits.val, device=device
        )
    except torch.OutOfMemoryError:  # no reason to end a training
        logger.warning("%s: the memory is too small to look at its experts while it trains.", checkpoint.arm.model_type)
        return
    if not classes.empty:
        log_figure(plot_experts(classes), f"expert_analysis/epoch_{epoch:04d}.html")
        log_figure(plot_samples(samples, splits.val), f"expert_analysis/epoch_{epoch:04d}_samples.html")


def evaluate(
    checkpoint: Checkpoint,
    history: pd.DataFrame,
    splits: Splits | StreamedSplits,
    settings: Parameters,
    device: torch.device,
) -> pd.DataFrame:
    """Read the test set, once, with the chosen weights; one row for each seed."""
    test = score(checkpoint, splits.test, splits, settings.training, device=device)
    executed = measure_executed_macs(checkpoint, splits.test, device)
    return tabulate(
        checkpoint,
        history,
        test,
        settings.training,
        executed_macs=executed,
        price_per_gpu_hour=settings.price_per_gpu_hour,
    )
