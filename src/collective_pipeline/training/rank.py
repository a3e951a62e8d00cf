"""One of the processes that train a network together.

`python -m collective_pipeline.training.rank <folder> <process>` is what the launcher, that process, starts; the folder
holds the job.
"""

import contextlib
import logging
import math
import os
import pickle
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from collective_pipeline.config import Arm, Parameters, TrainingConfig, UserError, flatten
from collective_pipeline.data.feeding import choose_threads
from collective_pipeline.data.streaming import Share, StreamedSplits
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.layers import normalise_over_ranks
from collective_pipeline.training import interrupt
from collective_pipeline.training.interrupt import Interrupted
from collective_pipeline.training.launch import JOB, RESULT, STOP, STOPPED, check_own_gpus, count_own_cores, end
from collective_pipeline.training.loop import Callback, Fit
from collective_pipeline.training.progress import make_progress
from collective_pipeline.training.ranks import Ranks
from collective_pipeline.training.snapshots import Snapshots
from collective_pipeline.training.tracking import Curves, join_run
from collective_pipeline.training.train import snapshots_at, train_arm

# A rank that may wait for one that is no longer there ends itself after this time.
GRACE_SECONDS = 8.0
SECONDS_BETWEEN = 0.5  # of looking whether it is to stop
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
        device_type: Of all ranks: cuda or cpu.
    """

    arm: Arm
    splits: StreamedSplits
    settings: Parameters
    state: Path
    num_planned: int
    device_type: str

    @property
    def training(self) -> TrainingConfig:
        """With the learning rate for as many GPUs as planned."""
        return scale_rate(self.settings, self.num_planned)

    def snapshots(self, device: torch.device, number: int) -> Snapshots:
        """Where its state is, for `number` processes."""
        snapshots = snapshots_at(self.state, self.arm, self.splits, self.settings, device)
        own = self.settings.imagenet
        seen = {f"augmentation.{name}": value for name, value in flatten(own.augmentation).items()}
        names = ("rate_scaling", "sync_norm")
        snapshots.identify(num_gpus=self.num_planned, **{name: getattr(own, name) for name in names}, **seen)
        snapshots.circumstances["processes"] = number
        return snapshots


def scale_rate(settings: Parameters, number: int) -> TrainingConfig:
    """The training of these settings with its learning rate for `number` GPUs, by `imagenet.rate_scaling`."""
    training = settings.training
    factor = SCALINGS[settings.imagenet.rate_scaling](number)
    return training.model_copy(update={"learning_rate": factor * training.learning_rate})


def work(job: Job, ranks: Ranks, device: torch.device) -> tuple[Checkpoint, Fit, set[str]]:
    """Train this process's share; the first one reports and saves.

    Returns:
        What came of it, and the files that any of the processes could not read.

    Raises:
        Interrupted: On all ranks, if the first one was told to stop.
    """
    share = Share(ranks.rank, ranks.number, job.num_planned)
    over_ranks = job.settings.imagenet.sync_norm and ranks.number > 1
    if job.settings.imagenet.sync_norm and share.ranks_played > 1:
        raise UserError(
            f"imagenet.sync_norm: training was begun on {job.num_planned} GPUs, and its norms see the batches of all "
            f"at once: go on with num_gpus={job.num_planned}"
        )
    splits = job.splits.for_share(share)
    if job.settings.imagenet.threads is None:
        splits = splits.with_threads(choose_threads(count_own_cores(), device))
    snapshots = job.snapshots(device, ranks.number)
    callbacks: list[Callback] = []
    if ranks.is_first:
        progress = make_progress(job.arm.model_type, job.arm, splits, job.settings, device, num_gpus=ranks.number)
        callbacks = [progress, Curves()]
    checkpoint, fit = train_arm(
        job.arm,
        splits,
        job.training,
        seeds=job.settings.seeds,
        device=device,
        callbacks=callbacks,
        watch=progress.watch if ranks.is_first else iter,
        snapshots=snapshots,
        prepare=(lambda model, _: normalise_over_ranks(model)) if over_ranks else None,
        ranks=ranks,
    )
    return checkpoint, fit, ranks.unite(splits.unreadable)


def lead(job: Job) -> tuple[Checkpoint, Fit, set[str]]:
    """Do a job as the first of the processes that torchrun has started: the others wait for it in `follow`."""
    ranks = Ranks.join()
    ranks.tell(job)
    result = work(job, ranks, own_device(job.device_type))
    ranks.leave()
    return result


@record
def follow() -> None:
    """Do what the first of the processes that torchrun has started gives to all.

    A signal ends it at once while it waits for that: there is nothing to save.
    """
    _look_after(os.getppid())
    ranks = Ranks.join()
    job: Job = ranks.tell(None)
    with interrupt.listen(patient=True):
        with contextlib.suppress(Interrupted):  # the first one tells
            work(job, ranks, own_device(job.device_type))
        ranks.leave()


@record
def main(folder: Path, launcher: int) -> None:
    """Do the job in `folder`; the first rank leaves there what came of it."""
    sys.excepthook = _say_nothing
    _look_after(launcher, folder / STOP)
    with interrupt.listen(patient=True):
        job: Job = pickle.loads((folder / JOB).read_bytes())
        ranks = Ranks.join()
        try:
            with join_run(is_first=ranks.is_first):
                result = work(job, ranks, own_device(job.device_type))
        except Interrupted as stopped:
            if ranks.is_first:
                (folder / STOPPED).write_text(stopped.what)
        else:
            if ranks.is_first:
                (folder / RESULT).write_bytes(pickle.dumps(result))
        ranks.leave()


def _say_nothing(*error: object) -> None:
    """Of an error that ends this process: `record` has noted it, and the command tells of it."""


def _look_after(parent: int, stop: Path | None = None) -> None:
    """Log as the command does; stop when told to, and when the process that started this one, `parent`, is gone.

    Args:
        parent: Its launcher, or torchrun.
        stop: The file with which the launcher tells it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_watch, args=(parent, stop), daemon=True).start()


def own_device(device_type: str) -> torch.device:
    """The GPU of this rank on its machine, or the CPU.

    Raises:
        UserError: If there are fewer GPUs than ranks.
    """
    check_own_gpus(device_type)
    if device_type != "cuda":
        return torch.device(device_type)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _watch(parent: int, stop: Path | None) -> None:
    """Stop when told to, however long the present update takes; end where there is no other rank to stop with.

    That is where the process that started this one is gone, which watches over all, and where the launcher sends a
    signal because a rank is gone. Whoever wants to stop tells with a file; a scheduler that sends its signal to all
    processes leaves them there. Under torchrun, which sends the same signal for both, torchrun says how long it waits.
    """
    alone_at: float | None = None
    while True:
        time.sleep(SECONDS_BETWEEN)
        is_orphan = os.getppid() != parent
        if not interrupt.requested() and (is_orphan or (stop is not None and stop.exists())):
            interrupt.request(Interrupted("it was told to"))
        if is_orphan or (interrupt.was_signalled() and stop is not None and _is_one_gone(parent)):
            alone_at = alone_at or time.perf_counter()
        if alone_at is not None and time.perf_counter() - alone_at > GRACE_SECONDS:
            os._exit(1)


def _is_one_gone(launcher: int) -> bool:
    """Whether a rank that it has started is no more."""
    try:
        ranks = psutil.Process(launcher).children()
        at_work = [rank for rank in ranks if rank.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return True
    return len(at_work) < int(os.environ["LOCAL_WORLD_SIZE"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    end()
