"""From a search space to the settings of a trial."""

from typing import Any

import optuna

from collective_pipeline.config import ModelType, Parameters, Range, Space, UserError, with_values


def space_of(space: Space, model_type: ModelType) -> Space:
    """What is searched for arms of this type: of the collective's and the single networks' own knobs only theirs."""
    foreign = "baselines." if model_type == "collective" else "collective."
    return {name: values for name, values in space.items() if not name.startswith(foreign)}


def check_space(settings: Parameters) -> None:
    """Every choice and end of a range is a value that its parameter can have.

    Raises:
        UserError: Naming the first that is not.
    """
    try:
        with_values(settings, {"training.epochs": settings.sweep.trial_epochs})
    except UserError as error:
        raise UserError(f"sweep.trial_epochs={settings.sweep.trial_epochs}: {error}") from None
    for name, values in settings.sweep.space.items():
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            try:
                with_values(settings, {name: value})
            except UserError as error:
                raise UserError(f"sweep.space: {error}") from None
    for model_type in settings.sweep.model_types:
        if not space_of(settings.sweep.space, model_type):
            raise UserError(f"sweep.space has nothing to search for {model_type}: add a training.* parameter")


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """A value for every name of `space`."""
    return {name: _suggest(trial, name, values) for name, values in space.items()}


def _suggest(trial: optuna.Trial, name: str, values: Range | tuple[Any, ...]) -> Any:
    if not isinstance(values, Range):
        # Optuna stores choices as they are if they are plain; a list of widths is told by its place.
        if all(isinstance(value, bool | int | float | str | None) for value in values):
            return trial.suggest_categorical(name, values)
        return values[trial.suggest_int(name, 0, len(values) - 1)]
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, step=int(values.step or 1), log=values.log)
    return trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
