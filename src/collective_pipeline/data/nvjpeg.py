"""NVIDIA's JPEG decoder by its own interface: the units that some cards have for it, beside those that compute.

torchvision has one such decoder in a process, on a stream of the lowest priority: whatever trains keeps it waiting.
Here every thread has one of its own while it decodes, on the stream that it works on.

Functions, numbers and the layout of structures are those of nvjpeg.h.
"""

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview  # one file

HARDWARE, RGB = 3, 3  # of nvjpegBackend_t and nvjpegOutputFormat_t
MAX_COMPONENTS = 4
# Planes begin where wide stores may.
ALIGNMENT = 256
SIGNATURES: dict[str, list[Any]] = {
    "nvjpegCreateEx": [c_int, c_void_p, c_void_p, c_uint, POINTER(c_void_p)],
    "nvjpegJpegStateCreate": [c_void_p, POINTER(c_void_p)],
    "nvjpegJpegStreamCreate": [c_void_p, POINTER(c_void_p)],
    "nvjpegJpegStreamParseHeader": [c_void_p, c_void_p, c_size_t, c_void_p],
    "nvjpegDecodeBatchedSupported": [c_void_p, c_void_p, POINTER(c_int)],
    "nvjpegDecodeBatchedInitialize": [c_void_p, c_void_p, c_int, c_int, c_int],
    "nvjpegDecodeBatched": [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p],
}


class Refused(RuntimeError):
    """nvJPEG has given an error: which one, and of which function."""


class Decoder:
    """Decodes lists of files, for one thread at a time.

    Raises:
        Refused: If the card has no such units.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._handle, self._state, self._header = c_void_p(), c_void_p(), c_void_p()
        self._number = 0  # of files in the lists that it is prepared for
        self._call("nvjpegCreateEx", HARDWARE, None, None, 0, byref(self._handle))
        self._call("nvjpegJpegStateCreate", self._handle, byref(self._state))
        self._call("nvjpegJpegStreamCreate", self._handle, byref(self._header))

    def decode(
        self, files: Sequence[Buffer], sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> list[Tensor | None]:
        """Every file as uint8 `(3, H, W)` when it is there; nothing in place of what is not supported, or damaged.

        Args:
            files: Baseline JPEG files.
            sizes: Height and width of each.
            device: Of the current stream.
        """
        if not files:
            return []
        try:
            return [*self._decode_together(files, sizes, device)]
        except Refused:  # one of them fails them all
            supported = [row for row, file in enumerate(files) if self._supports(file)]
            images: list[Tensor | None] = [None] * len(files)
            if len(supported) < len(files):
                some = self.decode([files[row] for row in supported], [sizes[row] for row in supported], device)
                for row, image in zip(supported, some, strict=True):
                    images[row] = image
            return images

    def _decode_together(
        self, files: Sequence[Buffer], sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> list[Tensor]:
        heights, widths = np.array(sizes, dtype=np.int64).T
        planes = heights * widths
        spaces = -(-3 * planes // ALIGNMENT) * ALIGNMENT
        memory = torch.empty(int(spaces.sum()), dtype=torch.uint8, device=device)
        # nvjpegImage_t: the addresses of as many planes, then the bytes of a row of each.
        images = np.zeros((len(files), 2 * MAX_COMPONENTS), dtype=np.uint64)
        first = memory.data_ptr() + spaces.cumsum() - spaces
        for channel in range(3):
            images[:, channel] = first + channel * planes
            images[:, MAX_COMPONENTS + channel] = widths
        addresses = np.array([_address(file) for file in files], dtype=np.uint64)
        lengths = np.array([len(file) for file in files], dtype=np.uint64)
        stream = torch.cuda.current_stream(device)
        try:
            self._prepare(len(files))
            tables = (table.ctypes.data for table in (addresses, lengths, images))
            self._call("nvjpegDecodeBatched", self._handle, self._state, *tables, stream.cuda_stream)
        finally:  # files and memory are wanted until then, whether it went well or not
            _wait_for(stream)
        pieces = memory.split(spaces.tolist())
        return [
            piece[: 3 * height * width].view(3, height, width)
            for piece, (height, width) in zip(pieces, sizes, strict=True)
        ]

    def _prepare(self, number: int) -> None:
        """For lists of so many files, if it is not for these already."""
        if number != self._number:
            self._number = 0  # whatever comes of it
            self._call("nvjpegDecodeBatchedInitialize", self._handle, self._state, number, 1, RGB)
            self._number = number

    def _supports(self, file: Buffer) -> bool:
        """Whether it can be decoded, as far as its header says."""
        answer = c_int(-1)
        try:
            self._call("nvjpegJpegStreamParseHeader", self._handle, _address(file), len(file), self._header)
            self._call("nvjpegDecodeBatchedSupported", self._handle, self._header, byref(answer))
        except Refused:
            return False
        return answer.value == 0

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise Refused(f"{name} says {status}")


@contextlib.contextmanager
def borrow(device: torch.device) -> Iterator[Decoder | None]:
    """A decoder of this device that nobody else has meanwhile; None, told once, where there is no such thing."""
    with _LOCK:
        if device not in _idle:
            _idle[device] = []
        decoder = _idle[device].pop() if _idle[device] else _make(device)
    try:
        yield decoder
    finally:
        if decoder is not None:
            with _LOCK:
                _idle[device].append(decoder)


def _make(device: torch.device) -> Decoder | None:
    if device in _without:
        return None
    try:
        with torch.cuda.device(device):
            return Decoder(_load_library())
    except (OSError, AttributeError, Refused) as error:
        logger.info("nvJPEG's units cannot be used (%s): torchvision decodes, slower where a network trains.", error)
        _without.add(device)
        return None


def _load_library() -> ctypes.CDLL:
    """The one that torchvision brings along, or else the system's.

    Raises:
        OSError: If there is none.
    """
    beside = Path(torchvision.__file__).parent.with_name("torchvision.libs").glob("libnvjpeg.*")
    major = (torch.version.cuda or "").partition(".")[0]
    library = ctypes.CDLL(str(next(beside, f"libnvjpeg.so.{major}")))
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def _address(file: Buffer) -> int:
    address: int = _as_array(file).__array_interface__["data"][0]
    return address


def _as_array(file: Buffer) -> NDArray[np.uint8]:
    return np.frombuffer(file, np.uint8)


def _wait_for(stream: torch.cuda.Stream) -> None:
    """Without keeping a core busy, which others want."""
    reached = torch.cuda.Event(blocking=True)
    reached.record(stream)
    reached.synchronize()


_LOCK = threading.Lock()
_idle: dict[torch.device, list[Decoder]] = {}
_without: set[torch.device] = set()
