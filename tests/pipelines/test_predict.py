"""Predicting many images a batch at a time, with a line now and then."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tests.evaluation.test_predict import checkpoint_of

from collective_pipeline.config import PHASE1, UserError
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
    checkpoint = SimpleNamespace(images=SimpleNamespace(class_names=("a", "b")))
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        table = nodes.predict(ImageSource("file", list("vwxyz"), reader), checkpoint, PHASE1, torch.device("cpu"))

    assert read == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(table["file"]) == list("vwxyz") and set(table["prediction"]) == {"b"}
    assert [f"{value:.1f}" for value in table["a"]] == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert "2 of 5 images are predicted, 0 s left" in caplog.text and "5 images predicted in 0 s" in caplog.text
