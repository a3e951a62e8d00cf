"""The life of one arm."""

import threading
from pathlib import Path

import pandas as pd
import torch

from collective_pipeline.config import Arm, ModelType, Parameters
from collective_pipeline.data.splits import Splits
from collective_pipeline.evaluation.cost import count_macs
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.training.progress import Progress
from collective_pipeline.training.tracking import Curves
from collective_pipeline.training.train import match_to_splits, score, snapshots_at, train_arm


def match_size(settings: Parameters, splits: Splits, model_type: ModelType | None = None) -> Arm:
    """The architecture of this arm at the comparison's parameter budget; by default of `settings.model_type`."""
    return match_to_splits(settings, splits, model_type)


def train(
    arm: Arm, splits: Splits, settings: Parameters, device: torch.device, last: Path, num_arms: int = 1
) -> tuple[Checkpoint, pd.DataFrame]:
    """Train the arm with every seed; return the weights that validation chose, and the history.

    The state of training is saved at `last` now and then.
    """
    # A thread of its own means that all arms train at the same time.
    in_turn = num_arms if threading.current_thread() is threading.main_thread() else 1
    progress = Progress(arm.model_type, num_arms=in_turn, device_type=device.type)
    checkpoint, result = train_arm(
        arm,
        splits,
        settings.training,
        seeds=settings.seeds,
        device=device,
        callbacks=[progress, Curves()],
        watch=progress.watch,
        snapshots=snapshots_at(last, arm, splits, settings, device),
    )
    history = pd.DataFrame(result.history)
    history.insert(0, "model_type", arm.model_type)
    return checkpoint, history


def evaluate(
    checkpoint: Checkpoint, history: pd.DataFrame, splits: Splits, settings: Parameters, device: torch.device
) -> pd.DataFrame:
    """Read the test set, once, with the chosen weights; one row for each seed."""
    arm, seeds = checkpoint.arm, checkpoint.seeds
    test = score(checkpoint, splits.test, splits, settings.training, device=device)
    num_epochs = history.groupby("seed")["epoch"].max()
    chosen = history.set_index(["seed", "epoch"])["val_accuracy"]
    seconds = float(history["seconds"].max())
    steps = len(splits.train) // settings.training.batch_size
    images = steps * settings.training.batch_size * int(num_epochs.max()) * len(seeds)
    return pd.DataFrame(
        {
            "model_type": arm.model_type,
            "seed": seeds,
            "params": arm.params,
            "target_params": arm.target_params,
            "param_error_pct": arm.param_error_pct,
            "macs": count_macs(arm),
            "epochs": [int(num_epochs[seed]) for seed in seeds],
            "best_epoch": checkpoint.best_epochs,
            "val_accuracy": [
                float(chosen[seed, epoch]) for seed, epoch in zip(seeds, checkpoint.best_epochs, strict=True)
            ],
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
            "train_seconds": seconds / len(seeds),
            "samples_per_second": images / seconds,
            "test_top5_accuracy": test["top5_accuracy"],
        }
    )
