"""`kedro run --pipeline merged_moe` as a user types it, on a few hundred images."""

import json
import math

import pandas as pd
import pytest
import torch
from tests.test_run import as_params, kedro, runs_of

from collective_pipeline.evaluation.members import member_outputs
from collective_pipeline.io.checkpoints import CheckpointsDataset
from collective_pipeline.models.checkpoint import load_checkpoint
from collective_pipeline.pipelines.merged_moe import nodes

REPORTING = "data/08_reporting/merged_moe"
ARMS = ["merged_moe", "dense", "single_expert", "conv_collective"]
TINY = {
    "merged_moe.training.batch_size": 64,
    "merged_moe.sub_models.batch_size": 32,
    "merged_moe.sub_models.epochs": 2,
    "comparison.resamples": 200,
}


def run(project, **changes):
    params = as_params(TINY | changes)
    return kedro(project, "run", "--pipeline", "merged_moe", "--env", "debug", "--params", params)


def weights_of(project, arm):
    *_, newest = sorted((project / f"data/06_models/{arm}/best.safetensors").glob("*/best.safetensors"))
    return load_checkpoint(newest).weights


@pytest.fixture(scope="module")
def merged(tmp_path_factory, new_project):
    """A run of the debug environment; the folder and what was printed."""
    project = new_project(tmp_path_factory.mktemp("merged_moe"))
    result = run(project)
    assert result.exit_code == 0, result.output
    return project, result


def test_the_mixture_is_compared_to_three_networks_of_its_size(merged):
    project, result = merged
    comparison = pd.read_csv(project / REPORTING / "comparison.csv").set_index("model_type")

    assert list(comparison.index) == ARMS
    assert comparison["param_error_pct"].abs().max() <= 5
    assert set(comparison["num_seeds"]) == {2}
    answer = json.loads((project / REPORTING / "summary.json").read_text())["answer"]
    assert "the merged_moe is better than the 3 other arms" in answer
    assert "minus merged_moe" in result.stdout
    page = (project / REPORTING / "report.html").read_text()
    assert "Is merged_moe better? mnist" in page


def test_the_experts_of_the_mixture_are_looked_into_and_the_members_of_the_collective(merged):
    """How far each opens for which class, what it knows alone, and what no routing among them can exceed."""
    project, _ = merged
    tables = [
        pd.read_csv(project / REPORTING / f"{name}.csv")
        for name in ("expert_analysis", "expert_analysis_by_class", "expert_analysis_by_seed", "sample_predictions")
    ]
    members = tables[0][tables[0]["model_type"] == "conv_collective"]
    units, classes, seeds, samples = (table[table["model_type"] == "merged_moe"] for table in tables)

    assert members["unit"].tolist() == ["expert 1", "expert 2", "expert 3", "analyst 1", "analyst 2"] * 2
    assert members["gate_pct"].isna().all() and members["accuracy"].between(0, 100).all()
    assert units["unit"].tolist() == ["expert 1", "expert 2", "expert 3"] * 2
    assert units.groupby("seed")["gate_pct"].sum().tolist() == pytest.approx([100, 100], abs=1e-3)
    assert classes.groupby(["seed", "class"])["gate_pct"].sum().tolist() == pytest.approx([100] * 6, abs=1e-3)
    assert samples.groupby("image")["gate_pct"].sum().tolist() == pytest.approx([100] * 3, abs=1e-3)
    assert (seeds["usage_entropy_bits"] <= math.log2(3) + 1e-9).all()
    assert (seeds["oracle_accuracy"] >= units.groupby("seed")["accuracy"].max().to_numpy()).all()
    page = (project / REPORTING / "report.html").read_text()
    assert all(told in page for told in ("Experts by class, seed 42", "Entropy of use (bits)", "Sample predictions"))
    told = json.loads((project / REPORTING / "results.json").read_text())
    assert list(told) == ARMS and list(told["merged_moe"]["class_accuracies"]) == ["0", "1", "7"]


def test_tables_and_report_say_which_classes_an_expert_was_made_of_and_why_epochs_differ(merged):
    units = pd.read_csv(merged[0] / REPORTING / "expert_analysis.csv")
    page = (merged[0] / REPORTING / "report.html").read_text()

    known = units.groupby(["model_type", "unit"])["sub_model_classes"].first()
    assert known["merged_moe"].dropna().to_dict() == {"expert 1": "0, 1", "expert 2": "1, 7"}
    assert known["conv_collective"].isna().all()
    for told in (
        "<dt>shared extractor</dt><dd>the mean of those of all 2 sub-models</dd>",
        "<dt>expert 2</dt><dd>the sub-model of group 2, 1, 7</dd>\n<dt>expert 3</dt><dd>drawn</dd>",
        "<dt>epochs</dt><dd>dense, single_expert and conv_collective train for 7 epochs: the mixture&#39;s 1, and the "
        "updates of its 2 sub-models</dd>",
    ):
        assert told in page


def test_the_report_lists_the_parameters_that_the_experiment_reads(merged):
    page = (merged[0] / REPORTING / "report.html").read_text()

    assert all(f"<dt>{name}</dt>" in page for name in ("merged_moe.n_experts", "data.split_seed", "resume"))
    assert not any(f"<dt>{name}" in page for name in ("deepmoe.", "sweep.", "training.", "seeds", "images"))


def test_every_group_has_a_sub_model_and_the_mixture_all_of_their_classes(merged):
    project = merged[0]
    (folder,) = (project / "data/06_models/sub_models/best").glob("*/best")
    saved = CheckpointsDataset(filepath=str(folder)).load()

    assert {name: one.images.class_names for name, one in saved.items()} == {
        "sub_model_1": ("0", "1"),
        "sub_model_2": ("1", "7"),
    }
    assert all(one.seeds == (42, 43) and one.arm.model_type == "sub_model" for one in saved.values())
    (path,) = (project / "data/06_models/merged_moe_mixture/best.safetensors").glob("*/best.safetensors")
    assert load_checkpoint(path).images.class_names == ("0", "1", "7")


def test_all_arms_have_the_updates_of_the_mixture_and_its_sub_models(merged):
    """162 images are 2 updates of 64; those of a group, 108, are 3 of 32: with two groups in 2 epochs 12."""
    runs = pd.read_csv(merged[0] / REPORTING / "runs.csv")

    assert runs.groupby("model_type")["epochs"].unique().map(list).to_dict() == {
        "merged_moe": [1],
        "dense": [1 + 6],
        "single_expert": [1 + 6],
        "conv_collective": [1 + 6],
    }


def test_what_the_mixture_took_includes_its_sub_models(merged):
    project = merged[0]
    runs = pd.read_csv(project / REPORTING / "runs.csv").set_index("model_type")
    own = pd.read_parquet(project / "data/07_model_output/merged_moe_mixture/history.parquet")["seconds"].max()
    before = pd.read_parquet(project / "data/07_model_output/sub_models/history.parquet")

    assert set(before["model_type"]) == {"sub_model_1", "sub_model_2"}
    total = own + before.groupby("model_type")["seconds"].max().sum()
    assert runs.loc["merged_moe", "train_seconds"].sum() == pytest.approx(total)


def test_the_members_of_the_trained_collective_can_be_looked_into(merged):
    """Its file alone is enough: all seeds show what their experts and analysts say of an image."""
    (path,) = (merged[0] / "data/06_models/merged_moe_conv_collective/best.safetensors").glob("*/best.safetensors")
    checkpoint = load_checkpoint(path)
    logits, parts = member_outputs(checkpoint.build(), torch.zeros(1, 5, 784))
    architecture = checkpoint.arm.architecture

    assert checkpoint.seeds == (42, 43) and logits.shape == (2, 5, 3)
    assert parts["experts"].shape == (2, 3, 5, architecture.channels[-1])
    assert parts["analysts"].shape == (2, 2, 5, 4)


def test_predict_finds_an_arm_by_its_name(merged):
    project = merged[0]
    images = "data/01_raw/mnist/t10k-images-idx3-ubyte.gz"
    result = kedro(
        project, "run", "--pipeline", "predict", "--params", as_params({"images": images, "arm": "conv_collective"})
    )

    assert result.exit_code == 0, result.output
    table = pd.read_csv(project / "data/07_model_output/predict/predictions.csv")
    assert list(table) == ["index", "prediction", "probability", "0", "1", "7"]


def test_arms_and_sub_models_are_runs_in_mlflow(merged):
    runs = runs_of(merged[0])
    nested = runs[runs["tags.mlflow.parentRunId"].notna()]

    assert sorted(nested["tags.model_type"]) == sorted([*ARMS, *["sub_model"] * 2])
    assert set(nested["status"]) == {"FINISHED"}
    assert {"0, 1", "1, 7"} == set(nested["params.classes"].dropna())


def test_a_second_run_with_resume_trains_nothing_again(merged, caplog):
    project = merged[0]
    before = {arm: weights_of(project, f"merged_moe_{arm}") for arm in ("mixture", "dense", "conv_collective")}
    caplog.set_level("INFO", "collective_pipeline")
    result = run(project, resume="true")

    assert result.exit_code == 0, result.output
    done = {line.split()[0] for line in caplog.messages if line.endswith("is done")}
    assert done == {*ARMS, "sub_model_1", "sub_model_2"}
    for arm, weights in before.items():
        after = weights_of(project, f"merged_moe_{arm}")
        assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


def test_a_run_that_broke_in_the_second_sub_model_ends_as_one_that_did_not(
    merged, tmp_path, new_project, monkeypatch, caplog
):
    project = new_project(tmp_path)
    train = nodes.train

    def break_in_second(*arguments, name=None, **options):
        if name == "sub_model_2":
            raise OSError("broken")
        return train(*arguments, name=name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nodes, "train", break_in_second)
        assert run(project).exit_code == 1
    caplog.clear()
    caplog.set_level("INFO", "collective_pipeline")
    result = run(project, resume="true")

    assert result.exit_code == 0, result.output
    trained = {line.split()[0] for line in caplog.messages if "validation accuracy" in line}
    # Nothing else had begun before the sub-models were there.
    assert trained == {"sub_model_2", *ARMS}
    whole = weights_of(merged[0], "merged_moe_mixture")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights_of(project, "merged_moe_mixture").items())


def test_a_run_with_other_sub_models_does_not_go_on(merged, monkeypatch):
    project = merged[0]
    last = project / "data/06_models/merged_moe_mixture/last.safetensors"
    kept = last.read_bytes()
    others = run(project, **{"merged_moe.sub_models.epochs": 3, "resume": "true"})

    def move(found, *_, **__):
        """As if they had been trained again on another machine."""
        found[1].weights["classifier.bias"].add_(1e-6)

    monkeypatch.setattr(nodes, "check_submodels", move)
    moved = run(project, resume="true")

    assert "sub_model_1.safetensors is of another run: training.epochs was 2 and is 3" in others.output
    assert "merged_moe_mixture/last.safetensors is of another run: sub_models was" in moved.output
    assert others.exit_code == moved.exit_code == 1
    assert last.read_bytes() == kept


def test_sub_models_that_diverge_are_refused_before_anything_else_trains(tmp_path, new_project):
    project = new_project(tmp_path)
    diverging = {"optimizer": "sgd", "learning_rate": "1e30", "clip_norm": "null"}
    result = run(project, **{f"merged_moe.sub_models.{name}": value for name, value in diverging.items()})

    assert result.exit_code == 1
    assert "the sub-model of group 1 diverged with the seeds 42, 43" in result.output
    states = {path.parent.name for path in (project / "data/06_models").rglob("*.safetensors")}
    assert states == {"last"}


def test_a_mixture_may_begin_without_sub_models(tmp_path, new_project):
    project = new_project(tmp_path)
    result = run(project, **{"merged_moe.initialise": "fresh", "merged_moe.combine": "logits"})

    assert result.exit_code == 0, result.output
    assert not list((project / "data/06_models/sub_models/best").glob("*/best/*"))
    runs = pd.read_csv(project / REPORTING / "runs.csv")
    assert set(runs["model_type"]) == set(ARMS) and set(runs["epochs"]) == {1}


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ("merged_moe.n_experts=1", "merged_moe.n_experts=1"),
        ("merged_moe.collective.n_analyst=3", "did you mean 'merged_moe.collective.n_analysts'?"),
        (
            "merged_moe.collective.n_analysts=500,merged_moe.training.batch_size=64,merged_moe.sub_models.batch_size=32",
            "change merged_moe.collective, the mixture's channels or the tolerance",
        ),
        ("merged_moe.training.strategy=pretrain_freeze_finetune", "training.strategy: these networks are trained end"),
        ("merged_moe.initialise=averge", "did you mean 'average'?"),
        ("merged_moe.initialise=copy,merged_moe.copy_of=4", "copy_of=4 is no group: choose from 1 to 2"),
        (
            "merged_moe.sub_models.batch_size=200,merged_moe.training.batch_size=64",
            "108 training images of sub_model_1, 0, 1: choose",
        ),
        ("num_experts=3", "did you mean 'merged_moe.n_experts'?"),
        ("merged_moe.dataset=mnis", "did you mean 'mnist'?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(merged, params, told):
    result = kedro(merged[0], "run", "--pipeline", "merged_moe", "--env", "debug", "--params", params)

    assert result.exit_code == 1
    assert told in result.output and "Traceback" not in result.output
    assert "validation accuracy" not in result.output


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ("[['0', '1'], ['2', 'x']]", "group 2 has 'x', which is no class of mnist"),
        ("[['0', '1'], ['2', '3']]", "no group has 4, 5, 6, 7, 8, 9"),
        ("[['0', '1']]", "one group makes no mixture"),
    ],
)
def test_groups_that_do_not_fit_are_refused_before_any_training(tmp_path, new_project, groups, told):
    project = new_project(tmp_path)
    path = project / "conf/debug/parameters.yml"
    text = path.read_text().replace('[["0", "1"], ["1", "7"]]', groups)
    path.write_text(text.replace("leave_out_others: true", "leave_out_others: false"))
    result = run(project)

    assert result.exit_code == 1
    assert told in result.output and "Traceback" not in result.output
    assert not (project / "data/06_models").exists()
