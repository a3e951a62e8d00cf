"""What Kedro starts with."""

from pathlib import Path

from kedro.config import OmegaConfigLoader
from kedro.utils import find_kedro_project

from collective_pipeline.hooks import CheckBeforeRun, PlainErrors, TellAnswer, TrackArms


def project_root() -> str:
    """Where MLflow's database stands, from whichever folder of the project Kedro is called."""
    return (find_kedro_project(Path.cwd()) or Path.cwd()).as_posix()


# pluggy calls the last one first.
HOOKS = (TellAnswer(), TrackArms(), CheckBeforeRun(), PlainErrors())

CONFIG_LOADER_CLASS = OmegaConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # Without it, an environment or `--params training.epochs=3` would wipe the rest of `training`.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
    "custom_resolvers": {"project_root": project_root},
}
