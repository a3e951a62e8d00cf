"""Several processes for one training: `launcher` starts them, and what one of them fails of is told.

The launcher is a process of its own, so that it is in its main thread, where signals arrive, whichever thread of Kedro
trains.
"""

import contextlib
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import psutil
import torch

from collective_pipeline.config import UserError
from collective_pipeline.training import interrupt

logger = logging.getLogger(__name__)

# In the folder of a job.
JOB, RESULT, STOP, STOPPED, FAILURE = "job.pickle", "result.pickle", "stop", "stopped", "failure.json"
LOGS, LOG = "logs", "launcher.log"
SECONDS_BETWEEN = 0.2
SECONDS_UNTIL_TOLD = 30.0  # of waiting for ranks that are to stop


def is_launched() -> bool:
    """Whether torchrun has started this process, beside others."""
    return torch.distributed.is_torchelastic_launched()


def count_ranks(wanted: int | Literal["auto"], device: torch.device) -> int:
    """Processes that are to train together: those that torchrun has started, or as many as wanted.

    Raises:
        UserError: If there are fewer GPUs, or such as train alone.
    """
    if is_launched():
        check_own_gpus(device.type)
        return int(os.environ["WORLD_SIZE"])
    if device.type == "mps" and wanted not in {1, "auto"}:
        raise UserError(f"num_gpus={wanted} and Apple's GPU trains alone: choose num_gpus=1, or device=cpu")
    if device.type != "cuda":
        return 1 if wanted == "auto" else wanted
    there = torch.cuda.device_count()
    if wanted == "auto":
        return there
    if wanted > there:
        raise UserError(f"num_gpus={wanted} and this machine has {there}: choose at most {there}, or num_gpus=auto")
    return wanted


def check_own_gpus(device_type: str) -> None:
    """Raise a `UserError` if torchrun has started more processes on this machine than have a GPU each."""
    if device_type != "cuda":
        return
    number, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if number > there:
        raise UserError(
            f"torchrun has started {number} processes on this machine and there are GPUs for {there}: give a smaller "
            "--nproc-per-node"
        )


def end() -> NoReturn:
    """End this process, whose work is done, with what it has said, but without what else Python does then.

    As Python ended, a rank was seen to be aborted after all of its work, by a thread that torch had left; its command
    would have failed.
    """
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a terminal that is gone
            output.flush()
    os._exit(0)


def count_own_cores(number: int | None = None) -> int:
    """A process's share of the cores that it may use; by default of as many processes as the launcher has started."""
    number = number or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // number)


def launch(job: Any, *, number: int, environment: Mapping[str, str]) -> Any:
    """Run `training.rank` in `number` processes, and return what the first one leaves.

    None of them is left when this returns or raises.

    Args:
        job: What each is given; pickled.
        number: Of processes on this machine.
        environment: Variables that they are given as well.

    Raises:
        Interrupted: If this process was told to stop, after the ranks have saved.
        RuntimeError: If a rank fails, with its traceback.
        UserError: If that is of something a user can mend, or if something has ended a rank.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps(job))
        command = [
            sys.executable, "-m", "collective_pipeline.training.launcher", name, str(number), str(os.getpid())
        ]  # fmt: skip
        threads = os.environ.get("OMP_NUM_THREADS") or str(count_own_cores(number))
        logger.info("Starting %d processes", number)
        # A session of its own: Ctrl-C reaches the ranks once, from here.
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": threads, **environment}, start_new_session=True
        )
        try:
            _wait(process, folder / STOP)
        finally:
            _end(process, name)
        stopped = folder / STOPPED
        if stopped.exists():
            interrupt.stop(stopped.read_text())
        if process.returncode and interrupt.requested() and not (folder / FAILURE).exists():
            interrupt.stop("the ranks were ended before they could save; what they had saved before is there")
        if process.returncode:
            raise _error(folder, process.returncode)
        return pickle.loads((folder / RESULT).read_bytes())


def _wait(process: subprocess.Popen[bytes], stop: Path) -> None:
    """Until it ends; if this process is told to stop, the ranks are, with the file `stop`.

    Not with a signal: the launcher sends one when a rank is gone, and then there is nothing to be patient for.
    """
    told_at: float | None = None
    while process.poll() is None:
        if told_at is None and interrupt.requested():
            told_at = time.perf_counter()
            stop.touch()
        if told_at is not None and time.perf_counter() - told_at > SECONDS_UNTIL_TOLD:
            told_at = math.inf
            logger.warning(
                "The ranks stop after what they are at now; a second SIGTERM or Ctrl-C ends them at once, unsaved."
            )
        time.sleep(SECONDS_BETWEEN)


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    """The launcher, and ranks that it could not end: whatever was given this folder."""
    for one in psutil.process_iter():
        # It may be of another user, or gone.
        with contextlib.suppress(psutil.Error):
            if folder in one.cmdline():
                one.kill()
    process.wait()


def _error(folder: Path, code: int) -> Exception:
    """Of the rank that failed first."""
    go_on = "give the same command with --params resume=true to go on from what was saved last"
    try:
        failure = json.loads((folder / FAILURE).read_text())
    except (OSError, ValueError):
        if code < 0:
            return UserError(f"the launcher of the ranks was ended by {signal.Signals(-code).name}: {go_on}")
        log = folder / LOGS / LOG
        said = log.read_text(errors="replace") if log.exists() else ""
        return RuntimeError(f"the launcher of the ranks ended with code {code}:\n{said}")
    who = f"rank {failure['rank']} (process {failure['process']})"
    if failure["signal"] is not None:
        why = " (perhaps the machine's memory was too small for all)" if failure["signal"] == "SIGKILL" else ""
        said = f"; it said last:\n{failure['said']}" if failure["said"] else ""
        return UserError(f"{who} was ended by {failure['signal']}{why}, and the others with it: {go_on}{said}")
    trace = failure["trace"] or f"it ended with code {failure['code']}; it said last:\n{failure['said']}"
    last = trace.strip().splitlines()[-1]
    kinds: list[type[UserError]] = [UserError, *UserError.__subclasses__()]
    for kind in kinds:
        mark = f"{kind.__module__}.{kind.__qualname__}: "
        if last.startswith(mark):
            return UserError(last.removeprefix(mark))
    return RuntimeError(f"{who} failed, and the others were ended:\n{trace}")
