"""NVIDIA's JPEG decoder by its own interface: the units that some cards have for it, beside those that compute.

torchvision has one such decoder in a process, on a stream of the lowest priority: whatever trains keeps it waiting.
Here every thread has one of its own while it decodes, on the stream that it works on.

Functions, numbers and the layout of structures are those of nvjpeg.h.
"""

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

HARDWARE, RGB = 3, 3  # of nvjpegBackend_t and nvjpegOutputFormat_t
MAX_COMPONENTS = 4
# Images begin where wide stores may.
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


_LOCK = threading.Lock()
_idle: "dict[torch.device, list[Decoder]]" = {}
_without: set[torch.device] = set()
_told: set[str] = set()


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
        self,
        addresses_B: NDArray[np.uint64],
        lengths_B: NDArray[np.uint64],
        sizes_B2: NDArray[np.int64],
        device: torch.device,
    ) -> tuple[Tensor, NDArray[np.int64], NDArray[np.bool_]]:
        """Images side by side in one piece of memory, all there when this returns.

        Each is three planes without gaps. What is not supported or damaged leaves its place as it was.

        Args:
            addresses_B: Of baseline JPEG files, at least one.
            lengths_B: Of these.
            sizes_B2: Height and width of each.
            device: Of the current stream.

        Returns:
            The memory, uint8; where in it each image begins; and which are there.
        """
        planes_B = sizes_B2.prod(axis=1)
        spaces_B = -(-3 * planes_B // ALIGNMENT) * ALIGNMENT
        starts_B = spaces_B.cumsum() - spaces_B
        memory = torch.empty(_round_up(int(spaces_B.sum())), dtype=torch.uint8, device=device)
        # nvjpegImage_t: the addresses of as many planes, then the bytes of a row of each.
        images = np.zeros((len(sizes_B2), 2 * MAX_COMPONENTS), dtype=np.uint64)
        for channel in range(3):
            images[:, channel] = memory.data_ptr() + starts_B + channel * planes_B
            images[:, MAX_COMPONENTS + channel] = sizes_B2[:, 1]
        there_B = np.ones(len(sizes_B2), dtype=np.bool_)
        stream = torch.cuda.current_stream(device)
        if not self._decode_together(addresses_B, lengths_B, images, stream):  # one of them fails them all
            files = zip(addresses_B.tolist(), lengths_B.tolist(), strict=True)
            there_B = np.array([self._supports(*file) for file in files])
            some = (addresses_B[there_B], lengths_B[there_B], images[there_B])
            if there_B.all() or not there_B.any() or not self._decode_together(*some, stream):
                there_B[:] = False
        return memory, starts_B, there_B

    def _decode_together(
        self,
        addresses_B: NDArray[np.uint64],
        lengths_B: NDArray[np.uint64],
        images: NDArray[np.uint64],
        stream: torch.cuda.Stream,
    ) -> bool:
        """Whether it went well."""
        tables = [np.ascontiguousarray(table, dtype=np.uint64) for table in (addresses_B, lengths_B, images)]
        try:
            self._prepare(len(addresses_B))
            addresses = (table.ctypes.data for table in tables)
            self._call("nvjpegDecodeBatched", self._handle, self._state, *addresses, stream.cuda_stream)
        except Refused as error:
            self._number = 0  # what it was prepared for may be half done
            if str(error) not in _told:
                _told.add(str(error))
                logger.info(
                    "nvJPEG has refused a list of files (%s): torchvision decodes what it does not know.", error
                )
            return False
        finally:  # files and memory are wanted until then, whether it went well or not
            _wait_for(stream)
        return True

    def _prepare(self, number: int) -> None:
        """For lists of so many files, if it is not for these already."""
        if number != self._number:
            self._call("nvjpegDecodeBatchedInitialize", self._handle, self._state, number, 1, RGB)
            self._number = number

    def _supports(self, address: int, length: int) -> bool:
        """Whether it can be decoded, as far as its header says."""
        answer = c_int(-1)
        try:
            self._call("nvjpegJpegStreamParseHeader", self._handle, address, length, self._header)
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
    """A decoder of this device that nobody else has meanwhile; None, told once, where there is no such thing.

    There are as many as threads decode at once, and they stay, with memory that torch does not count.
    """
    with _LOCK:
        idle = _idle.setdefault(device, [])
        decoder = idle.pop() if idle else _make(device)
    try:
        yield decoder
    finally:
        if decoder is not None:
            with _LOCK:
                idle.append(decoder)


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
    package = find_spec("torchvision")
    if package is None or package.origin is None:
        raise OSError("there is no torchvision")
    beside = Path(package.origin).parent.with_name("torchvision.libs").glob("libnvjpeg.*")
    major = (torch.version.cuda or "").partition(".")[0]
    library = ctypes.CDLL(str(next(beside, f"libnvjpeg.so.{major}")))
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def _round_up(size: int) -> int:
    """By an eighth at most, so that a batch has room where one before it was, though that was a little smaller."""
    step = 1 << max(size.bit_length() - 4, 0)
    return -(-size // step) * step


def _wait_for(stream: torch.cuda.Stream) -> None:
    """Without keeping a core busy, which others want."""
    reached = torch.cuda.Event(blocking=True)
    reached.record(stream)
    reached.synchronize()
