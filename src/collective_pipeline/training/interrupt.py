"""Being told to stop: SIGTERM and Ctrl-C end training at the next step, after what was done is saved."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from collective_pipeline.config import UserError

logger = logging.getLogger(__name__)

_received: list[signal.Signals] = []
_causes: list[BaseException] = []


class Interrupted(UserError):
    """The run was told to stop, and its work is saved."""

    def __init__(self, what: str) -> None:
        stop = _received[0] if _received else signal.SIGTERM
        super().__init__(f"stopped by {stop.name}: {what}")
        self.what = what
        self.exit_code = 128 + stop


def requested() -> bool:
    """Whether the run was told to stop."""
    return bool(_received)


def request(cause: BaseException) -> None:
    """Let everything else stop because of this error, as if SIGTERM had come."""
    if not isinstance(cause, Interrupted):
        _causes.append(cause)
    _received.append(signal.SIGTERM)


def stop(what: str) -> NoReturn:
    """End what was stopped, after its work is saved.

    Raises:
        Interrupted: Or the error because of which everything stops: whoever is first tells of it.
    """
    raise _causes[0] if _causes else Interrupted(what)


@contextlib.contextmanager
def listen(*, patient: bool = False, saves: bool = True) -> Iterator[None]:
    """Notice SIGTERM and SIGINT; a second one ends the process at once, unless it is `patient`.

    Only the main thread can listen. A worker hears of one stop from its terminal and from the process that started it.

    Args:
        patient: Whether it waits for what was told to stop, however often it is told.
        saves: Whether what it does is training whose state is saved, as whoever stops it is told.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if is_main else {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def notice(number: int, frame: FrameType | None) -> None:
        _received.append(signal.Signals(number))
        # What is patient was told by a process that says so itself.
        level = logging.DEBUG if patient else logging.WARNING
        how = "stops at the next step; what trains saves its state" if saves else "ends as soon as it can"
        logger.log(level, "%s: the run %s.", _received[-1].name, how)
        if not patient:
            restore()

    _received.clear()
    _causes.clear()
    for number in before:
        signal.signal(number, notice)
    try:
        yield
    finally:
        restore()
        _received.clear()
        _causes.clear()
