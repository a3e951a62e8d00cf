"""Predicting many images a batch at a time, with a line now and then."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.evaluation.test_predict import checkpoint_of

from collective_pipeline.config import PHASE1, UserError, check_parameters
from collective_pipeline.data.image_files import ImageSource
from collective_pipeline.models.checkpoint import save_checkpoint
from collective_pipeline.pipelines.predict import nodes


@pytest.fixture
def named(tmp_path):
    """Settings that name a checkpoint of another arm and data set than they are of."""
    path = tmp_path / "taken away.safetensors"
    save_checkpoint(checkpoint_of((1, 4, 4)), path)
    return PHASE1.model_copy(update={"images": "photos", "dataset": "cifar10", "checkpoint": str(path)})


def test_a_file_that_is_named_says_itself_what_it_is_of(named, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        checkpoint = nodes.choose_checkpoint(named, tmp_path)

    assert checkpoint.arm.model_type == "shallow"
    assert "Predicting with the mean of 3 seeds of shallow for mnist" in caplog.text


def test_an_unknown_seed_is_refused_before_anything_is_said(named, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "collective_pipeline"), pytest.raises(UserError, match="has no seed 4"):
        nodes.choose_checkpoint(named.model_copy(update={"checkpoint_seed": 4}), tmp_path)

    assert "Predicting" not in caplog.text


@pytest.fixture
def models(tmp_path):
    """What a DeepMoE of two data sets, one of them trained twice, a mixture and phase 1 leave; and a damaged file."""
    for namespace, version, name, dataset in (
        ("deepmoe_gated", "2026-01-01", "resnet18_moe", "cifar10"),
        ("deepmoe_gated", "2026-01-02", "resnet18_moe", "cifar10"),
        ("deepmoe_gated", "2026-01-03", "resnet18_moe", "cifar100"),
        ("deepmoe_dense", "2026-01-03", "resnet18", "cifar100"),
        ("imagenet_network", "2026-01-02", "resnet18", "imagenet"),
        ("merged_moe_mixture", "2026-01-01", "merged_moe", "cifar10"),
        ("shallow", "2026-01-01", "shallow", "mnist"),
    ):
        checkpoint = checkpoint_of((1, 4, 4))
        arm = checkpoint.arm.model_copy(update={"model_type": name})
        path = tmp_path / namespace / "best.safetensors" / version / "best.safetensors"
        save_checkpoint(replace(checkpoint, arm=arm, dataset=dataset), path)
    path = tmp_path / "deepmoe_narrow" / "best.safetensors" / "2026-01-03" / "best.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    return tmp_path


@pytest.mark.parametrize(
    ("arm", "dataset", "found"),
    [
        ("merged_moe", "mnist", "merged_moe_mixture/best.safetensors/2026-01-01"),
        ("resnet18_moe", "cifar10", "deepmoe_gated/best.safetensors/2026-01-02"),
        ("resnet18_moe", "cifar100", "deepmoe_gated/best.safetensors/2026-01-03"),
        ("resnet18", "cifar100", "deepmoe_dense/best.safetensors/2026-01-03"),
        ("shallow", "mnist", "shallow/best.safetensors/2026-01-01"),
        ("deepmoe_gated", "cifar10", "deepmoe_gated/best.safetensors/2026-01-02"),
        ("deepmoe_gated", "cifar100", "deepmoe_gated/best.safetensors/2026-01-03"),
        ("imagenet_network", "mnist", "imagenet_network/best.safetensors/2026-01-02"),
    ],
)
def test_the_newest_of_an_arm_is_found_whichever_experiment_trained_it(models, caplog, arm, dataset, found):
    """The data set decides where it was trained for several; the name of its folder is as good as its own."""
    settings = PHASE1.model_copy(update={"images": "photos", "arm": arm, "dataset": dataset})
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        checkpoint = nodes.choose_checkpoint(settings, models)

    assert arm in (checkpoint.arm.model_type, found.partition("/")[0]) and f"{found}/best.safetensors" in caplog.text


def test_a_folder_of_a_network_s_name_does_not_answer_for_it(models, caplog):
    """Somebody keeps a newer one of another network there, whether that one is trained elsewhere or nowhere."""
    for name in ("resnet18", "plain"):
        path = models / name / "best.safetensors" / "2026-01-09" / "best.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes((models / "deepmoe_gated/best.safetensors/2026-01-03/best.safetensors").read_bytes())
    settings = PHASE1.model_copy(update={"images": "photos", "arm": "resnet18", "dataset": "cifar100"})
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        assert nodes.choose_checkpoint(settings, models).arm.model_type == "resnet18"
    with pytest.raises(UserError, match=r"no trained plain in .*: choose from deepmoe_dense, deepmoe_gated"):
        nodes.choose_checkpoint(settings.model_copy(update={"arm": "plain"}), models)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"arm": "resnet18_moe"},
            "was trained for cifar10, cifar100 and not for dataset=mnist: choose with --params d",
        ),
        ({"arm": "resnet18"}, "was trained for imagenet, cifar100 and not for dataset=mnist"),
        ({"arm": "narrow"}, r"no trained narrow in .*: choose from deepmoe_dense, deepmoe_gated, imagenet_network, me"),
        ({"arm": "resnet18_mo"}, r"no trained resnet18_mo in .*: did you mean 'resnet18_moe'\? choose from deepmoe_de"),
        ({"arm": "narrow"}, r"\(left out: 1 that cannot be read, the first: .*deepmoe_narrow.* is not a checkpoint"),
        ({"arm": "narrow", "checkpoint": "x"}, "arm=narrow and checkpoint=x both say which network answers: give one"),
    ],
)
def test_an_arm_that_cannot_be_found_is_told_with_those_that_can(models, changes, told):
    with pytest.raises(UserError, match=told) as caught:
        nodes.choose_checkpoint(PHASE1.model_copy(update={"images": "photos"} | changes), models)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arm", ["resnet18_moe", "resnet18"])
def test_each_way_that_is_told_of_choosing_among_several_works(models, arm):
    """An arm of image files has no data set that could be named: its file can."""
    raw = {"images": "photos", "arm": arm}
    with pytest.raises(UserError, match=f"{arm} was trained for ") as caught:
        nodes.choose_checkpoint(check_parameters(raw), models)
    of, ways = re.findall(r"for ([\w, ]+) and not", str(caught.value))[0], str(caught.value).partition("--params ")[2]
    chosen = []
    for name, value in re.findall(r"(dataset|checkpoint)=(\S+?)(?=[, ]|$)", ways):
        given = {"images": "photos", name: value} if name == "checkpoint" else raw | {name: value}
        chosen.append(nodes.choose_checkpoint(check_parameters(given), models))

    assert [checkpoint.dataset for checkpoint in chosen] == of.split(", ")
    assert {checkpoint.arm.model_type for checkpoint in chosen} == {arm}


def test_a_network_of_another_experiment_is_no_model_type_and_refused_with_what_to_type():
    with pytest.raises(UserError, match="; --pipeline predict takes any network as arm=resnet18_moe"):
        check_parameters({"model_type": "resnet18_moe"})


def test_long_work_is_read_in_batches_and_told_of(monkeypatch, caplog):
    """No more than a batch of images is read at once; each row keeps its name."""
    read = []

    def reader(rows):
        read.append(rows)
        return torch.arange(5, dtype=torch.uint8)[rows].view(-1, 1, 1, 1)

    def predictor(checkpoint, device, *, seed):
        return lambda images: torch.stack([images.flatten() / 10, 1 - images.flatten() / 10], dim=1)

    monkeypatch.setattr(nodes, "Predictor", predictor)
    monkeypatch.setattr(nodes, "BATCH_SIZE", 2)
    monkeypatch.setattr(nodes, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(nodes.time, "perf_counter", lambda: 100.0)
    checkpoint = SimpleNamespace(images=SimpleNamespace(class_names=("a", "b")))
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        table = nodes.predict(ImageSource("file", list("vwxyz"), reader), checkpoint, PHASE1, torch.device("cpu"))

    assert read == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(table["file"]) == list("vwxyz") and set(table["prediction"]) == {"b"}
    assert [f"{value:.1f}" for value in table["a"]] == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert "2 of 5 images are predicted, 0 s left" in caplog.text and "5 images predicted in 0 s" in caplog.text
