"""Kill a random one of the processes that train together, at random moments; go on; compare with an unbroken run.

    python benchmarks/killed_ranks.py [--kills 30] [--ranks 2] [--device cpu] [--seed 0] [--minutes 15]

A small residual network trains on generated JPEG files with everything that has a state, and saves many times a second.
SIGKILL ends a rank: a quarter of them while they start, the others at a random moment from when they have met, while
they train, validate, save or leave. Then the training must be given up with the name of the rank within 30 s, no
process of it may be left, and the same command with resume=true goes on, until it is killed again or done; what is done
is compared with the unbroken run, weights and history bit for bit, and the next training begins. Prints a line for each
kill, and fails if one of them is otherwise.
"""

import argparse
import importlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from collective_pipeline.config import (
    AugmentationConfig,
    ImageNetConfig,
    Parameters,
    Stage,
    TrainingConfig,
    UserError,
)
from collective_pipeline.data.feeding import Crop
from collective_pipeline.data.jpeg import encode
from collective_pipeline.data.packed import FileImages
from collective_pipeline.data.streaming import StreamedImages, StreamedSplits
from collective_pipeline.evaluation.gpu import USAGE_COLUMNS
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.pipelines.imagenet.nodes import make_arm
from collective_pipeline.training import snapshots
from collective_pipeline.training.launch import launch
from collective_pipeline.training.loop import Fit
from collective_pipeline.training.rank import Job
from collective_pipeline.training.runtime import choose_device
from conditions import describe

CLOCKS = {"seconds", *USAGE_COLUMNS}
SIZES = {"train": 640, "val": 160, "test": 32}
MOST_SECONDS = 30.0
SHARE_AT_START = 0.25
CONFIG = ImageNetConfig(
    model="resnet18",
    stem="cifar",
    width=8,
    drop_path=0.2,
    seeds=(1,),
    threads=1,
    training=TrainingConfig(
        epochs=4,
        stages=(Stage(epochs=2, image_size=24, batch_size=8), Stage(epochs=2, image_size=32)),
        batch_size=16,
        accumulation_steps=2,
        eval_batch_size=16,
        optimizer="sgd",
        learning_rate=0.02,
        schedule="one_cycle",
        mixup_alpha=0.2,
        ema_decay=0.9,
    ),
)


class HastyJob(Job):
    """Saves whenever it can, and tells that it begins."""

    def snapshots(self, device: torch.device, number: int) -> snapshots.Snapshots:
        """As for any job."""
        begun_file(self.state).parent.mkdir(exist_ok=True)
        begun_file(self.state).touch()
        snapshots.SECONDS_BETWEEN, snapshots.SHARE = 0.1, 0.5
        return super().snapshots(device, number)


def begun_file(state: Path) -> Path:
    """Is there when a rank begins."""
    return state.parent / "begun"


def make_splits(root: Path) -> StreamedSplits:
    """Noise with a bright row that tells the class."""
    generator = torch.Generator().manual_seed(0)
    number = sum(SIZES.values())
    labels = torch.arange(number) % 3
    for row, label in enumerate(labels.tolist()):
        image = torch.randint(0, 80, (3, 60, 72), generator=generator, dtype=torch.uint8)
        image[:, 20 * label : 20 * label + 20] += 150
        (root / f"{row}.jpg").write_bytes(encode(image, 95))
    files = FileImages(root, [f"{row}.jpg" for row in range(number)], labels)
    train, val, test = (
        StreamedImages(files, rows, 32, Crop(), threads=1) for rows in torch.arange(number).split(list(SIZES.values()))
    )
    return StreamedSplits("imagenet", train, val, test, tuple("abc"), "generated", AugmentationConfig())


def train(splits: StreamedSplits, state: Path, options: argparse.Namespace) -> tuple[Checkpoint, Fit]:
    """By as many ranks, going on from `state`."""
    # Ranks look for the class in this file's module, which has another name when it is the script.
    make_job = importlib.import_module(Path(__file__).stem).HastyJob
    settings = Parameters(imagenet=CONFIG, resume=True).of_experiment("imagenet")
    job = make_job(make_arm(CONFIG, splits.num_classes), splits, settings, state, options.ranks, options.device)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    checkpoint, fit, _ = launch(job, number=options.ranks, environment={"PYTHONPATH": path})
    return checkpoint, fit


def processes_of(module: str = "collective_pipeline.training.rank") -> list[psutil.Process]:
    """Those below this one that run this module."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if module in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


class Killer(threading.Thread):
    """Ends one rank so many seconds after all of them were started, or have `begun`, unless they are done before."""

    def __init__(self, number: int, which: int, seconds: float, begun: Path | None) -> None:
        super().__init__(daemon=True)
        self.number, self.which, self.seconds, self.begun = number, which, seconds, begun
        self.killed: int | None = None
        self.killed_at = 0.0
        self.over = threading.Event()

    @classmethod
    def draw(cls, seed: str, number: int, state: Path, seconds: tuple[float, float]) -> "Killer":
        """A random rank and moment, where starting and training take so many `seconds`."""
        draw = random.Random(seed)
        at_start = draw.random() < SHARE_AT_START
        moment = draw.uniform(0, seconds[not at_start])
        return cls(number, draw.randrange(number), moment, None if at_start else begun_file(state))

    def run(self) -> None:
        """Wait, and kill."""
        while len(ranks := processes_of()) < self.number and not self.over.wait(0.05):
            pass
        while self.begun is not None and not self.begun.exists() and not self.over.wait(0.05):
            pass
        if not self.over.wait(self.seconds):
            ranks = sorted(ranks, key=lambda rank: rank.pid)
            try:
                ranks[self.which].kill()
            except psutil.NoSuchProcess:
                return
            self.killed, self.killed_at = ranks[self.which].pid, time.perf_counter()


def end_of(result: tuple[Checkpoint, Fit]) -> tuple[dict[str, torch.Tensor], str]:
    """What must be the same: weights, and the history without its clock."""
    checkpoint, fit = result
    history = [{name: value for name, value in row.items() if name not in CLOCKS} for row in fit.history]
    return checkpoint.weights, json.dumps([history, fit.best_epochs])


def differing(one: tuple[dict[str, torch.Tensor], str], other: tuple[dict[str, torch.Tensor], str]) -> list[str]:
    """What is not the same bit for bit."""
    weights = all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
    return [what for what, same in (("weights", weights), ("history", one[1] == other[1])) if not same]


def place_in(state: Path) -> str:
    """How far training is saved."""
    for path in (state, state.with_name(f"previous.{state.name}")):
        if path.exists():
            place = snapshots.read_snapshot(path).facts["place"]
            return f"epoch {place['epoch']} + {place['update']}"
    return "nothing"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no other kill begins")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    print(describe(choose_device(options.device)), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        splits = make_splits(folder / "images")
        started, state = time.time(), folder / "unbroken" / "last.safetensors"
        wanted = end_of(train(splits, state, options))
        begun = begun_file(state).stat().st_mtime
        seconds = begun - started, time.time() - begun
        print(f"Unbroken: {seconds[0]:.0f} s to start {options.ranks} ranks, {seconds[1]:.0f} s to train\n", flush=True)
        print(f"{'kill':>5}{'rank':>6}{'during':>10}{'after':>8}{'ended s':>9}  {'saved':<16}verdict", flush=True)
        verdicts = run_kills(splits, folder / "broken", wanted, seconds, options)
    good = sum(verdict == "clean" for verdict in verdicts)
    print(f"{good} of {len(verdicts)} kills ended cleanly, went on, and ended as the unbroken run")
    sys.exit(good != len(verdicts))


def run_kills(
    splits: StreamedSplits,
    folder: Path,
    wanted: tuple[dict[str, torch.Tensor], str],
    seconds: tuple[float, float],
    options: argparse.Namespace,
) -> list[str]:
    """What became of each kill; trainings that end are compared, and the next one begins."""
    state, verdicts, deadline = folder / "last.safetensors", [], time.perf_counter() + 60 * options.minutes
    tries = 0
    pending: list[int] = []  # kills of the training that goes on
    while True:
        last = len(verdicts) == options.kills or time.perf_counter() > deadline
        begun_file(state).unlink(missing_ok=True)
        killer = Killer.draw(f"{options.seed}/{len(verdicts)}/{tries}", options.ranks, state, seconds)
        tries += 1
        if not last:
            killer.start()
        try:
            result = train(splits, state, options)
        except (UserError, RuntimeError) as error:
            killer.over.set()
            ended = time.perf_counter() - killer.killed_at
            verdict = judge(str(error), killer, ended)
            pending.append(len(verdicts))
            verdicts.append(verdict)
            phase = "start" if killer.begun is None else "training"
            row = f"{len(verdicts):>5}{killer.which:>6}{phase:>10}{killer.seconds:>6.1f} s{ended:>9.1f}"
            print(f"{row}  {place_in(state):<16}{verdict}", flush=True)
            continue
        killer.over.set()
        found = differing(end_of(result), wanted)
        for kill in pending if found else []:
            verdicts[kill] = "DIFFERS"
        told = f"of other {' and '.join(found)}" if found else "identical"
        print(f"{'':>5}the end after {len(pending)} kills is {told}", flush=True)
        pending.clear()
        shutil.rmtree(folder)
        if last:
            return verdicts


def judge(message: str, killer: Killer, seconds: float) -> str:
    """Whether a kill ended as it should."""
    if killer.killed is None:
        return f"FAILED WITHOUT A KILL: {message}"
    left = processes_of() + processes_of("collective_pipeline.training.launcher")
    if left:
        return f"LEFT {len(left)} PROCESSES"
    if f"rank {killer.which} (process {killer.killed})" not in message or "SIGKILL" not in message:
        return f"NOT NAMED: {message}"
    return "clean" if seconds <= MOST_SECONDS else "TOO LATE"


if __name__ == "__main__":
    main()
