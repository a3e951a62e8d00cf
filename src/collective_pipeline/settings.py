"""What Kedro starts with."""

from pathlib import Path
from typing import Any

import click
import torch
from kedro.config import OmegaConfigLoader
from kedro.framework.session import KedroSession
from kedro.runner import SequentialRunner, ThreadRunner
from kedro.utils import find_kedro_project

from collective_pipeline.config import MODEL_TYPES
from collective_pipeline.hooks import CheckBeforeRun, LogModels, PlainErrors, StopCleanly, TellAnswer, TrackArms


def project_root() -> str:
    """Where MLflow's database stands, from whichever folder of the project Kedro is called."""
    return (find_kedro_project(Path.cwd()) or Path.cwd()).as_posix()


class Session(KedroSession):
    """Arms side by side on a CUDA device, which one of them would leave idle; in turn anywhere else.

    Each arm trains in a thread and a CUDA stream of its own. `--runner SequentialRunner` trains them in turn there as
    well.
    """

    def run(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        command = click.get_current_context(silent=True)
        named = command is not None and command.params.get("runner")
        if not named and type(options.get("runner") or SequentialRunner()) is SequentialRunner and self._has_cuda():
            options["runner"] = ThreadRunner(max_workers=len(MODEL_TYPES))
            # What is left for the CPU is small, and every arm's thread would bring a team of waiting threads along.
            torch.set_num_threads(1)
        return super().run(*arguments, **options)

    def _has_cuda(self) -> bool:
        device = str(self._get_config_loader()["parameters"].get("device"))
        return torch.cuda.is_available() and device.startswith(("auto", "cuda"))


SESSION_CLASS = Session

# pluggy calls the last one first.
HOOKS = (TellAnswer(), TrackArms(), LogModels(), StopCleanly(), CheckBeforeRun(), PlainErrors())

CONFIG_LOADER_CLASS = OmegaConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # Without it, an environment or `--params training.epochs=3` would wipe the rest of `training`.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
    "custom_resolvers": {"project_root": project_root},
}
