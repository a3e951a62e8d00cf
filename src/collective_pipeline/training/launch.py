"""Several processes for one training: torch's elastic launcher starts them, and what one of them fails of is told.

The launcher is a process of its own, so that it is in its main thread, where signals arrive, whichever thread of Kedro
trains.
"""

import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from collective_pipeline.config import UserError
from collective_pipeline.training import interrupt

logger = logging.getLogger(__name__)

# In the folder of a job.
JOB, RESULT, STOPPED = "job.pickle", "result.pickle", "stopped"
SECONDS_BETWEEN = 0.2
# After being told to stop, for ranks to save; the launcher itself waits 30 s for them.
PATIENCE_SECONDS = 60.0


def is_launched() -> bool:
    """Whether torchrun has started this process, beside others."""
    return torch.distributed.is_torchelastic_launched()


def count_ranks(wanted: int | Literal["auto"], device: torch.device) -> int:
    """Processes that are to train together: those that torchrun has started, or as many as wanted.

    Raises:
        UserError: If there are fewer GPUs.
    """
    if is_launched():
        return int(os.environ["WORLD_SIZE"])
    if device.type != "cuda":
        return 1 if wanted == "auto" else wanted
    there = torch.cuda.device_count()
    if wanted == "auto":
        return there
    if wanted > there:
        raise UserError(f"num_gpus={wanted} and this machine has {there}: choose at most {there}, or num_gpus=auto")
    return wanted


def launch(job: Any, *, number: int, environment: Mapping[str, str]) -> Any:
    """Run `training.rank` in `number` processes, and return what the first one leaves.

    Args:
        job: What each is given; pickled.
        number: Of processes on this machine.
        environment: Variables that they are given as well.

    Raises:
        Interrupted: If this process was told to stop, after the ranks have saved.
        RuntimeError: If a rank fails, with its traceback.
        UserError: If that is of something a user can mend.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps(job))
        failure = folder / "failure.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}",
            "--monitor-interval=0.5", f"--log-dir={folder / 'logs'}",
            "-m", "collective_pipeline.training.rank", str(folder),
        ]  # fmt: skip
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // number))
        variables = {**os.environ, "OMP_NUM_THREADS": threads, **environment, "TORCHELASTIC_ERROR_FILE": str(failure)}
        # A session of its own: Ctrl-C reaches the ranks once, from here, and whatever is left of them can be ended.
        process = subprocess.Popen(command, env=variables, start_new_session=True)
        try:
            _wait(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stopped = folder / STOPPED
        if stopped.exists():
            interrupt.stop(stopped.read_text())
        if process.returncode:
            raise _error(failure, process.returncode)
        return pickle.loads((folder / RESULT).read_bytes())


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Until it ends; if this process is told to stop, it is told too."""
    told_at: float | None = None
    while process.poll() is None:
        if told_at is None and interrupt.requested():
            told_at = time.perf_counter()
            process.terminate()
        if told_at is not None and time.perf_counter() - told_at > PATIENCE_SECONDS:
            return
        time.sleep(SECONDS_BETWEEN)


def _error(failure: Path, code: int) -> Exception:
    try:
        told = json.loads(failure.read_text())["message"]
    except (OSError, ValueError, KeyError):
        return RuntimeError(f"the ranks ended with code {code}, and none said why: their last lines are above")
    trace = told["extraInfo"]["py_callstack"] if isinstance(told, dict) else str(told)
    last = trace.strip().splitlines()[-1]
    mark = f"{UserError.__module__}.{UserError.__qualname__}: "
    if last.startswith(mark):
        return UserError(last.removeprefix(mark))
    return RuntimeError(f"a rank failed, and the others were ended:\n{trace}")
