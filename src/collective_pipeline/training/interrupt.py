"""Being told to stop: SIGTERM, Ctrl-C and a lost terminal end training at the next step; what was done is saved."""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from collective_pipeline.config import UserError

logger = logging.getLogger(__name__)

# coreutils' timeout tells the process and then the group that it is in: that is no second stop.
SECONDS_OF_ONE_STOP = 0.5
SECONDS_OF_HANG_UP = 10.0  # in which what reads the output, `tee` for example, ends with the terminal

_received: list[signal.Signals] = []
_requests: list[BaseException] = []


class Interrupted(UserError):
    """The run was told to stop, and its work is saved: `what` says which."""

    def __init__(self, what: str) -> None:
        stop = _received[0] if _received else signal.SIGTERM
        super().__init__(f"stopped by {stop.name}: {what}")
        self.what = what
        self.exit_code = 128 + stop


def requested() -> bool:
    """Whether the run was told to stop."""
    return bool(_received or _requests)


def was_signalled() -> bool:
    """Whether a signal told it so."""
    return bool(_received)


def request(cause: BaseException) -> None:
    """Let everything else stop because of this error, as if SIGTERM had come."""
    _requests.append(cause)


def stop(what: str) -> NoReturn:
    """End what was stopped, after its work is saved.

    Raises:
        Interrupted: Or the error because of which everything stops: whoever is first tells of it.
    """
    raise next((cause for cause in _requests if not isinstance(cause, Interrupted)), Interrupted(what))


@contextlib.contextmanager
def listen(*, patient: bool = False, saves: bool = True) -> Iterator[None]:
    """Notice SIGTERM, SIGINT and, unless it is ignored (`nohup`), SIGHUP, which comes when a connection is lost.

    A second SIGTERM or SIGINT ends the process at once, unless it is `patient`. SIGHUP counts for neither: the kernel,
    the shell and the session's end send it, each in its own time, and nobody who is impatient.

    Only the main thread can listen. A worker hears of one stop from its terminal and from the process that started it.

    Args:
        patient: Whether it waits for what was told to stop, however often it is told.
        saves: Whether what it does is training whose state is saved, as whoever stops it is told.
    """
    is_main = threading.current_thread() is threading.main_thread()
    _forget()
    try:
        with _Listening(patient=patient, saves=saves) if is_main else contextlib.nullcontext():
            yield
    finally:
        _forget()


def _forget() -> None:
    _received.clear()
    _requests.clear()


class _Listening:
    """Two hear every signal: a handler in the main thread, and a thread that reads what Python writes of them.

    The kernel may give a signal to any thread, and Python's handlers run when the main one is next in Python: one that
    waited for others was seen to hear a minute and a half later.
    """

    def __init__(self, *, patient: bool, saves: bool) -> None:
        self.patient = patient
        self.how = "stops at the next step; what trains saves its state" if saves else "ends as soon as it can"
        self.left = (
            "; --params resume=true goes on from the last saved state, if there is one" if saves else ", unsaved"
        )
        self.is_told = False
        self.telling = threading.RLock()  # a handler may run within itself

    def __enter__(self) -> Self:
        reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        self.handlers_before = {number: signal.getsignal(number) for number in _stops()}
        self.writing_before = signal.set_wakeup_fd(self.writing)
        for number in self.handlers_before:
            signal.signal(number, self._handle)
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.writing_before)
        os.close(self.writing)  # which ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_news(number):
            self._tell(number)

    def _read(self, reading: int) -> None:
        first_at: float | None = None
        with open(reading, "rb", buffering=0) as signals:
            while told := signals.read(64):
                numbers = [number for number in told if number in self.handlers_before]
                if not numbers:
                    continue
                if self._is_news(numbers[0]):
                    # Whoever reads the log may be slow, and a second signal must not wait for that.
                    threading.Thread(target=self._tell, args=(numbers[0],), daemon=True).start()
                if signal.SIGHUP in numbers:
                    threading.Thread(target=leave_terminal, args=(SECONDS_OF_HANG_UP,), daemon=True).start()
                counted = [number for number in numbers if number != signal.SIGHUP]
                if not counted:
                    continue
                now = time.perf_counter()
                first_at = first_at or now
                if now - first_at > SECONDS_OF_ONE_STOP and not self.patient:
                    with contextlib.suppress(OSError):  # of a terminal that is gone
                        name = signal.Signals(counted[0]).name
                        os.write(2, f"{name} again: the run ends at once{self.left}.\n".encode())
                    os._exit(128 + counted[0])

    def _is_news(self, number: int) -> bool:
        with self.telling:
            is_news, self.is_told = not self.is_told, True
            if is_news:
                _received.append(signal.Signals(number))
                if number == signal.SIGHUP:
                    leave_terminal()  # before anybody writes that all is saved
        return is_news

    def _tell(self, number: int) -> None:
        # What is patient was told by a process that says so itself.
        level = logging.DEBUG if self.patient else logging.WARNING
        logger.log(level, "%s: the run %s.", signal.Signals(number).name, self.how)


def _stops() -> list[signal.Signals]:
    """What is listened for."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def leave_terminal(seconds: float = 0.0) -> None:
    """Lose what is written to a terminal, or to a process, that is gone or goes in the next `seconds`.

    To write would be an error, and a process that has written in vain ends with code 120.
    """
    if not hasattr(select, "poll"):  # as in Python on some Macs
        return
    outputs, left = select.poll(), {1, 2}
    for number in left:
        outputs.register(number, 0)  # which is told of errors alone
    until = time.perf_counter() + seconds
    while left and (told := outputs.poll(1000 * max(0.0, until - time.perf_counter()))):
        for number, event in told:
            outputs.unregister(number)
            left.discard(number)
            if event & (select.POLLHUP | select.POLLERR):
                # A lost line must not cost what is saved.
                with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), number)


def _leave_to_parent() -> None:
    """In a process that was forked: the parent's listening is not its own, and what ends others ends it."""
    for number in _stops():
        if isinstance(getattr(signal.getsignal(number), "__self__", None), _Listening):
            signal.set_wakeup_fd(-1)
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)
