"""`kedro run --pipeline lr_finder` as a user types it, on a few hundred images."""

import json

import mlflow
import pandas as pd
import pytest
from tests.test_imagenet_run import write_tree
from tests.test_run import kedro

REPORTING = "data/08_reporting/lr_finder"
COMMAND = ("run", "--pipeline", "lr_finder", "--env", "debug", "--params")
TINY = "lr_finder.updates=20,tiny_imagenet.width=2,deepmoe.width=2,lr_finder.lowest=1e-5"


@pytest.fixture(scope="module")
def project(tmp_path_factory, new_project):
    return new_project(tmp_path_factory.mktemp("lr_finder"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The parameters of a few image files."""
    return f",imagenet.folder={write_tree(tmp_path_factory.mktemp('tree'))},imagenet.val_fraction=0.1,imagenet.width=4"


@pytest.mark.parametrize(
    ("of", "name", "parameter"),
    [
        ("tiny_imagenet", "plain", "tiny_imagenet.training.learning_rate"),
        ("deepmoe", "resnet18_moe", "deepmoe.training.learning_rate"),
        ("single,model_type=shallow", "shallow", "training.learning_rate"),
        ("imagenet", "resnet18", "imagenet.training.learning_rate"),
    ],
)
def test_a_rate_is_found_for_the_first_arm_of_each(project, tree, of, name, parameter):
    """Files, answer and MLflow; nothing of what is trained otherwise."""
    result = kedro(project, *COMMAND, f"{TINY},lr_finder.experiment={of}{tree if of == 'imagenet' else ''}")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(project / REPORTING / "lr_finder.csv")
    summary = json.loads((project / REPORTING / "summary.json").read_text())
    page = (project / REPORTING / "report.html").read_text()

    assert tuple(table.columns) == ("rate", "loss", "smoothed") and 5 < len(table) <= 20
    assert summary["model_type"] == name and summary["parameter"] == parameter
    assert summary["suggested_rate"] is None or summary["suggested_rate"] in table["rate"].tolist()
    assert summary["answer"] in result.stdout and summary["answer"] in page
    assert result.stdout.strip().endswith(f"Report: {REPORTING}/report.html")
    assert json.loads((project / REPORTING / "rates.json").read_text())["data"][0]["type"] == "scatter"
    assert not (project / "data/06_models").exists()


def test_mlflow_has_the_curve_and_the_files(project):
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    client = mlflow.MlflowClient()
    newest = mlflow.search_runs(search_all_experiments=True, order_by=["start_time DESC"]).iloc[0]
    table = pd.read_csv(project / REPORTING / "lr_finder.csv")
    curve = [metric.value for metric in client.get_metric_history(newest["run_id"], "lr_finder/loss")]

    assert curve == pytest.approx(table["loss"].tolist()) and newest["status"] == "FINISHED"
    assert "reporting/report.html" in [file.path for file in client.list_artifacts(newest["run_id"], "reporting")]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ("lr_finder.experiment=phase1", "lr_finder.experiment='phase1' is unknown"),
        ("lr_finder.lowest=2", "lowest=2 is not below highest=1"),
        ("training.learning_rate=0.1", "it is a parameter of --pipeline single, phase1, sweep"),
        ("tiny_imagenet.seeds=7", "it is a parameter of --pipeline tiny_imagenet"),
        ("sweep.mode=grid", "it is a parameter of --pipeline sweep"),
        ("tiny_imagenet.training.batch_size=1000", "batch_size=1000 is more than the 540 training images"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(project, params, told):
    result = kedro(project, *COMMAND, params)

    assert result.exit_code == 1
    assert told in result.output and "Traceback" not in result.output
