"""Curves, temperatures and models in MLflow: the one module of the core that speaks to it, if a run is active."""

import contextlib
import importlib.metadata
import math
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pynvml
from mlflow.entities import Metric
from mlflow.models import ModelSignature
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.tracking.fluent import run_id_to_system_metrics_monitor
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from plotly.graph_objects import Figure  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

import collective_pipeline
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.loop import Epoch

SECONDS_BETWEEN = 2.0
SYSTEM_METRICS_SECONDS = 2
# The module that loads a logged model, and what it needs beside this package.
LOADER = "collective_pipeline.serving"
REQUIREMENTS = ("numpy", "pandas", "pydantic", "safetensors", "torch")
# MLflow's own memory of what it is logging is shared by all threads.
_LOGGING_MODEL = threading.Lock()


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


@contextlib.contextmanager
def nested_run(name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> Iterator[None]:
    """A run inside the active one, if there is one, for as long as the block takes."""
    if mlflow.active_run() is None:
        yield
        return
    mlflow.start_run(run_name=name, nested=True, tags=dict(tags))
    mlflow.log_params(dict(params))
    try:
        yield
    except BaseException as error:
        mlflow.end_run("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    mlflow.end_run()


def is_tracked() -> bool:
    """Whether there is a run to log to."""
    return mlflow.active_run() is not None


def log_figure(figure: Figure, path: str) -> None:
    """A page of the active run that shows it, without a network: plotly.js, some 4 MB, is in it."""
    mlflow.log_figure(figure, path, save_kwargs={"include_plotlyjs": True})


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


def log_model(checkpoint: Checkpoint, path: Path, images: Tensor) -> None:
    """The checkpoint as a model of the active run, with the package's code and a signature: it can be taken away.

    Args:
        checkpoint: What is logged.
        path: Its file.
        images: Raw ones as an example of the input, uint8 `(B, C, H, W)`.
    """
    with _LOGGING_MODEL:
        mlflow.pyfunc.log_model(
            name="model",
            loader_module=LOADER,
            data_path=str(path),
            code_paths=[str(Path(collective_pipeline.__file__).parent)],
            signature=_signature(checkpoint),
            input_example=images.cpu().numpy(),
            pip_requirements=[f"{package}=={_public_version(package)}" for package in REQUIREMENTS],
        )


def _signature(checkpoint: Checkpoint) -> ModelSignature:
    """Bytes `(B, C, H, W)` to the columns of `evaluation.predict.tabulate`."""
    probabilities = [ColSpec("float", name) for name in ("probability", *checkpoint.images.class_names)]
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *checkpoint.images.shape))]),
        outputs=Schema([ColSpec("string", "prediction"), *probabilities]),
        params=ParamSchema([ParamSpec("seed", "long", None)]),
    )


def _public_version(package: str) -> str:
    """Without what names a build, such as +cu132, which no index has."""
    return importlib.metadata.version(package).partition("+")[0]
