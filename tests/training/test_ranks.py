"""Processes that train together: the same as one process, and nothing is left of them whatever happens.

A launch starts three interpreters that import torch: ten seconds or more each on a busy machine, so there are few.
"""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from collective_pipeline.config import AugmentationConfig, ImageNetConfig, Parameters, Stage, TrainingConfig, UserError
from collective_pipeline.data.feeding import Crop
from collective_pipeline.data.jpeg import encode
from collective_pipeline.data.packed import FileImages
from collective_pipeline.data.streaming import Share, StreamedBatches, StreamedImages, StreamedSplits
from collective_pipeline.pipelines.imagenet.nodes import make_arm
from collective_pipeline.training import interrupt
from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.launch import count_ranks, launch
from collective_pipeline.training.loop import Fit
from collective_pipeline.training.rank import Job, work
from collective_pipeline.training.ranks import ALONE

CPU = torch.device("cpu")
CONFIG = ImageNetConfig(
    model="resnet18",
    stem="cifar",
    width=4,
    drop_path=0.2,
    seeds=(1,),
    threads=2,
    training=TrainingConfig(
        epochs=4,
        stages=(Stage(epochs=2, image_size=12, batch_size=4), Stage(epochs=2, image_size=16)),
        batch_size=8,
        eval_batch_size=8,
        optimizer="sgd",
        learning_rate=0.02,
        schedule="one_cycle",
        mixup_alpha=0.2,
        ema_decay=0.9,
    ),
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> StreamedSplits:
    """Each of three classes is a bright row of its own in noise."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(75) % 3
    for number, label in enumerate(labels.tolist()):
        image = torch.randint(0, 80, (3, 20, 24), generator=generator, dtype=torch.uint8)
        image[:, 6 * label : 6 * label + 6] += 150
        (root / f"{number}.jpg").write_bytes(encode(image, 95))
    files = FileImages(root, [f"{number}.jpg" for number in range(75)], labels)
    train, val, test = (
        StreamedImages(files, torch.arange(first, last), 16, Crop(), threads=2, max_bad=0.0)
        for first, last in ((0, 50), (50, 62), (62, 75))
    )
    return StreamedSplits("imagenet", train, val, test, tuple("abc"), "digest", AugmentationConfig())


def make_job(
    splits: StreamedSplits, state: Path, *, planned: int, config: ImageNetConfig = CONFIG, resume=False
) -> Job:
    settings = Parameters(imagenet=config, resume=resume).of_experiment(config, reference="resnet18")
    return Job(make_arm(config, 3), splits, settings, state, planned, "cpu")


def told(fit: Fit) -> list[dict]:
    """What happened, but for how long it took."""
    return [{k: v for k, v in row.items() if k != "seconds" and isinstance(v, int | float)} for row in fit.history]


def test_every_image_is_in_one_batch_whoever_reads_it(splits):
    """Order and crops are of the seed: for two ranks, for one that plays both, for four that share their batches."""

    def rows(number: int, planned: int) -> list[torch.Tensor]:
        shares = [splits.for_share(Share(rank, number, planned)) for rank in range(number)]
        batches = [StreamedBatches(share, (1,), CONFIG.training, Stage(epochs=1, image_size=12)) for share in shares]
        for one in batches:
            one.begin(3)
        updates = len(batches[0]) // batches[0].ranks_played
        return [one.rows_KB.view(updates, -1) for one in batches]

    alone, two, four = rows(1, 2), rows(2, 2), rows(4, 2)

    assert torch.equal(torch.cat(two, dim=1), alone[0]) and torch.equal(torch.cat(four, dim=1), alone[0])
    assert len(alone[0].unique()) == alone[0].numel() == 48


@pytest.mark.parametrize("number", [1, 2, 3])
def test_validation_reads_every_image_once(splits, number):
    parts = [splits.for_share(Share(rank, number, number)).test for rank in range(number)]
    labels = torch.cat([labels for part in parts for _, labels in part.chunks(4)])

    assert all(len(part) == 13 for part in parts)
    assert torch.equal(labels.sort().values, splits.test.labels.sort().values)


def test_two_ranks_train_as_one_process_that_plays_both(splits, tmp_path):
    """Statistics of norms, dropped paths and all: on another number of ranks nothing but rounding differs."""
    alone, fit = work(make_job(splits, tmp_path / "alone.safetensors", planned=2), ALONE, CPU)
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    both, fit_of_both = launch(make_job(splits, tmp_path / "both.safetensors", planned=2), number=2, environment={})

    for mine, other in zip(told(fit_of_both), told(fit), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for name, tensor in alone.weights.items():
        assert torch.allclose(both.weights[name], tensor, rtol=1e-3, atol=1e-4), name
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    # With the images of two batches an update, its rate is doubled.
    rates = [row["learning_rate"] for row in fit.history]
    assert max(rates) > CONFIG.training.learning_rate


def test_what_a_rank_fails_of_is_told_and_no_process_is_left(splits, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for file in splits.train.source.root.iterdir():
        (root / file.name).write_bytes(b"" if file.name == "7.jpg" else file.read_bytes())
    source = replace(splits.train.source, root=root)
    spoilt = replace(splits, train=replace(splits.train, source=source))

    with pytest.raises(UserError, match=r"7\.jpg"):
        launch(make_job(spoilt, tmp_path / "state.safetensors", planned=2), number=2, environment={})

    assert [child for child in psutil.Process().children(recursive=True) if "rank" in " ".join(child.cmdline())] == []


def test_counts_that_are_no_part_of_each_other_are_refused():
    with pytest.raises(UserError, match="begun on 4 GPUs and 3 are neither"):
        Share(0, 3, 4)
    assert count_ranks("auto", CPU) == 1 and count_ranks(3, CPU) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_training_of_two_ranks_goes_on_with(number, splits, tmp_path):
    """SIGTERM saves on all ranks; the rest is trained by as many, or by one that plays both."""
    whole, fit = work(make_job(splits, tmp_path / "whole.safetensors", planned=2), ALONE, CPU)
    state = tmp_path / "state.safetensors"
    config = CONFIG.model_copy(update={"threads": 1})

    def stop() -> None:
        while not any(
            "collective_pipeline.training.rank" in " ".join(p.cmdline()) for p in psutil.Process().children(True)
        ):
            time.sleep(0.05)
        time.sleep(9)
        os.kill(os.getpid(), signal.SIGTERM)

    with interrupt.listen():
        threading.Thread(target=stop, daemon=True).start()
        try:
            launch(make_job(splits, state, planned=2, config=config), number=2, environment={})
        except Interrupted:
            assert state.exists()

    job = make_job(splits, state, planned=2, resume=True)
    resumed, rest = work(job, ALONE, CPU) if number == 1 else launch(job, number=2, environment={})

    for mine, other in zip(told(rest), told(fit), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for name, tensor in whole.weights.items():
        assert torch.allclose(resumed.weights[name], tensor, rtol=1e-3, atol=1e-4), name
