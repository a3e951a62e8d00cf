"""Live curves in MLflow: the one module of the core that speaks to it, and only if a run is active."""

import math

import mlflow

from collective_pipeline.training.loop import Epoch


def log_epoch(epoch: Epoch) -> None:
    """Log the means over seeds of an epoch as `train/loss`, `val/accuracy`, ... to the active run, if there is one."""
    if mlflow.active_run() is None:
        return
    means = {name.replace("_", "/", 1): epoch.mean(name) for name in epoch.metrics}
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    mlflow.log_metrics(finite | {"learning_rate": epoch.learning_rate}, step=epoch.number)
