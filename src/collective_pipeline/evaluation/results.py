"""What a trained arm did: one row for each seed, and its means."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from collective_pipeline.config import TrainingConfig
from collective_pipeline.evaluation.comparison import efficiency
from collective_pipeline.evaluation.cost import count_macs
from collective_pipeline.evaluation.gpu import GPU_COLUMNS, USAGE_COLUMNS
from collective_pipeline.models.checkpoint import Checkpoint


def tabulate(
    checkpoint: Checkpoint,
    history: pd.DataFrame,
    test: Mapping[str, Sequence[float]],
    config: TrainingConfig,
    *,
    num_images: int,
    executed_macs: Sequence[float] | None = None,
) -> pd.DataFrame:
    """`comparison.RUN_COLUMNS`, `gpu.GPU_COLUMNS` and `test_top5_accuracy`, a row for each seed.

    A seed that diverged before it had good weights has no accuracies and no loss.

    Args:
        checkpoint: The weights that validation chose.
        history: A row per seed and epoch.
        test: Accuracies in percent and loss on the test set, one for each seed.
        config: How it was trained.
        num_images: Of the training set.
        executed_macs: Of a test image with each seed, where gates close some; by default all that there are.
    """
    arm, seeds = checkpoint.arm, checkpoint.seeds
    last = history.groupby("seed").tail(1).set_index("seed").loc[list(seeds)]
    seconds = float(history["seconds"].max())
    images = num_images // config.batch_size * config.batch_size * int(last["epoch"].sum())
    results = pd.DataFrame(
        {
            "model_type": arm.model_type,
            "seed": seeds,
            "params": arm.params,
            "target_params": arm.target_params,
            "param_error_pct": arm.param_error_pct,
            "macs": count_macs(arm),
            "executed_macs": float(count_macs(arm)) if executed_macs is None else executed_macs,
            "epochs": last["epoch"].to_numpy(),
            "best_epoch": checkpoint.best_epochs,
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
            "train_seconds": seconds / len(seeds),
            "samples_per_second": images / seconds,
            "diverged": ~np.isfinite(last["train_loss"].to_numpy()),
            "test_top5_accuracy": test["top5_accuracy"],
        }
    )
    results.loc[results["best_epoch"] == 0, ["test_accuracy", "test_loss", "test_top5_accuracy"]] = np.nan
    chosen = history[["seed", "epoch", "val_accuracy"]].rename(columns={"epoch": "best_epoch"})
    results = results.merge(chosen, on=["seed", "best_epoch"], how="left")
    # Of all the training; nothing where there was no GPU, or where it told nothing.
    usage = history.sort_values("seconds").reindex(columns=list(USAGE_COLUMNS)).iloc[-1]
    joules = usage["joules"] or np.nan
    return results.assign(**{**usage, "joules": joules / len(seeds), "images_per_joule": images / joules})


def final_metrics(results: pd.DataFrame) -> dict[str, float]:
    """An arm's means over seeds, under the names that people's notebooks read."""
    accuracy, params = float(results["test_accuracy"].mean()), int(results["params"].iloc[0])
    return {
        "final/test_accuracy": accuracy,
        "final/test_top5_accuracy": float(results["test_top5_accuracy"].mean()),
        "final/test_loss": float(results["test_loss"].mean()),
        "final/val_accuracy": float(results["val_accuracy"].mean()),
        "final/model_params": params,
        "final/macs": float(results["macs"].iloc[0]),
        "final/executed_macs": float(results["executed_macs"].mean()),
        "final/train_seconds": float(results["train_seconds"].mean()),
        **{f"final/{name}": float(value) for name, value in efficiency(accuracy, params).items()},
        **{f"final/{name}": float(value) for name, value in results[list(GPU_COLUMNS)].mean().dropna().items()},
    }
