"""`kedro run --pipeline tiny_imagenet` as a user types it, on a few hundred images."""

import json
import signal

import pandas as pd
import pytest
from PIL import Image
from tests.test_run import as_params, kedro, runs_of

from collective_pipeline.config import TECHNIQUES
from collective_pipeline.models.checkpoint import load_checkpoint
from collective_pipeline.training import train

REPORTING = "data/08_reporting/tiny_imagenet"
COMMAND = ("run", "--pipeline", "tiny_imagenet", "--env", "debug")
TINY = {"tiny_imagenet.training.batch_size": 128, "tiny_imagenet.width": 2, "comparison.resamples": 200}


@pytest.fixture(scope="module")
def compared(tmp_path_factory, new_project):
    """A run that is stopped while its sixth arm trains, and the same command again; the folder and what both said."""
    project = new_project(tmp_path_factory.mktemp("tiny_imagenet"))
    begun = []
    original = train.train_arm

    def stop_in_the_sixth(arm, *arguments, **options):
        begun.append(arm.model_type)
        if len(begun) == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(arm, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collective_pipeline.pipelines.arm.nodes.train_arm", stop_in_the_sixth)
        stopped = kedro(project, *COMMAND, "--params", as_params(TINY))
    assert stopped.exit_code == 128 + signal.SIGTERM, stopped.output
    result = kedro(project, *COMMAND, "--params", as_params(TINY | {"resume": "true"}))
    assert result.exit_code == 0, result.output
    return project, stopped, result


def newest(project, technique):
    """The file of the arm's weights."""
    return max((project / f"data/06_models/tiny_imagenet_{technique}/best.safetensors").glob("*/best.safetensors"))


def test_every_technique_is_an_arm_with_as_many_epochs(compared):
    project, _, result = compared
    runs, comparison = (pd.read_csv(project / REPORTING / f"{name}.csv") for name in ("runs", "comparison"))

    assert tuple(comparison["model_type"]) == TECHNIQUES and "minus plain" in result.stdout
    assert runs.groupby("model_type")["seed"].apply(list).to_dict() == {name: [42, 43] for name in TECHNIQUES}
    assert set(runs["epochs"]) == {2} and runs["test_accuracy"].between(0, 100).all()
    params = comparison.set_index("model_type")["params"]
    assert len(set(params)) == 1  # blur has no weights, and the head as many


def test_the_answer_is_what_each_technique_is_worth(compared):
    project, _, result = compared
    told = json.loads((project / REPORTING / "summary.json").read_text())["answer"]
    page = (project / REPORTING / "report.html").read_text()

    assert told.startswith("Of 9 changes to the plain network, ") and "With 2 seeds it cannot be told" in told
    assert told in result.stdout and "What is each technique worth? mnist" in page
    for technique in TECHNIQUES[1:]:
        assert technique in told and technique in page


def test_top5_accuracy_of_ten_classes_is_told_in_the_arms_tables_alone(compared):
    project, _, result = compared

    assert json.loads((project / REPORTING / "summary.json").read_text())["test_top5_accuracy"] == {}
    assert "top-5 %" not in result.stdout and "Top-5" not in (project / REPORTING / "report.html").read_text()
    assert "test_top5_accuracy" in pd.read_csv(project / "data/07_model_output/tiny_imagenet_plain/results.csv")


def test_arms_differ_in_their_technique_and_in_nothing_else(compared):
    """As MLflow has it, too."""
    runs = runs_of(compared[0])
    arms = runs[runs["tags.mlflow.parentRunId"].notna()].set_index("tags.model_type").drop(columns="params.resume")
    changed = {
        name.rpartition("params.")[2]: set(arms.index[arms[name] != arms.loc["plain", name]]) - {"all_techniques"}
        for name in arms.columns
        if name.startswith("params.") and arms[name].nunique(dropna=False) > 1 and "model_type" not in name
    }

    assert set(arms.index) == set(TECHNIQUES)
    assert changed == {
        "arm.architecture.blur": {"blur"},
        "arm.architecture.drop_path": {"stochastic_depth"},
        "arm.architecture.head": {"conv_head"},
        "training.cutmix_alpha": {"cutmix"},
        "training.ema_decay": {"ema"},
        "training.label_smoothing": {"label_smoothing"},
        "training.mixup_alpha": {"mixup"},
        "training.stages": {"progressive_resizing"},
    }


def test_a_run_that_was_stopped_went_on_with_the_arm_it_was_at(compared):
    """And trained none of those before it again."""
    project, stopped, _ = compared

    assert stopped.output.partition("To go on: kedro")[2].strip().endswith("resume=true")
    runs = runs_of(project)
    arms = runs[runs["tags.mlflow.parentRunId"].notna()]
    assert sorted(arms["tags.model_type"]) == sorted(TECHNIQUES)  # each in the run it began with
    assert not list(project.rglob("*.partial*"))


def test_networks_read_images_of_the_size_that_they_are_evaluated_at(compared):
    project, _, _ = compared
    for technique in ("plain", "progressive_resizing", "all_techniques"):
        checkpoint = load_checkpoint(newest(project, technique))
        history = pd.read_parquet(project / f"data/07_model_output/tiny_imagenet_{technique}/history.parquet")
        first = "48px" if technique == "plain" else "40px"
        assert checkpoint.images.shape == (1, 48, 48) and checkpoint.dataset == "mnist"
        assert history.groupby("epoch")["phase"].first().tolist() == [first, "48px"]
        # Epochs with smaller images are not chosen.
        assert technique == "plain" or checkpoint.best_epochs == (2, 2)


def test_a_checkpoint_of_it_predicts_images_of_any_size(compared):
    project, _, _ = compared
    path = newest(project, "ema")
    folder = project / "mine"
    folder.mkdir()
    for side in (28, 48, 100):
        Image.new("L", (side, side), 90).save(folder / f"{side}.png")
    result = kedro(
        project, "run", "--pipeline", "predict", "--env", "debug", "--params", f"images={folder},checkpoint={path}"
    )

    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(project / "data/07_model_output/predict/predictions.csv")) == 3


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ("tiny_imagenet.training.mixup_alpha=0.2", "the plain network has none: set tiny_imagenet.mixup_alpha"),
        ("tiny_imagenet.training.epochs=3", "stages have 2 epochs together and training.epochs=3"),
        ("epochs=3", "did you mean 'tiny_imagenet.training.epochs'? where there are stages, `epochs` is their sum"),
        ("tiny_imagenet.model=vgg11", "tiny_imagenet.model='vgg11' is unknown"),
        ("tiny_imagenet.model=resnet18_moe", "choose from resnet18, resnet34"),
        ("tiny_imagenet.training.stages=3", "tiny_imagenet.training.stages"),
        ("tiny_imagenet.stages=3", "tiny_imagenet.stages"),
        ("tiny_imagenet.image_size=16", "16x16 pixels are too small"),
        ("tiny_imagenet.training.strategy=layerwise_autoencoding", "leave it at end_to_end"),
        ("tiny_imagenet.training.expert_analysis_interval=1", "nothing reads it: leave it out"),
        ("training.epochs=3", "is not read by --pipeline tiny_imagenet: use `tiny_imagenet.training.epochs`"),
        ("tiny_imagenet.training.batch_size=1000", "batch_size=1000 is more than the 540 training images"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(compared, params, told):
    result = kedro(compared[0], *COMMAND, "--params", params)

    assert result.exit_code == 1
    assert told in result.output and "Traceback" not in result.output
