"""Processes that train together: the same as one process, and nothing is left of them whatever happens.

A launch starts three interpreters that import torch: ten seconds or more each on a busy machine, so there are few.
"""

import atexit
import contextlib
import ctypes
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from collective_pipeline.config import AugmentationConfig, ImageNetConfig, Parameters, Stage, TrainingConfig, UserError
from collective_pipeline.data.feeding import Crop
from collective_pipeline.data.jpeg import encode
from collective_pipeline.data.packed import FileImages
from collective_pipeline.data.streaming import Share, StreamedBatches, StreamedImages, StreamedSplits
from collective_pipeline.pipelines.imagenet.nodes import make_arm
from collective_pipeline.training import interrupt, launcher
from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.launch import count_ranks, launch
from collective_pipeline.training.loop import Fit, evaluate
from collective_pipeline.training.rank import Job, own_device, scale_rate, work
from collective_pipeline.training.ranks import ALONE, Ranks
from collective_pipeline.training.snapshots import Snapshots

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
        StreamedImages(files, torch.arange(first, last), 16, Crop(), threads=2)
        for first, last in ((0, 50), (50, 62), (62, 75))
    )
    return StreamedSplits("imagenet", train, val, test, tuple("abc"), "digest", AugmentationConfig())


def make_job(
    splits: StreamedSplits, state: Path, *, planned: int, config: ImageNetConfig = CONFIG, resume=False
) -> Job:
    settings = Parameters(imagenet=config, resume=resume).of_experiment("imagenet")
    return Job(make_arm(config, 3), splits, settings, state, planned, "cpu")


def spoil(splits: StreamedSplits, root: Path, bad: set[int], *, most_bad: int) -> StreamedSplits:
    """The same images, but for these, whose files are empty."""
    root.mkdir()
    for file in splits.train.source.root.iterdir():
        (root / file.name).write_bytes(b"" if int(file.stem) in bad else file.read_bytes())
    source = replace(splits.train.source, root=root)
    parts = {
        name: replace(getattr(splits, name), source=source, most_bad=most_bad) for name in ("train", "val", "test")
    }
    return replace(splits, **parts)


def ranks() -> list[psutil.Process]:
    """Below this process, and what starts them."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may be gone by now
            if "collective_pipeline.training.rank" in child.cmdline():
                found.append(child)
    return found


def kill_second() -> None:
    next(rank for rank in ranks() if rank.environ()["RANK"] == "1").kill()


def told(fit: Fit) -> list[dict]:
    """What happened, but for how long it took."""
    return [{k: v for k, v in row.items() if k != "seconds" and isinstance(v, int | float)} for row in fit.history]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_validation_reads_every_image_once(splits, number):
    parts = [splits.for_share(Share(rank, number, number)).test for rank in range(number)]
    labels = torch.cat([labels for part in parts for _, labels in part.chunks(4)])

    assert all(len(part) == 13 for part in parts)
    assert torch.equal(labels.sort().values, splits.test.labels.sort().values)


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, number: int, barrier: threading.Barrier, messages: dict) -> None:
        super().__init__(rank, number)
        object.__setattr__(self, "average_", lambda tensors: self.meet(tensors, barrier, messages))

    def meet(self, tensors, barrier, messages) -> None:
        messages[self.rank] = [tensor.clone() for tensor in tensors]
        barrier.wait(120)
        for tensor, *all_of_it in zip(tensors, *(messages[rank] for rank in range(self.number)), strict=True):
            tensor.copy_(torch.stack(all_of_it).mean(dim=0))
        barrier.wait(120)


class Projection(nn.Module):
    """Logits of three classes for a stack of one network."""

    def forward(self, x_1BI):
        weights = torch.randn(x_1BI.shape[-1], 3, generator=torch.Generator().manual_seed(0))
        return x_1BI @ weights / 20, {}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_file_that_cannot_be_read_counts_neither_way_whoever_validates(splits, tmp_path, number):
    rows, bad = splits.test.rows, {63, 66, 70}
    spoilt = spoil(splits, tmp_path / "images", bad, most_bad=len(bad)).test
    good = replace(spoilt, rows=torch.tensor([row for row in rows.tolist() if row not in bad]))
    normalise = StreamedBatches(splits, (1,), CONFIG.training, Stage(epochs=1)).normalise
    barrier, messages = threading.Barrier(number), {}

    def found(images, ranks):
        return evaluate(Projection(), images, normalise, CONFIG.training, ranks=ranks)

    with ThreadPoolExecutor(number) as pool:
        parts = [replace(spoilt, share=Share(rank, number, number)) for rank in range(number)]
        results = list(pool.map(found, parts, [Threads(rank, number, barrier, messages) for rank in range(number)]))

    wanted = found(good, ALONE)
    for name, value in wanted.items():
        assert [result[name].item() for result in results] == pytest.approx([value.item()] * number, rel=1e-5), name


@pytest.mark.slow
def test_norms_over_ranks_are_those_of_one_process_with_all_images(splits, tmp_path):
    """Statistics, gradients and all: two ranks are one that has batches of twice the size."""
    changes = {"sync_norm": True, "drop_path": 0.0, "rate_scaling": "none"}
    training = CONFIG.training.model_copy(update={"mixup_alpha": 0.0})
    twice = training.model_copy(
        update={
            "batch_size": 2 * training.batch_size,
            "stages": (Stage(epochs=2, image_size=12, batch_size=8), Stage(epochs=2, image_size=16)),
        }
    )
    one, two = (CONFIG.model_copy(update=changes | {"training": some}) for some in (twice, training))
    alone, fit, _ = work(make_job(splits, tmp_path / "alone.safetensors", planned=1, config=one), ALONE, CPU)

    job = make_job(splits, tmp_path / "both.safetensors", planned=2, config=two)
    both, fit_of_both, _ = launch(job, number=2, environment={})

    for mine, other in zip(told(fit_of_both), told(fit), strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    for name, tensor in alone.weights.items():
        assert torch.allclose(both.weights[name], tensor, rtol=1e-3, atol=1e-4), name


class AbortedJob(Job):
    """Its processes would be aborted as Python ends, as by a thread that torch has left."""

    def snapshots(self, device: torch.device, number: int) -> Snapshots:
        """Which are asked for before training."""
        atexit.register(os.abort)
        return super().snapshots(device, number)


def test_two_ranks_train_as_one_process_that_plays_both(splits, tmp_path):
    """Statistics of norms, dropped paths and all: on another number of ranks nothing but rounding differs.

    Files that cannot be read included, which the first rank knows of though the second alone has met one. What happens
    to a rank after its work costs nothing.
    """
    bad = {7, 51}  # images to train on, which both may read, and to validate on
    one, two = (spoil(splits, tmp_path / name, bad, most_bad=len(bad)) for name in ("of one", "of two"))
    alone, fit, unreadable = work(make_job(one, tmp_path / "alone.safetensors", planned=2), ALONE, CPU)
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    job = AbortedJob(**vars(make_job(two, tmp_path / "both.safetensors", planned=2)))
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    both, fit_of_both, unreadable_by_both = launch(job, number=2, environment=path)

    for mine, other in zip(told(fit_of_both), told(fit), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for name, tensor in alone.weights.items():
        assert torch.allclose(both.weights[name], tensor, rtol=1e-3, atol=1e-4), name
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    for met, root in ((unreadable, one.train.source.root), (unreadable_by_both, two.train.source.root)):
        assert {file.partition(": ")[0] for file in met} == {f"{root / str(row)}.jpg" for row in bad}
    # With the images of two batches an update, its rate is doubled.
    rates = [row["learning_rate"] for row in fit.history]
    assert max(rates) > CONFIG.training.learning_rate


def test_images_are_counted_that_all_ranks_have_trained_on(splits, tmp_path):
    """Of 50 those in whole batches of all four: of 4 images for each in the first stage, of 8 in the second."""
    _, fit, _ = work(make_job(splits, tmp_path / "state.safetensors", planned=4), ALONE, CPU)

    assert [row["images"] for row in fit.history] == [48, 96, 96 + 32, 96 + 64]


@pytest.mark.slow
def test_what_a_rank_fails_of_is_told_and_no_process_is_left(splits, tmp_path):
    spoilt = spoil(splits, tmp_path / "images", {7}, most_bad=0)

    with pytest.raises(UserError, match=r"7\.jpg"):
        launch(make_job(spoilt, tmp_path / "state.safetensors", planned=2), number=2, environment={})

    assert ranks() == []


class SlowJob(Job):
    """Is at its third look for several times the grace of a rank that is alone; tells when that begins."""

    def snapshots(self, device: torch.device, number: int) -> Snapshots:
        """Which are asked after every update, of the first rank alone."""
        sys.modules["__main__"].GRACE_SECONDS = 1.0
        snapshots, looks = super().snapshots(device, number), itertools.count(1)

        def is_due() -> bool:
            if next(looks) == 3:
                self.state.with_suffix(".slow").touch()
                self.linger()
            return False

        snapshots.is_due = is_due
        return snapshots

    def linger(self) -> None:
        """A slow disk: until it is told to stop, and on."""
        deadline = time.monotonic() + 120
        while not interrupt.requested() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(4)


class HangingJob(SlowJob):
    """Waits then, as in a collective that no other rank takes part in: not even for signals."""

    def linger(self) -> None:
        """A lock that is taken twice."""
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)


def launch_slowly(job: SlowJob, do: Callable[[], None]) -> None:
    """By two ranks; `do` it when they begin to be slow."""

    def wait() -> None:
        while not job.state.with_suffix(".slow").exists():
            time.sleep(0.05)
        do()

    job.state.parent.mkdir()
    threading.Thread(target=wait, daemon=True).start()
    with interrupt.listen():
        launch(job, number=2, environment={"PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_rank_that_is_killed_is_named_and_no_process_is_left(splits, tmp_path, capfd):
    """At once, and without a word of its launcher on the terminal."""

    job = SlowJob(**vars(make_job(splits, tmp_path / "state" / "last.safetensors", planned=2)))

    with pytest.raises(UserError, match=r"rank 1 \(process \d+\) was ended by SIGKILL .* resume=true to go on"):
        launch_slowly(job, kill_second)

    assert ranks() == []
    assert "torch" not in capfd.readouterr().err


class FailingJob(Job):
    """Fails in the second rank alone, of what nobody has thought of."""

    def snapshots(self, device: torch.device, number: int) -> Snapshots:
        """Which are asked for before training."""
        if os.environ["RANK"] == "1":
            raise RuntimeError("of this rank alone")
        return super().snapshots(device, number)


def test_the_traceback_of_a_rank_is_told_and_no_process_is_left(splits, tmp_path):
    """The one that waits for it is ended."""
    job = FailingJob(**vars(make_job(splits, tmp_path / "state.safetensors", planned=2)))
    where = r"Traceback \(most recent call last\):\n.*in snapshots\n.*\nRuntimeError: of this rank alone"

    with pytest.raises(RuntimeError, match=rf"(?s)^rank 1 \(process \d+\) failed, and the others were ended:\n{where}"):
        launch(job, number=2, environment={"PYTHONPATH": os.pathsep.join(sys.path)})

    assert ranks() == []


@pytest.mark.parametrize("first", [0, 1])
def test_of_ranks_that_fail_in_the_same_second_the_first_is_told(tmp_path, first):
    """The other one misses it."""
    failures = {}
    for rank in (0, 1):
        about = {"message": f"of {rank}", "extraInfo": {"py_callstack": f"of {rank}", "timestamp": "1000"}}
        note = tmp_path / f"{rank}.json"
        note.write_text(json.dumps({"message": about}))
        os.utime(note, ns=(0, 10**12 + (rank != first)))
        failures[rank] = ProcessFailure(rank, 7 + rank, 1, str(note))

    told = launcher._describe(ChildFailedError("ranks", failures), tmp_path)
    assert (told["rank"], told["trace"]) == (first, f"of {first}")


def test_ranks_that_are_told_to_stop_save_however_long_their_update_takes(splits, tmp_path):
    job = SlowJob(**vars(make_job(splits, tmp_path / "state" / "last.safetensors", planned=2)))

    with pytest.raises(Interrupted, match="saved after epoch 0 of 4 and 67 % of the next"):
        launch_slowly(job, lambda: interrupt.request(Interrupted("a test")))

    assert job.state.exists() and ranks() == []


@pytest.mark.slow
def test_ranks_that_a_scheduler_signals_one_by_one_save_all_the_same(splits, tmp_path):
    """Nobody is gone: the signal that says so elsewhere starts no clock."""
    job = SlowJob(**vars(make_job(splits, tmp_path / "state" / "last.safetensors", planned=2)))

    def signal_all() -> None:
        for rank in ranks():
            rank.terminate()
        interrupt.request(Interrupted("a test"))

    with pytest.raises(Interrupted, match="saved after epoch 0 of 4 and 67 % of the next"):
        launch_slowly(job, signal_all)

    assert job.state.exists() and ranks() == []


@pytest.mark.slow
def test_a_rank_that_dies_ends_one_that_hangs_though_all_were_told_to_stop(splits, tmp_path):
    """By its own watch: the agent would need half a minute."""
    job = HangingJob(**vars(make_job(splits, tmp_path / "state" / "last.safetensors", planned=2)))
    killed_at = []

    def stop_and_kill() -> None:
        interrupt.request(Interrupted("a test"))
        time.sleep(3)
        killed_at.append(time.perf_counter())
        kill_second()

    with pytest.raises(UserError, match=r"rank 1 \(process \d+\) was ended by SIGKILL"):
        launch_slowly(job, stop_and_kill)

    assert time.perf_counter() - killed_at[0] < 20 and ranks() == []


def test_counts_that_are_no_part_of_each_other_are_refused():
    with pytest.raises(UserError, match="begun on 4 GPUs and 3 are neither"):
        Share(0, 3, 4)
    assert count_ranks("auto", CPU) == 1 and count_ranks(3, CPU) == 3


def test_more_ranks_than_gpus_are_refused_whoever_starts_them(monkeypatch):
    """Before any of them trains, and on each machine by itself."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="num_gpus=2 and Apple's GPU trains alone"):
        count_ranks(2, torch.device("mps"))
    with pytest.raises(UserError, match=r"num_gpus=4 and this machine has 2: choose at most 2, or num_gpus=auto"):
        count_ranks(4, cuda)
    assert count_ranks("auto", cuda) == count_ranks(2, cuda) == 2

    launched = {"TORCHELASTIC_RUN_ID": "a test", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    refusal = "torchrun has started 4 processes on this machine and there are GPUs for 2"
    for look in (lambda: count_ranks(1, cuda), lambda: own_device("cuda")):
        with pytest.raises(UserError, match=refusal):
            look()
    assert count_ranks(1, CPU) == 8 and own_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert count_ranks(1, cuda) == 8


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", math.sqrt(3)), ("linear", 3)])
def test_the_learning_rate_is_scaled_for_the_ranks_by_a_rule(rule, factor):
    """And nothing else is; one rank has the rate that is given."""
    config = CONFIG.model_copy(update={"rate_scaling": rule})
    settings = Parameters(imagenet=config).of_experiment("imagenet")
    given = settings.training

    rate = scale_rate(settings, 3).learning_rate
    assert rate == pytest.approx(factor * given.learning_rate)
    assert scale_rate(settings, 3) == given.model_copy(update={"learning_rate": rate})
    assert scale_rate(settings, 1) == given


def test_a_rank_whose_terminal_is_gone_ends_well():
    """Its last lines are lost, which is no failure of the training."""
    script = """
import logging, os
from collective_pipeline.training.launch import end
from collective_pipeline.training.rank import _look_after
_look_after(os.getppid())
nobody, output = os.pipe()
os.dup2(output, 2)
os.close(nobody)
logging.info("done")
end()
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    assert subprocess.run([sys.executable, "-c", script], env=buffered, check=False).returncode == 0


class StoppingJob(Job):
    """Is told to stop after two updates of its second epoch, and does so after three of six."""

    def snapshots(self, device: torch.device, number: int) -> Snapshots:
        """Which are asked after every update but an epoch's last, and after every epoch."""
        snapshots, looks = super().snapshots(device, number), itertools.count(1)

        def is_due() -> bool:
            if next(looks) == 8:
                interrupt.request(Interrupted("a test"))
            return False

        snapshots.is_due = is_due
        return snapshots


@pytest.mark.slow
def test_an_interrupted_training_of_two_ranks_goes_on_with_two_or_one(splits, tmp_path):
    """In the middle of an epoch: all stop at the same update, and what the first one saves is the state of both.

    Two end as if nobody had stopped them, to the last bit; one sums in another order.
    """
    whole, fit, _ = launch(make_job(splits, tmp_path / "whole.safetensors", planned=2), number=2, environment={})
    state, copy = tmp_path / "state" / "last.safetensors", tmp_path / "copy" / "last.safetensors"
    stopping = StoppingJob(**vars(make_job(splits, state, planned=2)))

    with pytest.raises(Interrupted, match="saved after epoch 1 of 4 and 50 % of the next"):
        launch(stopping, number=2, environment={"PYTHONPATH": os.pathsep.join(sys.path)})
    shutil.copytree(state.parent, copy.parent)
    by_two, rest_of_two, _ = launch(make_job(splits, state, planned=2, resume=True), number=2, environment={})
    by_one, rest_of_one, _ = work(make_job(splits, copy, planned=2, resume=True), ALONE, CPU)

    assert told(rest_of_two) == told(fit) and rest_of_two.best_epochs == fit.best_epochs
    assert by_two.weights.keys() == whole.weights.keys()
    assert [name for name in whole.weights if not torch.equal(by_two.weights[name], whole.weights[name])] == []
    for mine, other in zip(told(rest_of_one), told(fit), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for name, tensor in whole.weights.items():
        assert torch.allclose(by_one.weights[name], tensor, rtol=1e-3, atol=1e-4), name
