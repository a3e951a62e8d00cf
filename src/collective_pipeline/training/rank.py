"""One of the processes that train a network together.

`python -m collective_pipeline.training.rank <folder>` is what the launcher starts; the folder holds the job.
"""

import logging
import math
import os
import pickle
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from collective_pipeline.config import Arm, Parameters, TrainingConfig
from collective_pipeline.data.streaming import Share, StreamedSplits
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.training import interrupt
from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.loop import Callback, Fit
from collective_pipeline.training.progress import Progress
from collective_pipeline.training.ranks import Ranks
from collective_pipeline.training.snapshots import Snapshots
from collective_pipeline.training.tracking import Curves, join_run
from collective_pipeline.training.train import snapshots_at, train_arm

# A rank that was told to stop and waits for one that is no longer there ends itself after this time.
GRACE_SECONDS = 20.0
SCALINGS = {"none": lambda number: 1.0, "sqrt": math.sqrt, "linear": float}


@dataclass(frozen=True)
class Job:
    """A training for several processes.

    Attributes:
        arm: The network.
        splits: Its images.
        settings: With the training, before its learning rate is scaled.
        state: The file in which it is saved.
        num_planned: How many ranks it was begun on.
    """

    arm: Arm
    splits: StreamedSplits
    settings: Parameters
    state: Path
    num_planned: int

    @property
    def training(self) -> TrainingConfig:
        """With the learning rate for as many GPUs as planned."""
        training = self.settings.training
        factor = SCALINGS[self.settings.imagenet.rate_scaling](self.num_planned)
        return training.model_copy(update={"learning_rate": factor * training.learning_rate})

    def snapshots(self, device: torch.device, number: int) -> Snapshots:
        """Where its state is, for `number` processes."""
        snapshots = snapshots_at(self.state, self.arm, self.splits, self.settings, device)
        snapshots.identify(num_gpus=self.num_planned, rate_scaling=self.settings.imagenet.rate_scaling)
        snapshots.circumstances["processes"] = number
        return snapshots


def work(job: Job, ranks: Ranks, device: torch.device) -> tuple[Checkpoint, Fit]:
    """Train this process's share; the first one reports and saves.

    Raises:
        Interrupted: On all ranks, if the first one was told to stop.
    """
    snapshots = job.snapshots(device, ranks.number)
    callbacks: list[Callback] = []
    if ranks.is_first:
        progress = Progress(
            job.arm.model_type, num_epochs=job.settings.training.epochs, num_arms=1, device_type=device.type
        )
        callbacks = [progress, Curves()]
    return train_arm(
        job.arm,
        job.splits.for_share(Share(ranks.rank, ranks.number, job.num_planned)),
        job.training,
        seeds=job.settings.seeds,
        device=device,
        callbacks=callbacks,
        watch=progress.watch if ranks.is_first else iter,
        snapshots=snapshots,
        ranks=ranks,
    )


def own_device(device_type: str) -> torch.device:
    """The GPU of this rank on its machine, or the CPU."""
    if device_type != "cuda":
        return torch.device(device_type)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


@record
def main(folder: Path) -> None:
    """Do the job in `folder`; the first rank leaves there what came of it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with interrupt.listen(patient=True):
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
        job = pickle.loads((folder / "job.pickle").read_bytes())
        device = own_device(job.device_type)
        ranks = Ranks.join(device)
        try:
            with join_run(is_first=ranks.is_first):
                result = work(job.job, ranks, device)
        except Interrupted as stopped:
            if ranks.is_first:
                (folder / "stopped").write_text(stopped.what)
            return
        if ranks.is_first:
            (folder / "result.pickle").write_bytes(pickle.dumps(result))
        ranks.leave()


@dataclass(frozen=True)
class Order:
    """A job, and where it is to be done."""

    job: Job
    device_type: str


def _watch(parent: int) -> None:
    """Stop when the process that started this one is gone, and end what cannot stop because another rank is gone."""
    told_at: float | None = None
    while True:
        time.sleep(0.5)
        if os.getppid() != parent:
            interrupt.request(Interrupted("the process that started it is gone"))
        if interrupt.requested():
            told_at = told_at or time.perf_counter()
            if time.perf_counter() - told_at > GRACE_SECONDS:
                os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
