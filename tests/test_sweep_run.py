"""`kedro run --pipeline sweep` as a user types it, on a few hundred images."""

import json
import shlex
import signal

import mlflow
import pandas as pd
import pytest
from tests.test_run import TINY, as_params, kedro, runs_of

from collective_pipeline.evaluation.comparison import OVERALL_COLUMNS, RUN_COLUMNS, SIZE_COLUMNS
from collective_pipeline.training import interrupt, train
from collective_pipeline.tuning import work

REPORTING = "data/08_reporting/sweep"
SWEEP = TINY | {"sweep.model_types": "collective shallow", "sweep.sizes": "60000 90000"}


@pytest.fixture(scope="module")
def grid(tmp_path_factory, new_project):
    """A grid of two types and two sizes; the folder and what was printed."""
    project = new_project(tmp_path_factory.mktemp("grid"))
    result = kedro(project, "run", "--pipeline", "sweep", "--env", "debug", "--params", as_params(SWEEP))
    assert result.exit_code == 0, result.output
    return project, result


def test_a_grid_leaves_tables_figures_and_a_report(grid):
    project, result = grid
    folder = project / REPORTING
    runs, comparison = (pd.read_csv(folder / f"{name}.csv") for name in ("runs", "comparison"))

    assert tuple(runs) == RUN_COLUMNS and len(runs) == 8
    assert tuple(comparison) == SIZE_COLUMNS and len(comparison) == 4
    assert tuple(pd.read_csv(folder / "overall.csv")) == OVERALL_COLUMNS
    assert ((runs["params"] - runs["target_params"]).abs() <= 0.001 * runs["target_params"]).all()
    told = json.loads((folder / "summary.json").read_text())["answer"]
    assert told in result.stdout and told.split(";")[0] in (folder / "report.html").read_text()
    for name in ("accuracy", "loss", "differences", "efficiency", "pareto", "trials", "pruning", "importance"):
        assert json.loads((folder / f"{name}.json").read_text())["layout"]["title"]


def test_a_grid_is_one_run_in_mlflow_with_one_for_each_training(grid):
    runs = runs_of(grid[0])
    study = runs[runs["tags.study"] == "grid-mnist"]
    trials = runs[runs["tags.mlflow.parentRunId"] == study["run_id"].item()]

    assert set(runs["status"]) == {"FINISHED"}
    assert sorted(trials["tags.mlflow.runName"]) == [
        f"grid {model_type} {size}" for model_type in ("collective", "shallow") for size in ("60,000", "90,000")
    ]
    assert (trials["tags.trial_state"] == "complete").all()
    assert trials["metrics.final/test_accuracy"].notna().all() and trials["metrics.val/accuracy"].notna().all()


def test_the_same_command_trains_nothing_again_and_other_settings_are_refused(grid):
    project, _ = grid
    before = pd.read_csv(project / REPORTING / "runs.csv")
    again = kedro(project, "run", "--pipeline", "sweep", "--env", "debug", "--params", as_params(SWEEP))
    other = SWEEP | {"training.epochs": 1}
    refused = kedro(project, "run", "--pipeline", "sweep", "--env", "debug", "--params", as_params(other))

    assert again.exit_code == 0, again.output
    pd.testing.assert_frame_equal(pd.read_csv(project / REPORTING / "runs.csv"), before)
    assert refused.exit_code == 1
    assert "training.epochs was 2 and is 1" in refused.output and "sweep.fork=true" in refused.output
    runs = runs_of(project)
    workers = runs[runs["tags.mlflow.runName"] == "worker of grid-mnist"]
    assert len(workers) == 1 and workers["tags.mlflow.parentRunId"].notna().all()


def test_a_sweep_without_room_for_its_states_is_refused(grid, monkeypatch):
    """In the folder of the states, before anything is trained."""
    usage = type("Usage", (), {"free": 70 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage())
    params = as_params(SWEEP | {"sweep.sizes": "60000 900000"})
    result = kedro(grid[0], "run", "--pipeline", "sweep", "--env", "debug", "--params", params)

    assert result.exit_code == 1
    assert "data/06_models has 70 MB of room and this run may write 146 MB" in result.output


def test_a_training_that_was_stopped_goes_on_in_the_same_run_of_mlflow(tmp_path, new_project, monkeypatch):
    """With every epoch once."""
    project = new_project(tmp_path)
    command = ("run", "--pipeline", "sweep", "--env", "debug", "--params", as_params(SWEEP | {"sweep.sizes": 60000}))
    with monkeypatch.context() as patch:
        tell = train._ArmTraining.tell

        def stop(self, epoch):
            tell(self, epoch)
            interrupt.request(interrupt.Interrupted("told to stop"))

        patch.setattr(train._ArmTraining, "tell", stop)
        assert kedro(project, *command).exit_code == 128 + signal.SIGTERM
    before = runs_of(project)
    assert kedro(project, *command).exit_code == 0
    runs = runs_of(project)
    trials = runs[runs["tags.stage"] == "grid"]

    (stopped,) = before.loc[(before["tags.stage"] == "grid") & (before["status"] == "KILLED"), "run_id"]
    assert sorted(trials["tags.model_type"]) == ["collective", "shallow"] and stopped in set(trials["run_id"])
    assert set(trials["status"]) == {"FINISHED"}
    for run_id in trials["run_id"]:
        curve = mlflow.MlflowClient().get_metric_history(run_id, "val/accuracy")
        assert [point.step for point in curve] == [1, 2]


def test_a_search_tracks_pruned_trials_as_finished(tmp_path, new_project):
    """Every trial is a run of its own; what was pruned says so, and nothing failed."""
    project = new_project(tmp_path)
    search = SWEEP | {"sweep.mode": "search", "sweep.trials": 4, "sweep.trial_epochs": 3}
    result = kedro(project, "run", "--pipeline", "sweep", "--env", "debug", "--params", as_params(search))

    assert result.exit_code == 0, result.output
    trials = pd.read_csv(project / REPORTING / "trials.csv")
    assert len(trials) == 8 and set(trials["state"]) <= {"complete", "pruned"}
    runs = runs_of(project)
    assert set(runs["status"]) == {"FINISHED"}
    tracked = runs[runs["tags.stage"] == "search"]
    assert sorted(tracked["tags.trial_state"]) == sorted(trials["state"])
    assert (runs["tags.stage"] == "final").sum() == 2
    page = (project / REPORTING / "report.html").read_text()
    assert "not matched in size" in result.stdout and "not matched in size" in page and "at any size" not in page

    # The best of each type, trained anew, can be taken away: as a model of MLflow, and as a file for `predict`.
    finals = runs[runs["tags.stage"] == "final"]
    assert sorted(finals["tags.model_type"]) == ["collective", "shallow"]
    model = mlflow.pyfunc.load_model(f"runs:/{finals['run_id'].iloc[0]}/model")
    assert len(model.predict(model.input_example)) == 2
    [file] = (project / "data/06_models/sweep").glob("search-mnist-*/final/shallow/*.safetensors")
    assert f"  shallow: {file.relative_to(project)}" in result.stdout
    assert str(file.relative_to(project)) in page
    (command,) = (line for line in result.stdout.split("\n") if line.startswith("To use one: kedro "))
    typed = command.replace("photos/", "data/01_raw/mnist/t10k-images-idx3-ubyte.gz")
    told = kedro(project, *shlex.split(typed.removeprefix("To use one: kedro ")))
    assert told.exit_code == 0, told.output


def test_a_result_that_was_not_told_any_more_has_one_model_all_the_same(tmp_path, new_project, monkeypatch):
    """Killed after the model was kept and before the study knew: what goes on keeps it again, in its place."""
    project = new_project(tmp_path)
    search = SWEEP | {"sweep.model_types": "shallow", "sweep.mode": "search", "sweep.trials": 1}
    command = ("run", "--pipeline", "sweep", "--env", "debug", "--params", as_params(search))
    with monkeypatch.context() as patch:
        end = work.Worker._end

        def die(self, claim, pruner, **outcome):
            if claim.unit.stage == "final":
                raise OSError("killed")
            end(self, claim, pruner, **outcome)

        patch.setattr(work.Worker, "_end", die)
        assert kedro(project, *command).exit_code == 1
    assert kedro(project, *command).exit_code == 0
    runs = runs_of(project)
    (final,) = runs.loc[runs["tags.stage"] == "final", "run_id"]
    models = mlflow.search_logged_models(runs["experiment_id"].unique().tolist())

    assert list(models["source_run_id"]) == [final]
    assert len(mlflow.pyfunc.load_model(f"runs:/{final}/model").metadata.signature.inputs.inputs) == 1
    assert len(list(project.rglob("final/shallow/*.safetensors"))) == 1
    assert not list(project.rglob("*.run"))
