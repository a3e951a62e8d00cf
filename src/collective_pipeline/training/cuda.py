"""What makes a training step one unit on a CUDA device: work recorded once as a graph, and replayed.

Launched one by one, the some hundred small kernels of a step keep the host busy and the card waiting: on an H200 a
replayed step is 6 to 12 times faster. A graph holds addresses, so whatever it reads or writes must stay where it is.
"""

import contextlib
import copy
import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# One at a time: what a recording allocates must come from its own pool.
_RECORDING = threading.Lock()
# The fewer of its own steps the host takes, the less the arms beside each other wait for Python's one lock.
UPDATES_AT_ONCE = 10
# How many calls the host may be ahead of the card: enough that the card never waits. Without a bound, a full queue
# blocks the driver for the arms beside, and being told to stop is noticed late.
MAX_AHEAD = 2


def load_kernels(device: torch.device) -> ModuleType | None:
    """`training.kernels`, or None, told once, where Triton is missing or cannot compile for this device."""
    try:
        from collective_pipeline.training import kernels  # noqa: PLC0415  # Triton comes with torch's CUDA builds only

        with _RECORDING:
            if device not in _tried:  # trying out waits for all that the device has to do
                kernels.try_out(device)
                _tried.add(device)
    except Exception as error:  # Triton, its compiler and the driver each have errors of their own
        _tell_once("Triton cannot be used here (%s): training works with torch's own kernels, and slower.", error)
        return None
    return kernels


def compile_forward(network: nn.Module) -> None:
    """Let torch.compile fuse what `network` computes while it trains."""
    if "forward" not in network.__dict__:  # or an earlier phase has done it
        network.__dict__["forward"] = CompiledForward(network)


class Compiled:
    """A function that torch.compile fuses; where it cannot be compiled, told once, nothing changes."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.compiled = torch.compile(plain, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its compilers have errors of their own
            _tell_once("torch.compile cannot be used here (%s): training works without it, and slower.", error)
            self.compiled = self.plain
            return self.plain(*arguments)


class CompiledForward:
    """The forward pass of a network: compiled where gradients are asked for; elsewhere batches have other sizes."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.plain = type(network).forward.__get__(network)
        self.compiled = Compiled(self.plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self.network, memo))

    def __call__(self, x_SBI: Tensor) -> Any:
        # Not `training`: where a part is frozen the whole counts as evaluated.
        return self.compiled(x_SBI) if torch.is_grad_enabled() else self.plain(x_SBI)


class Recorded(Generic[Result]):
    """Calls of `body`, recorded as a CUDA graph once for each argument; the stream must not be the default one.

    Args:
        body: Works on the device alone. What it returns is overwritten by the next call.
        state: Every tensor that `body` changes, by name. Before recording it is called once to make libraries and
            allocators ready; what it did then is undone, so that all calls that count are replays: a run that goes on
            after a pause rounds like one that was never stopped.
    """

    def __init__(self, body: Callable[..., Result], state: Callable[[], dict[str, Tensor]]) -> None:
        self.body = body
        self.state = state
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Result]] = {}
        self.can_record = True
        self.ahead: deque[torch.cuda.Event] = deque()

    def __call__(self, *arguments: Hashable) -> Result:
        if arguments not in self.graphs and self.can_record:
            self._record(arguments)
        if not self.can_record:
            return self.body(*arguments)
        graph, result = self.graphs[arguments]
        graph.replay()
        replayed = torch.cuda.Event(blocking=True)
        replayed.record()
        self.ahead.append(replayed)
        if len(self.ahead) > MAX_AHEAD:
            self.ahead.popleft().synchronize()
        return result

    def _record(self, arguments: tuple[Hashable, ...]) -> None:
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with _RECORDING, _uncollected():
                self.body(*arguments)
                _make_room()
                # Not `torch.cuda.graph`, which waits for all streams: other arms would stand still for every recording.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    result = self.body(*arguments)
                finally:
                    graph.capture_end()
            self.graphs[arguments] = graph, result
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.can_record = False
            _tell_once(
                "This training step cannot be recorded as a CUDA graph (%s): it works unrecorded, and slower.",
                str(error).splitlines()[0],
            )
        for name, tensor in self.state().items():
            if name in before:
                tensor.copy_(before[name])
            else:
                tensor.zero_()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of garbage: what torch.compile makes stays.

    To look through it again and again took a seventh of its time (ResNet-50, on a machine with an H200).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _make_room() -> None:
    """Free what was only for a moment in use, if a recording, whose memory is its own, would not find as much again."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if torch.cuda.mem_get_info()[0] < kept:
        torch.cuda.empty_cache()


_tried: set[torch.device] = set()
_told: set[str] = set()


def _tell_once(text: str, reason: object) -> None:
    if text not in _told:
        _told.add(text)
        logger.warning(text, reason)
