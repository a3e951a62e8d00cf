"""The process that starts the ranks of a training on this machine and watches over them: torch's elastic agent.

`python -m collective_pipeline.training.launcher <folder> <number> <process>` is what `launch` starts: the folder holds
the job, and with that process everything ends. What the agent says of itself goes into the folder; what the first rank
says to the terminal, what the others say into the folder too.
"""

import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from collective_pipeline.training.launch import FAILURE, LOG, LOGS, STOP, end

SECONDS_BETWEEN = 0.5  # of looking at the ranks, and at the process that started this one
NUM_LINES = 20  # of the last ones that a rank has said


def main(folder: Path, number: int, parent: int) -> None:
    """Run the ranks to their end; leave in `folder` which one failed, of what."""
    logs = folder / LOGS
    logs.mkdir()
    _log_into(logs / LOG)
    threading.Thread(target=_watch, args=(parent, folder / STOP), daemon=True).start()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=SECONDS_BETWEEN,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=dict.fromkeys(range(1, number), Std.ALL)),
    )
    rank = ["-m", "collective_pipeline.training.rank", str(folder), str(os.getpid())]
    try:
        elastic_launch(config, sys.executable)(*rank)
    except ChildFailedError as error:
        (folder / FAILURE).write_text(json.dumps(_describe(error, logs)))
        sys.exit(1)
    except SignalException as told:
        sys.exit(128 + told.sigval)
    finally:
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)  # nobody else will


def _log_into(file: Path) -> None:
    """What the agent says; torch gives it a place of its own on the terminal."""
    agent = logging.getLogger("torch.distributed")
    agent.handlers = [logging.FileHandler(file)]


def _describe(error: ChildFailedError, logs: Path) -> dict[str, Any]:
    """The rank that failed first, and of what.

    The others fail of its absence, perhaps before anybody looked, or are ended by SIGTERM: one that any other signal
    has ended is first. Of errors the one that was noted first, by the time of its file: the timestamp in it is of whole
    seconds, and others may fail within the same.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float, int]:
        code, note = item[1].exitcode, Path(item[1].error_file)
        noted_at = note.stat().st_mtime_ns if note.is_file() else math.inf
        return code == -signal.SIGTERM, code >= 0, noted_at, item[1].timestamp

    rank, failure = min(error.failures.items(), key=order)
    message = failure.message
    trace = message["extraInfo"]["py_callstack"] if isinstance(message, dict) else ""
    said = sorted(logs.glob(f"*/attempt_0/{rank}/stderr.log"))
    lines = said[0].read_text(errors="replace").splitlines()[-NUM_LINES:] if said else []
    return {
        "rank": rank,
        "process": failure.pid,
        "code": failure.exitcode,
        "signal": signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else None,
        "trace": trace,
        "said": "\n".join(lines),
    }


def _watch(parent: int, stop: Path) -> None:
    """Let the ranks save and stop when the process that started this one is gone; at once if they had been told to."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN)
    if stop.exists():
        for rank in psutil.Process().children():
            rank.kill()
    stop.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    end()
