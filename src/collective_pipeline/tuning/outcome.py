"""What a study has found, as tables."""

import json
import logging
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState

from collective_pipeline.config import Arm, Parameters, count_of
from collective_pipeline.evaluation.gpu import add_costs
from collective_pipeline.tuning.study import Study, Unit
from collective_pipeline.tuning.work import list_finals, list_units

logger = logging.getLogger(__name__)

TRIAL_COLUMNS = (
    "model_type",
    "unit",
    "state",
    "val_accuracy",
    "params",
    "epochs",
    "max_epochs",
    "seconds",
    "values",
    "failure",
)
IMPORTANCE_COLUMNS = ("model_type", "parameter", "importance")
# With fewer finished trials the forest has nothing to learn from.
TRIALS_FOR_IMPORTANCE = 10


def collect_runs(study: Study, settings: Parameters) -> tuple[pd.DataFrame, dict[tuple[str, int], Arm]]:
    """What was tested: a row per arm, size and seed; and the arms by model type and size."""
    if settings.sweep.mode == "grid":
        names = {unit: str(unit.model_type) for unit in list_units(settings)}
    else:
        names = _name_finals(study, settings)
    tables, arms = [], {}
    for unit, trials in study.outcomes(names).items():
        for trial in trials:
            if "rows" in trial.user_attrs:  # also of a failure: that it diverged is a result
                arm = Arm.model_validate(trial.user_attrs["arm"])
                rows = pd.DataFrame(trial.user_attrs["rows"]).assign(model_type=names[unit])
                tables.append(rows[rows["seed"].isin(unit.seeds)])
                arms[names[unit], arm.target_params] = arm
    if not tables:
        return pd.DataFrame(), arms
    runs = pd.concat(tables, ignore_index=True).drop_duplicates(
        ["model_type", "target_params", "seed"], ignore_index=True
    )
    text = {"model_type", "diverged"}
    # JSON has no NaN, and a column without any number would be of objects.
    for name in runs.columns.difference(list(text)):
        runs[name] = pd.to_numeric(runs[name])
    # At today's price, whatever it was when they were trained.
    return add_costs(runs, runs["gpu_hours"], settings.price_per_gpu_hour), arms


def _name_finals(study: Study, settings: Parameters) -> dict[Unit, str]:
    """The second and later best of a model type's search are named by their rank."""
    finals = [unit for unit, _ in list_finals(study, settings)]
    ranks = {unit: [u for u in finals if u.model_type == unit.model_type].index(unit) + 1 for unit in finals}
    return {unit: unit.model_type if rank == 1 else f"{unit.model_type} {rank}" for unit, rank in ranks.items()}


def collect_models(study: Study, settings: Parameters, folder: Path) -> dict[str, list[str]]:
    """The files of the best of a search by their names, of those that were trained anew on this machine.

    Args:
        study: All done.
        settings: Of the run.
        folder: Where the states of all studies are.

    Returns:
        From where the command was typed if they lie below. Seeds that were added later are in a file of their own.
    """
    models = {}
    here = Path.cwd()
    for unit, name in _name_finals(study, settings).items():
        beside = folder / study.folder_name / unit.stage / unit.model_type
        files = sorted(beside.glob(f"{unit.name}.seeds-*.safetensors"))
        models[name] = [str(file.relative_to(here) if file.is_relative_to(here) else file) for file in files]
    return {name: files for name, files in models.items() if files}


def collect_trials(study: Study, settings: Parameters) -> pd.DataFrame:
    """`TRIAL_COLUMNS`, a row per trial of the search; nothing after a grid."""
    rows: list[dict[str, Any]] = []
    if settings.sweep.mode == "search":
        for unit, (trial, *_) in study.outcomes(list_units(settings)).items():
            attributes = trial.user_attrs
            pruned = trial.state == TrialState.PRUNED and trial.intermediate_values
            value = max(trial.intermediate_values.values()) if pruned else (trial.values or [None])[0]
            rows.append(
                {
                    "model_type": unit.model_type,
                    "unit": int(unit.name),
                    "state": "failed" if "failure" in attributes else trial.state.name.lower(),
                    "val_accuracy": value,
                    "params": attributes.get("params"),
                    "epochs": attributes.get("epochs", 0),
                    "max_epochs": settings.sweep.trial_epochs,
                    "seconds": attributes.get("seconds"),
                    "values": json.dumps(attributes.get("values", {})),
                    "failure": attributes.get("failure"),
                }
            )
    return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))


def rank_importance(study: Study, settings: Parameters) -> pd.DataFrame:
    """`IMPORTANCE_COLUMNS`: each hyperparameter's share of the variance of the validation accuracy, by model type."""
    rows = []
    for model_type in settings.sweep.model_types if settings.sweep.mode == "search" else ():
        part = study.part("search", model_type)
        done = [trial for trial in part.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
        if len(done) < TRIALS_FOR_IMPORTANCE or len({trial.values[0] for trial in done}) < 2:
            logger.info(
                "%s: %s finished, which is too few for the importance of hyperparameters",
                model_type,
                count_of(len(done), "trial"),
            )
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(
            part, evaluator=evaluator, target=lambda trial: trial.values[0]
        )
        rows += [{"model_type": model_type, "parameter": name, "importance": share} for name, share in shares.items()]
    return pd.DataFrame(rows, columns=list(IMPORTANCE_COLUMNS))
