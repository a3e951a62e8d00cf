"""What a trained arm did: one row for each seed, and its means."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from collective_pipeline.config import TrainingConfig
from collective_pipeline.evaluation.comparison import efficiency
from collective_pipeline.evaluation.cost import count_macs
from collective_pipeline.evaluation.gpu import COST_COLUMNS, GPU_COLUMNS, USAGE_COLUMNS, add_costs
from collective_pipeline.models.checkpoint import Checkpoint

OF_CLASS = "test_accuracy_of_"  # before the name of a class
FEW_CLASSES = 10  # of digits, or of CIFAR-10: hardly ever is the right one below the fifth place


def tabulate(
    checkpoint: Checkpoint,
    history: pd.DataFrame,
    test: Mapping[str, Sequence[float]],
    config: TrainingConfig,
    *,
    executed_macs: Sequence[float] | None = None,
    price_per_gpu_hour: float | None = None,
) -> pd.DataFrame:
    """`comparison.RUN_COLUMNS`, `gpu.GPU_COLUMNS` and what `summarise_runs` needs beside them, a row for each seed.

    A seed that diverged before it had good weights has no accuracies, no loss and no executed multiply-accumulates.

    Args:
        checkpoint: The weights that validation chose.
        history: A row per seed and epoch.
        test: What `training.train.score` says of the test set, one number for each seed.
        config: How it was trained.
        executed_macs: Of a test image with each seed, where gates close some; by default all that there are.
        price_per_gpu_hour: In any currency; None: not known.
    """
    arm, seeds = checkpoint.arm, checkpoint.seeds
    last = history.groupby("seed").tail(1).set_index("seed").loc[list(seeds)]
    seconds = float(history["seconds"].max())
    images = last["images"].sum()
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
            "train_seconds": seconds / len(seeds),
            "samples_per_second": images / seconds,
            "diverged": ~np.isfinite(last["train_loss"].to_numpy()),
            "early_stopped": (last["epoch"].to_numpy() < config.epochs) & (config.early_stopping_patience is not None),
            "final_train_loss": last["train_loss"].to_numpy(),
            "final_train_accuracy": last["train_accuracy"].to_numpy(),
            **{f"test_{name}": values for name, values in test.items()},
        }
    )
    results["early_stopped"] &= ~results["diverged"]
    results.loc[results["best_epoch"] == 0, ["executed_macs", *(f"test_{name}" for name in test)]] = np.nan
    chosen = history[["seed", "epoch", "val_accuracy"]].rename(columns={"epoch": "best_epoch"})
    results = results.merge(chosen, on=["seed", "best_epoch"], how="left")
    # Of all the training; nothing where there was no GPU, or where it told nothing.
    *names, spent = (*USAGE_COLUMNS, "gpu_seconds")
    usage = history.sort_values("seconds").reindex(columns=[*names, spent]).iloc[-1]
    joules = usage["joules"] or np.nan
    results = results.assign(**{**usage[names], "joules": joules / len(seeds), "images_per_joule": images / joules})
    return add_costs(results, usage[spent] / 3600 / len(seeds), price_per_gpu_hour)


def top5_by_arm(results: Sequence[pd.DataFrame]) -> dict[str, float]:
    """Every arm's top-5 accuracy on the test images, the mean over seeds in percent; of few classes it says nothing.

    Args:
        results: `tabulate`'s, of each arm one.

    Returns:
        By the names of arms; empty for `FEW_CLASSES` or fewer.
    """
    if results[0].columns.str.startswith(OF_CLASS).sum() <= FEW_CLASSES:
        return {}
    return {
        str(of_arm["model_type"].iloc[0]): round(float(of_arm["test_top5_accuracy"].mean()), 3) for of_arm in results
    }


def summarise_runs(results: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What `results.json` holds: by the names of arms, the fields of the original's evaluation.

    `overall_accuracy` and `final_test_accuracy` are one number here, since the test set is read once, with the weights
    of the epoch whose validation accuracy is `best_accuracy`. All accuracies are in percent.

    Args:
        results: `tabulate`'s, of all arms.

    Returns:
        For each arm the fields' means over seeds (of `early_stopped` whether any did), and in `seeds` a list with the
        same fields of each seed. What is not finite, because a seed diverged, is None.
    """
    told = {}
    for name, arm in results.groupby("model_type", sort=False):
        seeds = [_summarise_run(run) for run in arm.to_dict("records")]
        told[str(name)] = _means_of(seeds) | {"seeds": seeds}
    return told


def _summarise_run(run: Mapping[Hashable, Any]) -> dict[str, Any]:
    of_class = {str(name).removeprefix(OF_CLASS): run[name] for name in run if str(name).startswith(OF_CLASS)}
    return {
        "seed": run["seed"],
        "overall_accuracy": _known(run["test_accuracy"]),
        "class_accuracies": {name: _known(value) for name, value in of_class.items()},
        "best_accuracy": _known(run["val_accuracy"]),
        "total_epochs": run["epochs"],
        "early_stopped": run["early_stopped"],
        "final_train_loss": _known(run["final_train_loss"]),
        "final_train_accuracy": _known(run["final_train_accuracy"]),
        "final_test_accuracy": _known(run["test_accuracy"]),
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _means_of(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every field over the seeds that have it."""
    first = seeds[0]
    means: dict[str, Any] = {}
    for name in (name for name in first if name != "seed"):
        values = [seed[name] for seed in seeds if seed[name] is not None]
        if isinstance(first[name], Mapping):
            means[name] = _means_of(values)
        elif isinstance(first[name], bool):
            means[name] = any(values)
        else:
            means[name] = round(statistics.fmean(values), 6) if values else None
    return means


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
        **{
            f"final/{name}": float(value)
            for name, value in results[[*GPU_COLUMNS, *COST_COLUMNS]].mean().dropna().items()
        },
    }
