"""Live curves in MLflow: the one module of the core that speaks to it, and only if a run is active."""

import math
import time

import mlflow
from mlflow.entities import Metric

from collective_pipeline.training.loop import Epoch

SECONDS_BETWEEN = 2.0


class Curves:
    """A callback that logs every epoch's means over seeds to the active run, as `train/loss`, `val/accuracy`, ...

    A database takes about as long for one epoch as for fifty, so that quick epochs are sent together.
    """

    def __init__(self) -> None:
        self.waiting: list[Metric] = []
        self.last_time = 0.0

    def __call__(self, epoch: Epoch) -> None:
        run = mlflow.active_run()
        if run is None or epoch.partial:  # what is partial comes again, with all seeds
            return
        means = {name.replace("_", "/", 1): epoch.mean(name) for name in epoch.metrics}
        means["learning_rate"] = epoch.learning_rate
        now = round(1000 * time.time())
        self.waiting += [Metric(name, mean, now, epoch.number) for name, mean in means.items() if math.isfinite(mean)]
        if epoch.finished or time.perf_counter() - self.last_time > SECONDS_BETWEEN:
            client = mlflow.MlflowClient()
            for start in range(0, len(self.waiting), 1000):  # as many as MLflow takes at once
                client.log_batch(run.info.run_id, metrics=self.waiting[start : start + 1000])
            self.waiting, self.last_time = [], time.perf_counter()
