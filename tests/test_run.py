"""Whole runs as a user starts them: what they leave, what they say, and what they refuse."""

import errno
import importlib.metadata
import itertools
import json
import logging
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock
from kedro.framework.cli.cli import KedroCLI
from PIL import Image
from plotly.offline import get_plotlyjs
from tests.conftest import wait_until
from tests.evaluation.test_results import FIELDS

from collective_pipeline.config import MODEL_TYPES, UserError
from collective_pipeline.data.small_images import IDX_FILES, IDX_IMAGES, IDX_LABELS, read_idx
from collective_pipeline.evaluation.comparison import COMPARISON_COLUMNS, RUN_COLUMNS
from collective_pipeline.evaluation.experts import CLASS_COLUMNS, SAMPLE_COLUMNS, SEED_COLUMNS, UNIT_COLUMNS
from collective_pipeline.evaluation.gpu import COST_COLUMNS, GPU_COLUMNS
from collective_pipeline.evaluation.predict import Predictor
from collective_pipeline.models.checkpoint import load_checkpoint
from collective_pipeline.startup import quieten
from collective_pipeline.training import loop, tracking, train

TINY = {"training.epochs": 2, "training.batch_size": 64, "seeds": "1 2", "comparison.resamples": 200}
EXPERT_TABLES = ("expert_analysis", "expert_analysis_by_class", "expert_analysis_by_seed", "sample_predictions")
IMAGES, LABELS = (f"data/01_raw/mnist/{name}.gz" for name in IDX_FILES[2:])
PREDICTIONS = "data/07_model_output/predict/predictions.csv"


def as_params(values: dict[str, object]) -> str:
    """What follows `--params`."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def kedro(project: Path, *arguments: str) -> Result:
    """`kedro ...` in the project's folder, in this process."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # What libraries say to each other is not ours to mend; our own warnings stay errors.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="collective_pipeline")
        quieten()
        patch.chdir(project)
        handlers, level = logging.root.handlers[:], logging.root.level
        try:
            return CliRunner().invoke(KedroCLI(project), list(arguments), prog_name="kedro")
        finally:
            logging.root.handlers[:], logging.root.level = handlers, level
            for name in ("collective_pipeline", "kedro", "kedro_mlflow"):
                logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def project(tmp_path_factory, new_project) -> Path:
    return new_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def phase1(project) -> tuple[Path, Result]:
    """One run of phase 1, on which several promises are checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "SYSTEM_METRICS_SECONDS", 0.01)  # these arms train for less than the usual two seconds
        params = as_params(TINY | {"training.expert_analysis_interval": 1})
        result = kedro(project, "run", "--pipeline", "phase1", "--env", "debug", "--params", params)
    shutil.copytree(project / "data", project / "kept" / "data")  # other tests train the same arms
    return project, result


def runs_of(project: Path) -> pd.DataFrame:
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    return mlflow.search_runs(search_all_experiments=True)


def test_phase1_ends_with_the_answer(phase1):
    """It succeeds, and ends with a sentence, a table of all arms and the report's path."""
    _, result = phase1
    tail = result.stdout

    assert result.exit_code == 0, result.output
    assert "With 2 seeds it cannot be told whether the collective is better" in tail
    assert all(f"{name} " in tail for name in MODEL_TYPES)
    assert " in all, " in tail and " of them training" in tail
    assert tail.strip().endswith("Report: data/08_reporting/phase1/report.html")


def test_phase1_leaves_the_promised_tables(phase1):
    """Exactly the promised columns; a row for each arm and seed; a row for each arm; sizes within a thousandth."""
    folder = phase1[0] / "data" / "08_reporting" / "phase1"
    runs, comparison = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "comparison.csv")

    assert tuple(runs.columns) == RUN_COLUMNS
    assert tuple(comparison.columns) == COMPARISON_COLUMNS
    assert list(comparison["model_type"]) == list(MODEL_TYPES)
    assert sorted(zip(runs["model_type"], runs["seed"], strict=True)) == sorted(
        (m, s) for m in MODEL_TYPES for s in (1, 2)
    )
    assert set(runs["target_params"]) == {559_738}
    assert runs["param_error_pct"].abs().max() <= 0.1
    assert runs["test_accuracy"].between(0, 100).all()
    assert (runs["macs"] > 500_000).all() and (comparison["latency_ms"] > 0).all()


def test_phase1_leaves_report_figures_history_and_checkpoints(phase1):
    """Everything that people's notebooks read is there and can be read."""
    project, _ = phase1
    page = (project / "data/08_reporting/phase1/report.html").read_text()
    summary = json.loads((project / "data/08_reporting/phase1/summary.json").read_text())

    assert summary["answer"].split(",")[0] in page
    assert len(list((project / "data/08_reporting/phase1").glob("*.json"))) == 8
    for arm in MODEL_TYPES:
        history = pd.read_parquet(project / f"data/07_model_output/{arm}/history.parquet")
        (path,) = (project / f"data/06_models/{arm}/best.safetensors").glob("*/best.safetensors")
        assert len(history) == 4 and {"seed", "epoch", "train_loss", "val_accuracy", "val_top5_accuracy"} <= set(
            history
        )
        assert load_checkpoint(path).seeds == (1, 2)
    assert not list(project.rglob("*.partial*"))


def test_phase1_leaves_the_fields_of_the_originals_evaluation(phase1):
    """`results.json`: for every arm means over seeds and each seed by itself, as the tables have them."""
    folder = phase1[0] / "data/08_reporting/phase1"
    told = json.loads((folder / "results.json").read_text())
    runs = pd.read_csv(folder / "runs.csv").set_index(["model_type", "seed"])
    _, labels = raw_test_images(phase1[0])

    assert list(told) == list(MODEL_TYPES)
    for arm, results in told.items():
        assert results.keys() == FIELDS | {"seeds"} and results["total_epochs"] == 2
        assert [seed["seed"] for seed in results["seeds"]] == [1, 2]
        for seed in results["seeds"]:
            row = runs.loc[arm, seed["seed"]]
            assert seed["overall_accuracy"] == seed["final_test_accuracy"] == pytest.approx(row["test_accuracy"])
            assert seed["best_accuracy"] == pytest.approx(row["val_accuracy"])
            # As many test images of each class: their mean is the accuracy of all.
            assert list(seed["class_accuracies"]) == [str(digit) for digit in range(10)]
            means = [seed["class_accuracies"][str(label)] for label in labels]
            assert sum(means) / len(means) == pytest.approx(row["test_accuracy"], abs=1e-3)
            assert seed["early_stopped"] is False and seed["final_train_loss"] > 0


def test_phase1_looks_into_the_members_of_the_collective(phase1):
    """Tables with a row for each seed and member, a heat map and samples for Kedro-Viz, both in the report."""
    folder = phase1[0] / "data/08_reporting/phase1"
    units, classes, seeds, samples = (pd.read_csv(folder / f"{name}.csv") for name in EXPERT_TABLES)
    members = [f"expert {n}" for n in (1, 2)] + [f"analyst {n}" for n in range(1, 7)]

    assert (tuple(units), tuple(classes), tuple(seeds)) == (UNIT_COLUMNS, CLASS_COLUMNS, SEED_COLUMNS)
    assert tuple(samples) == SAMPLE_COLUMNS
    assert units["unit"].tolist() == members * 2 and set(units["model_type"]) == {"collective"}
    assert units["accuracy"].between(0, 100).all() and units["gate_pct"].isna().all()
    assert len(classes) == 2 * 8 * 10 and len(seeds) == 2 and len(samples) == 10 * 8
    best = units.groupby("seed")["accuracy"].max().tolist()
    assert (seeds["oracle_accuracy"] >= best).all()
    page = (folder / "report.html").read_text()
    assert "Experts by class, seed 1" in page and "Sample predictions, seed 1" in page
    for figure, kind in (("expert_analysis", "heatmap"), ("sample_predictions", "image")):
        assert json.loads((folder / f"{figure}.json").read_text())["data"][0]["type"] == kind


def test_heat_maps_and_samples_of_every_epoch_are_in_the_run_of_the_arm_that_has_experts(phase1):
    """They open without a network."""
    client, runs = mlflow.MlflowClient(), runs_of(phase1[0])
    shown = {".html": "Experts by class, seed 1", "_samples.html": "Sample predictions, seed 1"}
    for _, run in runs[runs["tags.mlflow.parentRunId"].notna()].iterrows():
        logged = [file.path for file in client.list_artifacts(run["run_id"], "expert_analysis")]
        epochs = (1, 2) if run["tags.model_type"] == "collective" else ()
        titles = {f"expert_analysis/epoch_{n:04d}{end}": title for n in epochs for end, title in shown.items()}
        assert logged == sorted(titles)
        for path in logged:
            page = Path(client.download_artifacts(run["run_id"], path)).read_text()
            assert titles[path] in page and "cdn.plot.ly" not in page.replace(get_plotlyjs(), "")


def test_phase1_is_tracked(phase1):
    """One MLflow run for the command, one nested run for each arm with parameters, curves and final figures."""
    project, _ = phase1
    runs = runs_of(project)
    parent = runs[runs["tags.mlflow.parentRunId"].isna()]
    nested = runs[runs["tags.mlflow.parentRunId"].notna()]
    comparison = pd.read_csv(project / "data/08_reporting/phase1/comparison.csv").set_index("model_type")

    assert len(parent) == 1
    if (Path(__file__).parents[1] / ".git").exists() and shutil.which("git"):
        assert set(runs["tags.mlflow.source.git.commit"].str.len()) == {40}
    assert sorted(nested["tags.model_type"]) == sorted(MODEL_TYPES)
    assert set(runs["status"]) == {"FINISHED"}
    assert set(nested["params.training.epochs"]) == {"2"} and set(nested["params.collective.n_total"]) == {"8"}
    for _, run in nested.iterrows():
        row = comparison.loc[run["tags.model_type"]]
        assert run["metrics.final/test_accuracy"] == pytest.approx(row["test_accuracy_mean"])
        assert run["metrics.final/param_efficiency"] == pytest.approx(row["param_efficiency"])
        assert run["metrics.final/accuracy_per_million_params"] == pytest.approx(row["accuracy_per_million_params"])
        assert run["metrics.final/model_params"] == row["params"]
        assert len(mlflow.MlflowClient().get_metric_history(run["run_id"], "val/accuracy")) == 2
    assert any(name.startswith("metrics.system/") for name in nested.columns)


def test_every_arm_is_a_model_to_take_away(phase1, monkeypatch):
    """Its MLflow run holds one that answers raw images as the run's evaluation did; for one seed or the mean of all."""
    project, _ = phase1
    images, labels = raw_test_images(project)
    monkeypatch.setattr(sys, "path", sys.path[:])  # MLflow puts the model's code in front
    runs = runs_of(project)
    for _, run in runs[runs["tags.mlflow.parentRunId"].notna()].iterrows():
        model = mlflow.pyfunc.load_model(f"runs:/{run['run_id']}/model")
        results = pd.read_csv(project / f"kept/data/07_model_output/{run['tags.model_type']}/results.csv")
        tables = [model.predict(images[:, None], params={"seed": seed}) for seed in (1, 2)]
        accuracies = [100 * (table["prediction"].astype(int) == labels).mean() for table in tables]
        together = model.predict(images[:, None])
        digits = [str(digit) for digit in range(10)]

        assert accuracies == pytest.approx(results["test_accuracy"].tolist(), abs=1e-3)
        columns = model.metadata.get_output_schema().input_names()
        assert list(together) == columns == ["prediction", "probability", *digits]
        means = (tables[0][digits].to_numpy() + tables[1][digits].to_numpy()) / 2
        assert together[digits].to_numpy() == pytest.approx(means, abs=1e-6)
        assert model.input_example.shape == (2, 1, 28, 28) and model.input_example.dtype == "uint8"
        with pytest.raises(mlflow.MlflowException):
            model.predict(images[:, None] / 255)


def raw_test_images(project: Path) -> tuple[np.ndarray, np.ndarray]:
    """Raw test images `(n, 28, 28)` and their labels."""
    return read_idx(project / IMAGES, IDX_IMAGES), read_idx(project / LABELS, IDX_LABELS)


def predict(project: Path, **params: object) -> Result:
    return kedro(project, "run", "--pipeline", "predict", "--params", as_params(params))


@pytest.fixture
def trained(phase1, tmp_path, new_project) -> Path:
    """A project with the checkpoints of phase 1, and nothing else."""
    project = new_project(tmp_path)
    shutil.copytree(phase1[0] / "kept/data/06_models", project / "data/06_models")
    return project


def test_predict_answers_an_idx_file_as_the_evaluation_did(phase1, trained):
    """The newest checkpoint of the arm; a row for each image, in order, with the probability of every class."""
    _, labels = raw_test_images(trained)
    results = pd.read_csv(phase1[0] / "kept/data/07_model_output/shallow/results.csv").set_index("seed")
    result = predict(trained, images=IMAGES, model_type="shallow", checkpoint_seed=2)
    table = pd.read_csv(trained / PREDICTIONS)

    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"Predictions: {PREDICTIONS}"
    assert list(table) == ["index", "prediction", "probability", *(str(digit) for digit in range(10))]
    assert list(table["index"]) == list(range(100))
    assert 100 * (table["prediction"] == labels).mean() == pytest.approx(results.loc[2, "test_accuracy"], abs=1e-3)
    assert table.iloc[:, 3:].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert set(runs_of(trained)["status"]) == {"FINISHED"}


def test_predict_answers_image_files_as_it_does_their_idx_file(trained):
    """The same bytes, read from PNG files, a checkpoint named by its path, and all seeds together."""
    images, _ = raw_test_images(trained)
    folder = trained / "my images"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    (path,) = (trained / "data/06_models/collective/best.safetensors").glob("*/best.safetensors")
    tables = []
    for params in ({"images": IMAGES}, {"images": "my images", "checkpoint": path}):
        result = predict(trained, **params)
        assert result.exit_code == 0, result.output
        tables.append(pd.read_csv(trained / PREDICTIONS))

    assert list(tables[1]["file"]) == [f"{i:03}.png" for i in range(100)]
    pd.testing.assert_frame_equal(tables[0].drop(columns="index"), tables[1].drop(columns="file"))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({}, "images is not given: give an idx file of images, or a folder of png, jpg or bmp files, with --params"),
        ({"images": "absent"}, "there is no absent: give"),
        ({"images": "conf"}, "conf holds no png, jpg or bmp file"),
        ({"images": LABELS}, "should hold idx images but holds labels"),
        ({"images": IMAGES, "checkpoint": "absent"}, "checkpoint=absent is no file: name a checkpoint, a .safetensors"),
        ({"images": IMAGES, "checkpoint": IMAGES}, "is not a checkpoint of this project"),
        ({"images": IMAGES, "dataset": "cifar10"}, "is of dataset=mnist and not of cifar10: add dataset=mnist"),
        ({"images": IMAGES, "checkpoint_seed": 5}, "this checkpoint of collective has no seed 5: choose from 1, 2"),
        ({"images": IMAGES, "model_type": "dep"}, "model_type='dep' is unknown: did you mean 'deep'?"),
        ({"image": IMAGES}, "unknown parameter 'image': did you mean 'images'?"),
    ],
)
def test_what_predict_cannot_use_is_refused_in_one_sentence(trained, params, sentence):
    """And nothing is written."""
    result = predict(trained, **params)

    assert result.exit_code == 1
    assert sentence in result.output
    assert sum(line.startswith("Error: ") for line in result.stderr.split("\n")) == 1
    assert not (trained / PREDICTIONS).exists()


def test_predict_before_training_says_how_to_train(tmp_path, new_project):
    result = predict(new_project(tmp_path), images=IMAGES, model_type="deep")

    assert result.exit_code == 1
    assert "train it first, kedro run --params model_type=deep,dataset=mnist" in result.output


def test_predict_takes_arm_and_data_set_from_the_file_that_it_is_given(trained):
    (path,) = (trained / "data/06_models/deep/best.safetensors").glob("*/best.safetensors")
    shutil.copy(path, trained / "taken away.safetensors")
    result = predict(trained, images=IMAGES, dataset="cifar10", checkpoint="taken away.safetensors")

    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(trained / PREDICTIONS)) == 100


def test_predict_that_is_stopped_writes_nothing(trained, monkeypatch):
    """It ends after the batch, as the shell expects."""
    original = Predictor.__call__

    def call(self, images):
        signal.raise_signal(signal.SIGTERM)
        return original(self, images)

    monkeypatch.setattr(Predictor, "__call__", call)
    result = predict(trained, images=IMAGES)

    assert result.exit_code == 128 + signal.SIGTERM
    assert "nothing is written of the 100 of 100 images predicted" in result.output
    assert not (trained / PREDICTIONS).exists() and set(runs_of(trained)["status"]) == {"KILLED"}


def test_arms_saw_the_same_batches(phase1):
    """Fair by construction: every arm was given as many epochs and updates of the same learning rate."""
    project, _ = phase1
    plans = {
        tuple(
            pd.read_parquet(project / f"data/07_model_output/{arm}/history.parquet")[
                ["seed", "epoch", "phase", "learning_rate"]
            ].itertuples(index=False, name=None)
        )
        for arm in MODEL_TYPES
    }

    assert len(plans) == 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_kedro_run_trains_the_named_arm(project, model_type):
    """`kedro run --params model_type=...` goes from start to report for each of the seven."""
    result = kedro(
        project, "run", "--env", "debug", "--params", as_params(TINY | {"model_type": model_type, "seeds": 3})
    )
    runs = pd.read_csv(project / "data/08_reporting/single/runs.csv")

    assert result.exit_code == 0, result.output
    assert list(runs["model_type"]) == [model_type] and list(runs["seed"]) == [3]
    assert list((project / f"data/06_models/{model_type}/best.safetensors").glob("*/best.safetensors"))
    # Without experts the tables are there, but empty, and the report says nothing of them.
    folder, has_members = project / "data/08_reporting/single", model_type == "collective"
    assert all(pd.read_csv(folder / f"{name}.csv").empty != has_members for name in EXPERT_TABLES)
    assert ("Experts by class" in (folder / "report.html").read_text()) == has_members
    assert list(json.loads((folder / "results.json").read_text())) == [model_type]


def test_both_spellings_of_pipeline(project):
    """`--pipelines` works as `--pipeline` does."""
    result = kedro(project, "run", "--pipelines", "single", "--env", "debug", "--params", as_params(TINY))

    assert result.exit_code == 0, result.output


is_installed = pytest.mark.skipif(
    not importlib.metadata.entry_points(group="kedro.cli_hooks", name="collective-pipeline"),
    reason="the package lies on the path, but is not installed, so Kedro does not find its hook",
)


@is_installed
@pytest.mark.parametrize("option", ["phase1,single", "single --pipelines=predict"])
def test_several_pipelines_at_once_are_refused(project, option):
    """Kedro would end with a traceback, or run the last one alone."""
    result = kedro(project, "run", "--pipeline", *option.split())

    assert result.exit_code == 1 and "cannot run as one: give each a command of its own" in str(result.exception)


@is_installed
def test_unknown_pipeline_is_refused(project):
    """With the nearest name, and before anything is loaded."""
    result = kedro(project, "run", "--pipeline", "phase2")

    assert result.exit_code == 1
    known = "choose from single, phase1, deepmoe, merged_moe, tiny_imagenet, imagenet, "
    known += "sweep, lr_finder, predict, demo"
    sentence = f"there is no pipeline 'phase2': did you mean 'phase1'? {known}"
    assert sentence in str(result.exception)


def test_a_list_with_commas_is_refused_in_the_words_that_the_readme_explains(project):
    result = kedro(project, "run", "--params", "seeds=1,2")
    told = "Item `2` must contain a key and a value separated by `=`."

    assert result.exit_code == 2 and told in result.output
    assert told in (Path(__file__).parents[1] / "README.md").read_text()


def test_registry_lists_the_pipelines(project):
    """`kedro registry list` names them."""
    result = kedro(project, "registry", "list")

    assert [line.strip("- ") for line in result.stdout.split("\n") if line] == [
        "__default__",
        "deepmoe",
        "demo",
        "imagenet",
        "lr_finder",
        "merged_moe",
        "phase1",
        "predict",
        "single",
        "sweep",
        "tiny_imagenet",
    ]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ("model_typ=deep", "unknown parameter 'model_typ': did you mean 'model_type'?"),
        ("training.epoch=3", "unknown parameter 'training.epoch': did you mean 'training.epochs'?"),
        ("epochs=3", "unknown parameter 'epochs': did you mean 'training.epochs'?"),
        ("model_type=dep", "model_type='dep' is unknown: did you mean 'deep'?"),
        ("dataset=mnits", "dataset='mnits' is unknown: did you mean 'mnist'?"),
        ("training.strategy=D", "training.strategy='D' is unknown"),
        ("training.optimizer=adm", "training.optimizer='adm' is unknown: did you mean 'adam'?"),
        ("training.epochs=0", "training.epochs=0"),
        ("training.batch_size=-1", "training.batch_size=-1"),
        ("training.learning_rate=-0.1", "training.learning_rate=-0.1"),
        ("collective.n_experts=8", "n_experts=8 leaves no analyst among n_total=8 members"),
        ("baselines.target_params=1000,model_type=deep", "the nearest has 843"),
        (
            "training.epochs=2,training.strategy=layerwise_autoencoding",
            "training.epochs=2 is too few for training.strategy",
        ),
        ("training.batch_size=1000", "training.batch_size=1000 is more than the 540 training images"),
        ("device=cuda:99", "device=cuda:99: this machine has"),
        ("seeds=", "seeds"),
        ("deepmoe.seeds=1", "`deepmoe.seeds` is not read by --pipeline single: use `seeds`"),
        ("seeds=1 1", "1 repeated"),
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(project, params, sentence):
    """Exit code 1 and one line that says what, where and what to do."""
    result = kedro(project, "run", "--env", "debug", "--params", params)

    assert result.exit_code == 1
    assert sentence in result.output
    assert len([line for line in result.stderr.split("\n") if line]) == 1


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_bad_data_leaves_nothing_half_written(tmp_path, new_project, damage, monkeypatch):
    """A damaged or missing file is named before any training, and no result is written."""
    project = new_project(tmp_path)
    path = project / "data/01_raw/mnist/t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])

    def no_network(*args):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    result = kedro(project, "run", "--env", "debug", "--params", as_params(TINY))

    assert result.exit_code == 1
    assert ("downloading failed (no network): fetch what is missing from https://" in result.output) == (
        damage == "missing"
    )
    assert "t10k-labels-idx1-ubyte.gz" in result.output
    assert sorted(child.name for child in (project / "data").iterdir()) == ["01_raw"]


def test_overlay_that_the_catalog_cannot_see_is_refused(tmp_path, new_project):
    """A data set or arm named in a parameters.yml would be reported under the files of another."""
    project = new_project(tmp_path)
    (project / "conf" / "local" / "parameters.yml").write_text("dataset: fashion_mnist\n")
    result = kedro(project, "run", "--params", as_params(TINY))

    assert result.exit_code == 1
    assert "dataset is 'fashion_mnist' in a parameters.yml and 'mnist' in globals.yml" in result.output


def test_environment_may_change_arm_and_data_in_its_globals(tmp_path, new_project):
    """There both the settings and the catalog see it."""
    project = new_project(tmp_path)
    (project / "conf" / "debug" / "globals.yml").write_text("model_type: shallow\n")
    result = kedro(project, "run", "--env", "debug", "--params", as_params(TINY))

    assert result.exit_code == 0, result.output
    assert list(pd.read_csv(project / "data/08_reporting/single/runs.csv")["model_type"]) == ["shallow"] * 2


def test_unmatched_budget_writes_nothing(tmp_path, new_project):
    """All arms are matched before any is trained, and nothing is left of those that matched."""
    project = new_project(tmp_path)
    params = as_params(TINY | {"baselines.target_params": 3189})
    result = kedro(project, "run", "--pipeline", "phase1", "--env", "debug", "--params", params)

    assert result.exit_code == 1 and "network has 3,189 parameters within 0.1 %" in result.output
    assert sorted(child.name for child in (project / "data").iterdir()) == ["01_raw"]


def test_disk_that_fills_up_is_one_sentence(project, monkeypatch):
    """The results of before stay, and nothing half-written with them."""
    before = {path: path.read_bytes() for path in (project / "data/08_reporting").rglob("*.csv")}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_csv", full)
    result = kedro(project, "run", "--env", "debug", "--params", as_params(TINY))

    assert result.exit_code == 1
    assert "a result could not be written: No space left on device" in result.output
    assert {path: path.read_bytes() for path in (project / "data/08_reporting").rglob("*.csv")} == before
    assert not list(project.rglob(".*partial*"))


def test_data_folder_that_cannot_be_written_is_refused(tmp_path, new_project):
    """Before any work, and by name; here a file stands where a folder should."""
    project = new_project(tmp_path)
    (project / "data" / "08_reporting").write_text("in the way")
    result = kedro(project, "run", "--env", "debug", "--params", as_params(TINY))

    assert result.exit_code == 1
    assert "08_reporting" in result.output and "cannot be written to" in result.output
    assert not (project / "data" / "06_models").exists()


def test_full_disk_is_told_before_training(project, monkeypatch):
    """With less room than the checkpoints need, nothing starts."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10 * 2**20})())
    result = kedro(project, "run", "--env", "debug", "--params", as_params(TINY))

    assert result.exit_code == 1
    assert "has 10 MB of room and this run may write" in result.output


def test_a_second_command_that_would_train_the_same_arm_is_refused(tmp_path, new_project):
    """Both would write the same files; once the first has ended, the second may."""
    project = new_project(tmp_path)
    command = ("run", "--env", "debug", "--params", as_params(TINY | {"model_type": "shallow"}))
    state = project / "data/06_models/shallow/last.safetensors"
    assert kedro(project, *command).exit_code == 0
    before = {path: path.read_bytes() for path in (project / "data").rglob("*.*") if path.is_file()}
    runs = set(runs_of(project)["run_id"])
    with FileLock(state.with_name(".last.safetensors.lock"), timeout=0):
        result = kedro(project, *command)
        assert result.exit_code == 1 and "another command trains it now and saves in" in result.output
    assert {path: path.read_bytes() for path in before} == before and set(runs_of(project)["run_id"]) == runs
    result = kedro(project, *command)
    assert result.exit_code == 0, result.output


def stop_at(patch: pytest.MonkeyPatch, model_type: str, epoch_number: int) -> None:
    """Send SIGTERM at the end of this epoch, as a scheduler might."""
    original = train._ArmTraining.tell

    def tell(self, epoch):
        original(self, epoch)
        if (self.arm.model_type, epoch.number) == (model_type, epoch_number):
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(train._ArmTraining, "tell", tell)


def results_of(project: Path) -> dict[str, pd.DataFrame]:
    """All tables and histories, without what a clock says."""
    clocks = [
        "train_seconds",
        "samples_per_second",
        "latency_ms",
        "seconds",
        "gpu_seconds",
        *GPU_COLUMNS,
        *COST_COLUMNS,
    ]
    tables = {path.name: pd.read_csv(path) for path in (project / "data/08_reporting/phase1").glob("*.csv")}
    histories = {arm: pd.read_parquet(project / f"data/07_model_output/{arm}/history.parquet") for arm in MODEL_TYPES}
    return {name: table.drop(columns=clocks, errors="ignore") for name, table in (tables | histories).items()}


def test_a_stopped_run_goes_on_and_ends_like_an_unbroken_one(phase1, tmp_path, new_project):
    """SIGTERM ends the command as the shell expects, says how to go on, and marks the tracked runs as killed."""
    expected, project = results_of(phase1[0] / "kept"), new_project(tmp_path)
    command = ("run", "--pipeline", "phase1", "--env", "debug", "--params")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "shallow", 1)
        stopped = kedro(project, *command, as_params(TINY))

    assert stopped.exit_code == 128 + signal.SIGTERM
    told = "stopped by SIGTERM: shallow is saved after epoch 1 of 2\nTo go on: kedro"
    assert told in stopped.output
    assert set(runs_of(project)["status"]) == {"FINISHED", "KILLED"}
    assert not (project / "data/08_reporting").exists()

    other = kedro(project, *command, as_params(TINY | {"resume": "true", "training.epochs": 3}))
    assert other.exit_code == 1 and "training.epochs was 2 and is 3; give the command that" in other.output

    resumed = kedro(project, *command, as_params(TINY | {"resume": "true"}))
    assert resumed.exit_code == 0, resumed.output
    results = results_of(project)
    assert results.keys() == expected.keys()
    for name, table in expected.items():
        pd.testing.assert_frame_equal(results[name], table, check_exact=True)
    assert_goes_on_in_the_same_runs(project)


def assert_goes_on_in_the_same_runs(project: Path) -> None:
    """Every arm has one run in MLflow, now inside that of the last command, with every epoch once and one model."""
    runs = runs_of(project)
    nested = runs[runs["tags.mlflow.parentRunId"].notna()]
    command = runs.loc[runs["tags.mlflow.parentRunId"].isna() & (runs["status"] == "FINISHED"), "run_id"].item()
    models = mlflow.search_logged_models(nested["experiment_id"].unique().tolist())

    assert sorted(nested["tags.model_type"]) == sorted(MODEL_TYPES)
    assert set(nested["status"]) == {"FINISHED"} and set(nested["tags.mlflow.parentRunId"]) == {command}
    assert sorted(models["source_run_id"]) == sorted(nested["run_id"])
    for run_id in nested["run_id"]:
        curve = mlflow.MlflowClient().get_metric_history(run_id, "val/accuracy")
        assert [point.step for point in curve] == [1, 2]


def test_seeds_that_diverge_are_reported(tmp_path, new_project):
    """The run ends with tables and a report all the same; nothing of those seeds is taken for a result."""
    project = new_project(tmp_path)
    params = TINY | {"training.optimizer": "sgd", "training.learning_rate": "1e30", "training.clip_norm": "null"}
    result = kedro(project, "run", "--env", "debug", "--params", as_params(params))
    runs = pd.read_csv(project / "data/08_reporting/single/runs.csv")

    assert result.exit_code == 0, result.output
    assert "There is no result: collective diverged with every seed." in result.output
    assert runs["diverged"].all() and runs["test_accuracy"].isna().all() and set(runs["best_epoch"]) == {0}
    assert "2 diverged" in (project / "data/08_reporting/single/report.html").read_text()


def test_arms_side_by_side_are_arms_in_turn(phase1, tmp_path, new_project):
    """In threads, as on a GPU: the same tables, and every arm's curves in the run of that arm."""
    expected, project = results_of(phase1[0] / "kept"), new_project(tmp_path)
    command = ("run", "--pipeline", "phase1", "--env", "debug", "--runner", "ThreadRunner", "--params", as_params(TINY))
    result = kedro(project, *command)
    assert result.exit_code == 0, result.output

    for name, table in results_of(project).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True)
    runs = runs_of(project)
    nested = runs[runs["tags.mlflow.parentRunId"].notna()]
    assert sorted(nested["tags.model_type"]) == sorted(MODEL_TYPES) and set(runs["status"]) == {"FINISHED"}
    models = mlflow.search_logged_models(nested["experiment_id"].unique().tolist())
    assert sorted(models["source_run_id"]) == sorted(nested["run_id"])
    for _, run in nested.iterrows():
        history = pd.read_parquet(project / f"data/07_model_output/{run['tags.model_type']}/history.parquet")
        curve = mlflow.MlflowClient().get_metric_history(run["run_id"], "train/loss")
        means = history.groupby("epoch")["train_loss"].mean()
        assert {point.step: point.value for point in curve} == pytest.approx(means.to_dict())


def test_an_arm_that_fails_stops_the_others(tmp_path, new_project, monkeypatch):
    """Side by side, they save their state and end at once, and the error is the one that is told."""
    project = new_project(tmp_path)
    original = train.train_arm

    another_trains, calls = threading.Event(), itertools.count()

    def fail(arm, *arguments, callbacks, **options):
        if next(calls) == 1:
            another_trains.wait()
            raise UserError("this arm cannot be trained today")
        return original(arm, *arguments, callbacks=[*callbacks, lambda epoch: another_trains.set()], **options)

    monkeypatch.setattr("collective_pipeline.pipelines.arm.nodes.train_arm", fail)
    params = as_params(TINY | {"training.epochs": 300})
    command = ("run", "--pipeline", "phase1", "--env", "debug", "--runner", "ThreadRunner", "--params", params)
    result = kedro(project, *command)

    assert result.exit_code == 1 and "this arm cannot be trained today" in result.output
    assert list((project / "data/06_models").glob("*/last.safetensors"))
    assert set(runs_of(project)["status"]) == {"FAILED"}


def test_what_was_saved_stays_where_a_run_cannot_begin(tmp_path, new_project):
    """A slip of the finger costs nothing, and leaves no run: states are given up only once every arm may train."""
    project = new_project(tmp_path)
    command = ("run", "--pipeline", "phase1", "--env", "debug", "--params")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "shallow", 1)
        kedro(project, *command, as_params(TINY))
    states = {path: path.read_bytes() for path in project.rglob("last.safetensors")}
    runs = set(runs_of(project)["run_id"])
    refused = [{"device": "cuda:99"}, {"training.batch_size": 1000}, {"baselines.target_params": 3189}]
    for change in refused:
        assert kedro(project, *command, as_params(TINY | change)).exit_code == 1

    assert len(states) >= 2 and {path: path.read_bytes() for path in states} == states
    assert runs and set(runs_of(project)["run_id"]) == runs


def test_one_seed_that_diverges_late_is_reported(tmp_path, new_project, monkeypatch):
    """With its last good weights; NaN like infinity."""
    project = new_project(tmp_path)
    original = loop._PhaseTraining.begin

    def begin(self, epoch, *, goes_on):
        original(self, epoch, goes_on=goes_on)
        if epoch == 2:
            with torch.no_grad():
                self.parameters[0][1] = torch.nan

    monkeypatch.setattr(loop._PhaseTraining, "begin", begin)
    result = kedro(project, "run", "--env", "debug", "--params", as_params(TINY))
    runs = pd.read_csv(project / "data/08_reporting/single/runs.csv")

    assert result.exit_code == 0, result.output
    assert list(runs["diverged"]) == [False, True] and runs["best_epoch"].iloc[1] == 1
    assert runs["test_accuracy"].notna().all()
    assert "The loss of 1 of collective's seeds diverged" in result.output


def test_a_gpu_is_in_tables_report_and_tracking(tmp_path, new_project, driver):
    """A card that works at 40 % and 300 W of 700; MLflow's curves are of all cards, with their temperatures."""
    project = new_project(tmp_path)
    train_arm = train.train_arm

    def train_until_watched(*arguments, **options):
        """A thread of MLflow watches, which may not have come to it in the second of this training."""
        result = train_arm(*arguments, **options)
        run = mlflow.active_run().info.run_id
        watched = "system/gpu_1_temperature_celsius"
        wait_until(lambda: watched in mlflow.MlflowClient().get_run(run).data.metrics)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "SYSTEM_METRICS_SECONDS", 0.1)
        patch.setattr("collective_pipeline.pipelines.arm.nodes.train_arm", train_until_watched)
        params = as_params(TINY | {"device": "cpu"})
        result = kedro(project, "run", "--env", "debug", "--params", params)
    assert result.exit_code == 0, result.output
    folder = project / "data/08_reporting/single"
    runs, comparison = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "comparison.csv")

    assert set(comparison["gpu_utilization_mean"]) == {40} and set(comparison["gpu_power_watts_peak"]) == {300}
    assert (runs["joules"] > 0).all() and (runs["images_per_joule"] > 0).all()
    report = (folder / "report.html").read_text()
    assert "While collective trained, the GPU was at work 40 % of the time" in report
    assert "the GPU drew 43 % of the power that it may" in report
    tracked = runs_of(project)
    tracked = tracked[tracked["tags.mlflow.parentRunId"].notna()].set_index("tags.model_type")
    for name, joules in comparison.set_index("model_type")["joules"].items():
        assert tracked.loc[name, "metrics.final/joules"] == pytest.approx(joules)
    assert set(tracked["metrics.system/gpu_1_temperature_celsius"]) == {55}
    assert set(tracked["metrics.system/gpu_0_temperature_celsius"]) == {0}
    assert "metrics.system/gpu_1_power_usage_watts" in tracked
