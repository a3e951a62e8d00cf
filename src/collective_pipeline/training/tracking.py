"""Live curves and temperatures in MLflow: the one module of the core that speaks to it, and only if a run is active."""

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import mlflow
import pynvml
from mlflow.entities import Metric
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.tracking.fluent import run_id_to_system_metrics_monitor

from collective_pipeline.training.loop import Epoch

SECONDS_BETWEEN = 2.0
SYSTEM_METRICS_SECONDS = 2


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


class GpuTemperatures(BaseMetricsMonitor):
    """What MLflow's own monitor of GPUs leaves out, as `system/gpu_0_temperature_celsius`, ...

    Args:
        cards: The driver's handles of all GPUs.
    """

    def __init__(self, cards: Sequence[Any]) -> None:
        super().__init__()
        self.cards = cards

    def collect_metrics(self) -> None:
        """Read all that can be read."""
        for index, card in enumerate(self.cards):
            with contextlib.suppress(pynvml.NVMLError):
                temperature = pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)
                self._metrics[f"gpu_{index}_temperature_celsius"].append(temperature)

    def aggregate_metrics(self) -> dict[str, float]:
        """Means since MLflow logged the last ones."""
        return {name: statistics.fmean(values) for name, values in self._metrics.items()}


def set_up_system_metrics() -> None:
    """Of this process's runs from now on, a value every two seconds."""
    mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_SECONDS)
    mlflow.set_system_metrics_samples_before_logging(1)


def log_gpu_temperatures(run_id: str) -> None:
    """With the run's system metrics, if MLflow logs any and found a GPU."""
    system = run_id_to_system_metrics_monitor.get(run_id)
    if system is not None:
        found = [monitor for monitor in system.monitors if isinstance(monitor, GPUMonitor)]
        system.monitors += [GpuTemperatures(monitor.gpu_handles) for monitor in found]
