"""MLflow's runs of a study: one of the study, and in it one for each worker's command and one for each trial."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from optuna.trial import TrialState

from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.tracking import set_up_system_metrics, start_run
from collective_pipeline.tuning.study import Study, Unit

logger = logging.getLogger(__name__)

STUDY_TAG = "study"


@dataclass(frozen=True)
class Tracking:
    """Where the runs of a study's trials go; picklable, so that worker processes know.

    Attributes:
        uri: Of the tracking server or database.
        experiment_id: In it.
        parent: The run of the study.
    """

    uri: str
    experiment_id: str
    parent: str

    @contextlib.contextmanager
    def trial(self, unit: Unit, file: Path, params: Mapping[str, Any]) -> Iterator[None]:
        """A run of this unit, active in this thread: finished whatever the trial's state, unless there is an error.

        A unit that was interrupted goes on in the run that is kept in `file`.
        """
        mlflow.set_tracking_uri(self.uri)
        set_up_system_metrics()
        status = "FAILED"
        try:
            start_run(
                str(unit),
                file,
                experiment_id=self.experiment_id,
                parent=self.parent,
                tags={"model_type": unit.model_type, "stage": unit.stage, "unit": unit.name},
                params=params,
                log_system_metrics=unit.stage != "search",
            )
            yield
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            mlflow.end_run(status)


def begin(study: Study) -> Tracking | None:
    """The run of the study: that of the command which began it; later commands' runs are nested in it.

    None if nothing is tracked.
    """
    own = mlflow.active_run()
    if own is None:
        return None
    client = mlflow.MlflowClient()
    parent = study.keep("mlflow_run", own.info.run_id)
    try:
        client.get_run(parent)
    except MlflowException:
        logger.info("The study's MLflow run is kept elsewhere: this worker's trials are in a run of their own here")
        parent = own.info.run_id
    if parent == own.info.run_id:
        client.set_tag(parent, STUDY_TAG, study.name)
        client.set_tag(parent, "mlflow.runName", study.name)
    else:
        client.set_tag(own.info.run_id, "mlflow.parentRunId", parent)
        client.set_tag(own.info.run_id, "mlflow.runName", f"worker of {study.name}")
    return Tracking(mlflow.get_tracking_uri(), own.info.experiment_id, parent)


def end(tracking: Tracking | None) -> None:
    """The study is done: its run is finished, whichever command did the last of the work."""
    own = mlflow.active_run()
    if tracking is not None and own is not None and tracking.parent != own.info.run_id:
        mlflow.MlflowClient().set_terminated(tracking.parent)


def log_outcome(state: TrialState, metrics: Mapping[str, float], reason: str | None = None) -> None:
    """The figures and the fate of the trial whose run is active; a pruned one is no failure."""
    if mlflow.active_run() is None:
        return
    mlflow.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)})
    mlflow.set_tag("trial_state", state.name.lower())
    if reason is not None:
        mlflow.set_tag("failure", reason)
