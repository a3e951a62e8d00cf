"""Curves, temperatures and models in MLflow: the one module of the core that speaks to it, if a run is active."""

import contextlib
import importlib.metadata
import logging
import math
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pynvml
import torch
from filelock import FileLock
from mlflow.entities import LifecycleStage, LoggedModel, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.tracking.fluent import run_id_to_system_metrics_monitor
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from plotly.graph_objects import Figure  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

import collective_pipeline
from collective_pipeline.data.batches import resize
from collective_pipeline.files import replacing
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.loop import Epoch

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 2.0
SYSTEM_METRICS_SECONDS = 2
# The module that loads a logged model, and what it needs beside this package.
LOADER = "collective_pipeline.serving"
REQUIREMENTS = ("numpy", "pandas", "pydantic", "safetensors", "torch")
# MLflow's own memory of what it is logging is shared by all threads.
_LOGGING_MODEL = threading.Lock()


class Curves:
    """A callback that logs every epoch's means over seeds to the active run, as `train/loss`, `val/accuracy`, ...

    A database takes about as long for one epoch as for fifty, so that quick epochs are sent together. What a run that
    was interrupted has already is not logged again.
    """

    def __init__(self) -> None:
        self.waiting: list[Metric] = []
        self.last_time = 0.0
        self.logged: set[int] | None = None

    def __call__(self, epoch: Epoch) -> None:
        run = mlflow.active_run()
        if run is None or epoch.partial:  # what is partial comes again, with all seeds
            return
        client = mlflow.MlflowClient()
        if self.logged is None:
            self.logged = {metric.step for metric in client.get_metric_history(run.info.run_id, "learning_rate")}
        if epoch.number not in self.logged:
            means = {name.replace("_", "/", 1): epoch.mean(name) for name in epoch.metrics}
            means["learning_rate"] = epoch.learning_rate
            now = round(1000 * time.time())
            self.waiting += [Metric(name, x, now, epoch.number) for name, x in means.items() if math.isfinite(x)]
        if epoch.finished or time.perf_counter() - self.last_time > SECONDS_BETWEEN:
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


def start_run(
    name: str,
    file: Path,
    *,
    experiment_id: str,
    parent: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    log_system_metrics: bool = False,
) -> str:
    """Start a run, active in this thread, or go on in the one that is kept in `file`.

    Args:
        name: Of the run.
        file: Where its id is kept for whoever goes on, beside the state of what it tracks.
        experiment_id: Of the experiment; a run of another one is left alone.
        parent: The run that it is nested in.
        tags: Also of a run that goes on.
        params: Of a new run.
        log_system_metrics: Whether MLflow is to watch the machine.

    Returns:
        Its id.
    """
    kept = _read_run(file, experiment_id)
    run = mlflow.start_run(
        run_id=kept,
        experiment_id=experiment_id,
        run_name=name,
        nested=True,
        tags={**tags, **process_tags(), MLFLOW_PARENT_RUN_ID: parent},
        log_system_metrics=log_system_metrics,
    )
    log_gpu_temperatures(run.info.run_id)
    if kept is None:
        mlflow.log_params(dict(params))
        with replacing(file) as partial:
            partial.write_text(run.info.run_id)
    return str(run.info.run_id)


def _read_run(file: Path, experiment_id: str) -> str | None:
    """The id in `file` if there is such a run in the experiment: it may have been deleted, or be kept elsewhere."""
    try:
        run = mlflow.MlflowClient().get_run(file.read_text())
    except (OSError, MlflowException):
        return None
    here = run.info.experiment_id == experiment_id and run.info.lifecycle_stage == LifecycleStage.ACTIVE
    return run.info.run_id if here else None


@contextlib.contextmanager
def nested_run(name: str, file: Path, *, tags: Mapping[str, str], params: Mapping[str, Any]) -> Iterator[None]:
    """A run inside the active one, if there is one, for as long as the block takes; see `start_run`."""
    active = mlflow.active_run()
    if active is None:
        yield
        return
    about = {"experiment_id": active.info.experiment_id, "parent": active.info.run_id}
    start_run(name, file, tags=tags, params=params, **about)
    try:
        yield
    except BaseException as error:
        mlflow.end_run("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    mlflow.end_run()


def run_environment() -> dict[str, str]:
    """What another process needs to log to the active run; nothing if there is none."""
    run = mlflow.active_run()
    return {} if run is None else {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "MLFLOW_RUN_ID": run.info.run_id}


@contextlib.contextmanager
def join_run(*, is_first: bool) -> Iterator[None]:
    """The run of `run_environment`, active in the first of several processes; it is not ended here."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None or not is_first:
        yield
        return
    mlflow.start_run(run_id=run_id, log_system_metrics=False)
    try:
        yield
    finally:
        mlflow.end_run("RUNNING")


def process_tags() -> dict[str, str]:
    """Of every run: which process it is of, so that another can tell whether that still lives."""
    began = psutil.Process().create_time()  # numbers of processes come again
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "began": f"{began:.0f}"}


def end_runs_of_the_dead(experiment_id: str) -> None:
    """Mark as failed what processes of this machine that were killed have left as running."""
    client = mlflow.MlflowClient()
    of_here = f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'"
    for run in client.search_runs([experiment_id], of_here):
        if not _is_alive(int(run.data.tags["pid"]), float(run.data.tags["began"])):
            client.set_terminated(run.info.run_id, "FAILED")


def _is_alive(pid: int, began: float) -> bool:
    try:
        return bool(abs(psutil.Process(pid).create_time() - began) < 2)
    except psutil.NoSuchProcess:
        return False


def set_up_store(uri: str) -> None:
    """Make MLflow's tables if they are to lie in a file: two first commands at once would both make them, and one fail.

    Args:
        uri: Of the tracking server, as `sqlite:///<file>`; others have tables.
    """
    _, is_file, file = uri.partition("sqlite:///")
    if is_file:
        with FileLock(f"{file}.lock"):
            mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def is_tracked() -> bool:
    """Whether there is a run to log to."""
    return mlflow.active_run() is not None


def log_figure(figure: Figure, path: str) -> None:
    """A page of the active run that shows it, without a network: plotly.js, some 4 MB, is in it.

    A server that does not take it is no reason to end a training: that is told.
    """
    try:
        mlflow.log_figure(figure, path, save_kwargs={"include_plotlyjs": True})
    except MlflowException as error:
        logger.warning("MLflow did not take %s: %s", path, error)


def log_series(series: Mapping[str, Sequence[float]]) -> None:
    """Numbers one after another, as curves of the active run if there is one; what is not finite is left out."""
    run = mlflow.active_run()
    if run is None:
        return
    now = round(1000 * time.time())
    metrics = [
        Metric(name, value, now, step)
        for name, values in series.items()
        for step, value in enumerate(values, start=1)
        if math.isfinite(value)
    ]
    for start in range(0, len(metrics), 1000):  # as many as MLflow takes at once
        mlflow.MlflowClient().log_batch(run.info.run_id, metrics=metrics[start : start + 1000])


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
    """The checkpoint as the one model of the active run, with the package's code and a signature: it can be taken away.

    What an interrupted run has logged before is replaced.

    Args:
        checkpoint: What is logged.
        path: Its file.
        images: Raw ones as an example of the input, uint8 `(B, C, H, W)`.
    """
    with _LOGGING_MODEL:
        for earlier in _models_of_active_run():
            mlflow.MlflowClient().delete_logged_model(earlier.model_id)
        mlflow.pyfunc.log_model(
            name="model",
            loader_module=LOADER,
            data_path=str(path),
            code_paths=[str(Path(collective_pipeline.__file__).parent)],
            signature=_signature(checkpoint),
            input_example=_as_read(images.cpu(), checkpoint.images.shape).numpy(),
            pip_requirements=[f"{package}=={_public_version(package)}" for package in REQUIREMENTS],
        )


def _as_read(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Bytes of the shape that the network reads."""
    if images.shape[1:] == shape:
        return images
    return resize(images.float(), shape[1:]).round().to(torch.uint8)


def _models_of_active_run() -> Sequence[LoggedModel]:
    run = mlflow.active_run()
    if run is None:
        return []
    of_run = f"source_run_id = '{run.info.run_id}'"
    return mlflow.search_logged_models([run.info.experiment_id], filter_string=of_run, output_format="list")


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
