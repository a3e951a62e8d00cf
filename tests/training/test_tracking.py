"""MLflow's database: made once, and no run in it that nobody is left to end."""

import subprocess
import sys

import mlflow
import pytest

from collective_pipeline.training.tracking import end_runs_of_the_dead, process_tags, set_up_store

# What MLflow and its database say to each other is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def client(tmp_path):
    """Of a database of the test's own."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def test_what_a_killed_process_left_as_running_is_failed_and_nothing_else(client):
    """Not what lives, runs on another machine, or says nothing of itself."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    own = process_tags()
    came_again = own | {"began": str(float(own["began"]) - 3600)}
    tags = [own | {"pid": str(ended.pid)}, came_again, own, own | {"host": "elsewhere", "pid": str(ended.pid)}, {}]
    experiment = client.create_experiment("runs", artifact_location="unused")
    runs = [client.create_run(experiment, tags=about).info.run_id for about in tags]
    end_runs_of_the_dead(experiment)

    assert [client.get_run(run).info.status for run in runs] == [
        "FAILED", "FAILED", "RUNNING", "RUNNING", "RUNNING",
    ]  # fmt: skip


def test_first_commands_at_once_make_one_database(tmp_path):
    """Without waiting for each other, one of them fails to make the tables that the other is making."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    script = f"from collective_pipeline.training.tracking import set_up_store; set_up_store({uri!r})"
    commands = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stderr=subprocess.PIPE) for _ in range(2)
    ]
    told = [command.communicate()[1].decode() for command in commands]

    assert [command.returncode for command in commands] == [0, 0], told


def test_a_server_makes_its_own_tables():
    set_up_store("http://127.0.0.1:9")
