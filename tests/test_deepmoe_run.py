"""`kedro run --pipeline deepmoe` as a user types it, on a few hundred images."""

import json

import mlflow
import pandas as pd
import pytest
from tests.test_run import as_params, kedro, runs_of

REPORTING = "data/08_reporting/deepmoe"
# Without an offset about half of the gates are shut from the start.
TINY = {
    "deepmoe.training.batch_size": 64,
    "deepmoe.training.expert_analysis_interval": 2,
    "deepmoe.width": 2,
    "deepmoe.narrow": 0.5,
    "deepmoe.gates.offset": 0.0,
    "comparison.resamples": 200,
}


@pytest.fixture(scope="module")
def gated(tmp_path_factory, new_project):
    """A run of the debug environment; the folder and what was printed."""
    project = new_project(tmp_path_factory.mktemp("deepmoe"))
    result = kedro(project, "run", "--pipeline", "deepmoe", "--env", "debug", "--params", as_params(TINY))
    assert result.exit_code == 0, result.output
    return project, result


def test_the_gated_network_is_compared_to_the_one_without_gates(gated):
    project, result = gated
    comparison = pd.read_csv(project / REPORTING / "comparison.csv").set_index("model_type")
    runs = pd.read_csv(project / REPORTING / "runs.csv")

    assert list(comparison.index) == ["resnet18_moe", "resnet18", "narrow"]
    assert comparison.loc["narrow", "params"] < comparison.loc["resnet18", "params"]
    assert runs.groupby("model_type")["seed"].apply(list).to_dict() == {
        "resnet18_moe": [42, 43],
        "resnet18": [42, 43],
        "narrow": [42, 43],
    }
    answer = json.loads((project / REPORTING / "summary.json").read_text())["answer"]
    assert "the resnet18_moe is better than the 2 other arms" in answer
    assert "minus resnet18_moe" in result.stdout
    page = (project / REPORTING / "report.html").read_text()
    assert "Is resnet18_moe better? mnist" in page and "Test accuracy against executed multiply-adds" in page


def test_what_closed_gates_leave_is_counted_for_each_seed(gated):
    runs = pd.read_csv(gated[0] / REPORTING / "runs.csv").set_index("model_type")
    gates, dense = runs.loc["resnet18_moe"], runs.loc["resnet18"]

    assert (dense["executed_macs"] == dense["macs"]).all()
    assert (gates["executed_macs"] < gates["macs"]).all() and (gates["executed_macs"] > 0).all()


def test_gates_learn_in_a_first_stage_and_stay_in_a_second(gated):
    history = pd.read_parquet(gated[0] / "data/07_model_output/deepmoe_gated/history.parquet")

    assert history.groupby("phase", sort=False)["epoch"].unique().map(list).to_dict() == {
        "train": [1, 2],
        "freeze_gates": [3],
    }
    assert history["train_open_gates"].between(0, 100).all()


def test_gates_are_told_layer_by_layer_and_class_by_class(gated):
    project, _ = gated
    units, classes = (
        pd.read_csv(project / REPORTING / f"{name}.csv") for name in ("expert_analysis", "expert_analysis_by_class")
    )
    runs = pd.read_csv(project / REPORTING / "runs.csv")

    assert len(units) == 2 * 16 and len(classes) == 2 * 16 * 10
    assert (units["information_bits"] >= -1e-9).all() and units["gate_pct"].between(0, 100).all()
    # The test images have the same number of each class.
    means = classes.groupby(["seed", "unit"])["gate_pct"].mean()
    assert means.to_dict() == pytest.approx(units.set_index(["seed", "unit"])["gate_pct"].to_dict())
    assert (units.groupby("seed")["gate_pct"].mean() < 100).all() and len(runs) == 6
    page = (project / REPORTING / "report.html").read_text()
    assert "Experts by class, seed 42" in page and "layer 16" in page
    assert json.loads((project / REPORTING / "expert_analysis.json").read_text())["data"][0]["type"] == "heatmap"
    # Layers say nothing alone, and so nothing of them is told together.
    assert "At least one right alone" not in page and "Sample predictions, seed 42" in page


def test_what_skipping_shut_gates_saves_is_measured(gated):
    table = pd.read_csv(gated[0] / REPORTING / "skipping.csv")

    assert list(table["batch_size"]) == [1, 32, 512] and (table.filter(like="_ms") > 0).all(axis=None)
    assert "Shut gates skipped, on this device" in (gated[0] / REPORTING / "report.html").read_text()


def test_gates_are_looked_at_while_they_are_trained(gated):
    """By default after ten epochs; here after the second of three, in a run of its own folder in MLflow."""
    runs, client = runs_of(gated[0]), mlflow.MlflowClient()
    arms = runs[runs["tags.mlflow.parentRunId"].notna()].set_index("tags.model_type")
    logged = {
        name: [file.path for file in client.list_artifacts(arm["run_id"], "expert_analysis")]
        for name, arm in arms.iterrows()
    }

    pages = ["expert_analysis/epoch_0002.html", "expert_analysis/epoch_0002_samples.html"]
    assert logged == {"resnet18_moe": pages, "resnet18": [], "narrow": []}


def test_both_arms_are_runs_in_mlflow(gated):
    runs = runs_of(gated[0])
    arms = runs[runs["tags.mlflow.parentRunId"].notna()].set_index("tags.model_type")

    assert set(arms.index) == {"resnet18_moe", "resnet18", "narrow"} and set(arms["status"]) == {"FINISHED"}
    assert (arms["metrics.final/executed_macs"] <= arms["metrics.final/macs"]).all()


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ("deepmoe.model=resnet18", "has no gates"),
        ("deepmoe.model=resnet18_mo", "resnet18_moe"),
        ("deepmoe.training.epochs=1", "freeze_epochs=1 leaves the gates none"),
        ("deepmoe.stem=imagenet,deepmoe.model=vgg11_moe", "28x28 pixels are too small"),
        ("deepmoe.gates.lambda=1", "lambda_val"),
        ("deepmoe.training.strategy=layerwise_autoencoding", "only a collective has members"),
        ("comparison.reference=resnet18", "comparison.reference"),
        ("seeds=1 2,training.epochs=3", "Error: `seeds` is not read by --pipeline deepmoe: use `deepmoe.seeds`; `trai"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(gated, params, told):
    result = kedro(gated[0], "run", "--pipeline", "deepmoe", "--env", "debug", "--params", params)

    assert result.exit_code == 1
    assert told in result.output and "Traceback" not in result.output
