"""What happens before Kedro: commands that are refused, and two that are mended."""

import os
import signal
import subprocess
import sys

import pytest

from collective_pipeline import startup


@pytest.fixture(autouse=True)
def _own_excepthook(monkeypatch):
    """What a command makes of errors is no other test's."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.parametrize("command", ["run", "registry", "mlflow"])
def test_command_outside_of_a_project_is_one_sentence(command, tmp_path, monkeypatch):
    """It says where one is, and where to go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kedro", command])
    with pytest.raises(SystemExit, match=f"is not inside a Kedro project, so there is nothing to {command}"):
        startup.prepare()


def test_viz_alone_shows_the_graph(tmp_path, monkeypatch):
    """`kedro viz` is `kedro viz run`, and the environment's own programs are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kedro", "viz"])
    monkeypatch.setenv("PATH", "/usr/bin")
    startup.prepare()

    assert sys.argv == ["kedro", "viz", "run"]
    assert os.environ["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)  # noqa: PTH120


@pytest.mark.parametrize("given", [["--env", "debugg"], ["--env=debugg"], ["-e", "debugg"]])
def test_an_environment_without_a_folder_is_refused_in_one_sentence(given, tmp_path, new_project, monkeypatch):
    """With the nearest and all there are, from any folder of the project."""
    project = new_project(tmp_path)
    monkeypatch.chdir(project / "conf")
    known = ", ".join(sorted(folder.name for folder in (project / "conf").iterdir() if folder.is_dir()))
    told = f"Error: there is no environment 'debugg' (no folder conf/debugg): did you mean 'debug'? choose from {known}"
    monkeypatch.setattr(sys, "argv", ["kedro", "run", *given, "--pipeline", "imagenet"])
    with pytest.raises(SystemExit) as refused:
        startup.prepare()

    assert refused.value.code == told and "base, debug" in known


@pytest.mark.parametrize("given", [["--env", "debug"], ["--env=base"], ["--env", "own", "--conf-source", "elsewhere"]])
def test_an_environment_with_a_folder_is_taken(given, tmp_path, new_project, monkeypatch):
    """So is one of another source of configuration, into which only Kedro looks."""
    monkeypatch.chdir(new_project(tmp_path))
    startup.check_environment(given)


def test_two_params_are_refused():
    """Click would keep the last, and the run would be another than the one that was meant."""
    with pytest.raises(SystemExit, match="there are two --params, of which only one would count"):
        startup.check_command.before_command_run(["run", "--params", "seeds=1", "--params", "resume=true"])


def test_what_kedro_run_refuses_the_package_as_a_command_refuses_in_the_same_sentence(tmp_path):
    """Kedro's hook does not hear of it."""
    command = [sys.executable, "-m", "collective_pipeline", "--pipelines", "phase1,single"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert told.returncode == 1
    assert told.stderr.strip() == "Error: phase1 and single cannot run as one: give each a command of its own"


@pytest.mark.parametrize(("before", "after"), [(None, "32"), ("4", "4")])
def test_a_gpu_gives_each_stream_a_queue_of_its_own(before, after):
    """Set before anything uses CUDA, and what the user has set stays."""
    given = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    given |= {} if before is None else {"CUDA_DEVICE_MAX_CONNECTIONS": before}
    script = "import collective_pipeline, os; print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])"
    told = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=True)

    assert told.stdout.strip() == after


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("KeyboardInterrupt", -signal.SIGINT, ["", "Stopped by SIGINT before anything was done."]),
        ("ImportError('torch')", 1, ["Traceback (most recent call last):", "ImportError: torch"]),
    ],
)
def test_ctrl_c_during_imports_is_one_sentence(error, code, told):
    """Whoever started it sees that a signal ended it; of what fails, all is told."""
    script = (
        "import sys; from collective_pipeline import startup\n"
        f"def importing(): raise {error}\n"
        "startup.quieten = importing; sys.argv = ['kedro', 'info']; startup.prepare()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    lines = ended.stderr.splitlines()
    assert ended.returncode == code and [lines[0], lines[-1]] == told
    assert len(lines) == 2 or code == 1


def test_ctrl_c_during_the_imports_of_what_torchrun_starts_is_one_sentence():
    """Kedro loads no plugins there."""
    script = """
import runpy, sys
class Stopping:
    def find_spec(name, *where):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stopping)
runpy.run_module("collective_pipeline", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.splitlines() == ["", "Stopped by SIGINT before anything was done."]


def test_a_command_starts_without_what_only_its_end_needs():
    """These would be a fifth of the start of every command, also of one that is refused."""
    script = "import sys, collective_pipeline.hooks, collective_pipeline.pipeline_registry; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert not {"scipy.stats", "sklearn", "plotly.offline"} & set(told.stdout.split())
