"""What happens around a command of Kedro, before it loads a project; `pyproject.toml` names both entry points."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from kedro.framework.cli.hooks import cli_hook_impl
from kedro.framework.project import pipelines
from kedro.utils import find_kedro_project

from collective_pipeline.config import suggest


def prepare() -> None:
    """Refuse a command outside of a project or for no environment, mend two, silence what nobody can act on."""
    sys.excepthook = tell_error
    # Kedro itself would only say that there is no such command.
    if sys.argv[1:2] in (["run"], ["registry"], ["catalog"], ["mlflow"]) and find_kedro_project(Path.cwd()) is None:
        sys.exit(
            f"Error: {Path.cwd()} is not inside a Kedro project, so there is nothing to {sys.argv[1]}: change to the "
            "folder of collective-pipeline (the one with pyproject.toml and conf/) and try again"
        )
    # Of other commands, such as `kedro new`, -e is something else.
    if sys.argv[1:2] in (["run"], ["catalog"], ["mlflow"], ["viz"]):
        check_environment(sys.argv[2:])
    # `kedro viz` is what people type; since Kedro-Viz 6 it only prints its help.
    if sys.argv[1:] == ["viz"]:
        sys.argv.append("run")
    # `kedro mlflow ui` looks for mlflow on the PATH, where it is only if this environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quieten()


def check_environment(arguments: Sequence[str]) -> None:
    """Refuse an environment without a folder in conf/, for which Kedro would end with a traceback.

    Args:
        arguments: Of a command; what `--conf-source` names is left to Kedro.
    """
    project = find_kedro_project(Path.cwd())
    if project is None or any(argument.split("=")[0] == "--conf-source" for argument in arguments):
        return
    for name in _values_of(arguments, "--env", "-e"):
        if not (project / "conf" / name).is_dir():
            known = sorted(folder.name for folder in (project / "conf").iterdir() if folder.is_dir())
            sys.exit(f"Error: there is no environment '{name}' (no folder conf/{name}){suggest(name, known)}")


def _values_of(arguments: Sequence[str], *options: str) -> list[str]:
    """What is given for an option of these names, behind it or behind its equals sign."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return [after for word, after in pairwise(words) if word in options]


def tell_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for Ctrl-C in the seconds of imports: once a command runs, click or the run hears of it.

    The first second is Kedro's own: nobody else's code is there before. Python ends with the signal all the same,
    which a shell calls 130.
    """
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("\nStopped by SIGINT before anything was done.\n")
    else:
        sys.__excepthook__(kind, error, trace)


def quieten() -> None:
    """Silence what libraries say about each other on every command, and that no user can act on."""
    # kedro 1.7 calls omegaconf 2.4 by a name that it deprecates.
    warnings.filterwarnings("ignore", message=r"\s*register_new_resolver\(\) is deprecated")
    # `kedro run --pipeline` is what people type; Kedro takes `--pipelines` as well.
    warnings.filterwarnings("ignore", message="Option '--pipeline' is deprecated")
    # A comparison reads the datasets of its arms, whose names have the dots of their namespaces.
    warnings.filterwarnings("ignore", message="One or more dataset names contain '.' characters")
    # mlflow about a class of kedro-mlflow, past any filter; every command imports it, so it may as well be here.
    with warnings.catch_warnings(record=True):
        import kedro_mlflow.mlflow  # noqa: F401, PLC0415
    # Both tell about every monitor, resolver and run that they start; their warnings stay.
    for name in ("mlflow", "kedro_mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It would tell every two seconds that a laptop's card does not tell its power.
    logging.getLogger("mlflow.system_metrics.metrics.gpu_monitor").setLevel(logging.ERROR)


class CheckCommand:
    """Refuse in one sentence what Kedro would end with a traceback for, or would take for something else."""

    @cli_hook_impl
    def before_command_run(self, command_args: list[str]) -> None:
        """Look at the names of the pipelines and at the parameters of a `run`."""
        if command_args[:1] != ["run"]:
            return
        if sum(argument.split("=")[0] == "--params" for argument in command_args) > 1:
            # Click would keep the last one, and the run would be another than the one that was meant.
            sys.exit("Error: there are two --params, of which only one would count: join them with a comma into one")
        given = _values_of(command_args, "--pipeline", "--pipelines", "-p")
        names = [name for listed in given for name in listed.split(",")]
        for name in names:
            if name not in pipelines:
                known = [known for known in pipelines if not known.startswith("_")]
                sys.exit(f"Error: there is no pipeline '{name}'{suggest(name, known)}")
        if len(names) > 1:
            # They have nodes in common, and some the files of their arms.
            sys.exit(f"Error: {' and '.join(names)} cannot run as one: give each a command of its own")


check_command = CheckCommand()
