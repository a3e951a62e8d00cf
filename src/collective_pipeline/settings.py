"""What Kedro starts with."""

from pathlib import Path

from kedro.config import OmegaConfigLoader

from collective_pipeline.hooks import CheckBeforeRun, PlainErrors, TellAnswer, TrackArms

# pluggy calls the last one first.
HOOKS = (TellAnswer(), TrackArms(), CheckBeforeRun(), PlainErrors())

CONFIG_LOADER_CLASS = OmegaConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # Without it, an environment or `--params training.epochs=3` would wipe the rest of `training`.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
    # MLflow's database stands beside the project, from whatever folder Kedro is called.
    "custom_resolvers": {"project_root": Path(__file__).parents[2].as_posix},
}
