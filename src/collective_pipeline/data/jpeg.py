"""JPEG files to pixels and back: here alone is known which library does it.

torchvision is called by its operators: its functions warn that another package will replace them, and a warning cannot
be kept silent in one thread alone.
"""

import ctypes
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from collective_pipeline.data import nvjpeg
from collective_pipeline.data.cropping import DecodedImages
from collective_pipeline.data.decoding import reason_of, to_mode, to_tensor

Encoded = bytes | bytearray | memoryview  # one file

RGB = 3  # of torchvision.io.ImageReadMode
# The largest that Pillow reads without a warning. A header of 64 KB on a side would take 12 GB before the first pixel.
MAX_PIXELS = 89_478_485
# Some writers leave a few bytes behind the end.
TAIL = 1024
BASELINE = 0xC0
START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that give height, width and channels
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
SCAN = {0xDA, 0xD9}  # behind these come no more headers
APP1, EXIF = 0xE1, b"Exif\0\0"  # a header that may be the camera's, and how that begins
ORIENTATION = 0x0112
SIZES = {3: 2, 4: 4}  # bytes of a number of these types, short and long
PYBUF_WRITE = 0x200  # as Python.h has it
_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


@dataclass(frozen=True)
class Problem:
    """Why a file is no image."""

    reason: str


@dataclass(frozen=True)
class Files:
    """B image files in memory, for a GPU.

    Attributes:
        addresses_B: uint64, where each begins.
        lengths_B: uint64, in bytes.
        sizes_B2: int64, height and width of each that is a whole JPEG file, grey or coloured, and upright; 0 of others.
        are_usual_B: bool, which of these are coloured and coded in the one way that all decoders know.
        problems: Why there is no file, by its place among the B.
        memory: What keeps the bytes where they are.
    """

    addresses_B: NDArray[np.uint64]
    lengths_B: NDArray[np.uint64]
    sizes_B2: NDArray[np.int64]
    are_usual_B: NDArray[np.bool_]
    problems: Mapping[int, Problem]
    memory: Sequence[Any]

    @classmethod
    def of(cls, files: Sequence[Encoded | Problem]) -> Self:
        """These, whose headers are read here."""
        memory = [b"" if isinstance(file, Problem) else file for file in files]
        frames = [_read_plain_frame(file) for file in memory]
        return cls(
            np.array([address_of(file) for file in memory], np.uint64),
            np.array([len(file) for file in memory], np.uint64),
            np.array([(0, 0) if frame is None else frame[:2] for frame in frames], np.int64).reshape(-1, 2),
            np.array([frame is not None and frame.is_colour_baseline for frame in frames], np.bool_),
            {row: file for row, file in enumerate(files) if isinstance(file, Problem)},
            memory,
        )

    def __len__(self) -> int:
        return len(self.addresses_B)

    def __getitem__(self, row: int) -> memoryview:
        """The bytes of one, where they lie: for no longer than this is kept.

        They may be written, which nobody does: torch warns of memory that is for reading alone.
        """
        view: memoryview = _view(int(self.addresses_B[row]), int(self.lengths_B[row]), PYBUF_WRITE)
        return view


def decode(files: Sequence[Encoded | Problem]) -> list[Tensor | Problem]:
    """Every file as uint8 `(3, H, W)` on the CPU, turned as its camera says, or what is wrong with it.

    A problem given stays one. Truncated files are refused. Many threads may call it and run side by side.
    """
    return [_decode_on_host(file) for file in files]


def decode_on_gpu(files: Files, device: torch.device) -> tuple[DecodedImages, dict[int, Problem]]:
    """What `decode` makes of every file, on a GPU, and by their places what is wrong with those that are no images.

    The usual files are decoded together by the card's own units for that where it has some, other whole JPEG files by
    torchvision; CMYK, PNG or BMP under another name, what is to be turned as its camera says, and whatever the GPU
    refuses, on the CPU. Many threads may call it, each on a stream of its own. torchvision's decoder has another that
    does not wait for the caller's: memory that the caller's stream has freed must be at rest.
    """
    images = _decode_by_units(files, device)
    are_missing_B = (images.sizes_B2 == 0).all(dim=1).numpy()
    plain = np.flatnonzero(are_missing_B & files.sizes_B2.all(axis=1)).tolist()
    by_torchvision = _decode_by_torchvision([_as_tensor(files[row]) for row in plain], device)
    others: dict[int, Tensor | Problem | None] = {**dict(zip(plain, by_torchvision, strict=True)), **files.problems}
    found: dict[int, Tensor] = {}
    problems: dict[int, Problem] = {}
    for row in np.flatnonzero(are_missing_B).tolist():
        other = others.get(row)
        image = _to_device(_decode_on_host(files[row]), device) if other is None else other
        if isinstance(image, Problem):
            problems[row] = image
        else:
            found[row] = image
    return images.put(found), problems


def encode(image: Tensor, quality: int) -> bytes:
    """A JPEG file of a uint8 image `(3, H, W)`; quality is from 1 to 100."""
    file: Tensor = _operators().encode_jpeg(image, quality)
    return file.numpy().tobytes()


def is_usual(file: Encoded) -> bool:
    """Whether any decoder knows it: whole, baseline, coloured, of a size that can be decoded, and upright."""
    frame = _read_plain_frame(file)
    return frame is not None and frame.is_colour_baseline


def address_of(memory: Any) -> int:
    """Where anything begins that gives its bytes to others, as files and maps of files do."""
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address


class _Frame(NamedTuple):
    """What the header of a JPEG file says."""

    height: int
    width: int
    channels: int
    is_baseline: bool
    is_upright: bool

    @property
    def is_colour_baseline(self) -> bool:
        """Whether it is coloured and coded in the one way that all decoders know."""
        return self.is_baseline and self.channels == 3


def _read_plain_frame(file: Encoded) -> _Frame | None:
    """That of a whole JPEG file which can be decoded, grey or coloured, and is upright."""
    frame = _read_frame(memoryview(file))
    if frame is None or not frame.is_upright or frame.channels not in {1, 3}:
        return None
    # Coded pixels never hold the mark of the end. The GPU would fill with grey what a truncated file lacks.
    is_whole = 0 < frame.height * frame.width <= MAX_PIXELS and END in bytes(file[-TAIL:])
    return frame if is_whole else None


def _read_frame(file: memoryview) -> _Frame | None:
    """Nothing where there is no such header."""
    if file[:2] != START:
        return None
    at, is_upright = 2, True
    while at + 10 <= len(file) and file[at] == 0xFF:
        marker = file[at + 1]
        if marker in FRAMES:
            height, width = file[at + 5] << 8 | file[at + 6], file[at + 7] << 8 | file[at + 8]
            return _Frame(height, width, file[at + 9], marker == BASELINE, is_upright)
        if marker in SCAN:
            break
        if marker == 0xFF:  # fills up
            at += 1
        elif marker in ALONE:
            at += 2
        else:
            end = at + 2 + (file[at + 2] << 8 | file[at + 3])
            if marker == APP1 and bytes(file[at + 4 : at + 10]) == EXIF:
                is_upright &= _is_upright(file[at + 10 : end])
            at = end
    return None


def _is_upright(exif: memoryview) -> bool:
    """Whether a camera says so, or nothing that can be understood."""
    order: Literal["little", "big"] = "little" if bytes(exif[:2]) == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    first = number(4, 4)
    end = min(first + 2 + 12 * number(first, 2), len(exif))
    entries = (entry for entry in range(first + 2, end, 12) if number(entry, 2) == ORIENTATION)
    said = {number(entry + 8, SIZES.get(number(entry + 2, 2), 0)) for entry in entries}
    return said.isdisjoint(range(2, 9))


def _decode_by_units(files: Files, device: torch.device) -> DecodedImages:
    """The images that the card's own units decode; nothing in place of the others."""
    rows = np.flatnonzero(files.are_usual_B)
    images = DecodedImages.none(len(files))
    with nvjpeg.borrow(device) as decoder:
        if decoder is None or len(rows) == 0:
            return images
        sizes = files.sizes_B2[rows]
        memory, starts, are_there = decoder.decode(files.addresses_B[rows], files.lengths_B[rows], sizes, device)
    heights, widths = sizes.T
    places = np.stack([np.zeros_like(starts), starts, heights * widths, widths, np.ones_like(starts)], axis=1)
    for table, found in ((images.places_B5, places), (images.sizes_B2, sizes)):
        table.numpy()[rows[are_there]] = found[are_there]
    return replace(images, memory=(memory,))


def _decode_by_torchvision(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """The images; nothing in place of those that it cannot decode."""
    if not files:
        return []
    try:
        return list(_operators().decode_jpegs_cuda(files, RGB, device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # one of them fails them all: halves find it
        torch.cuda.synchronize(device)  # what was begun may still write where memory is free now
        if len(files) == 1:
            return [None]
        half = len(files) // 2
        return _decode_by_torchvision(files[:half], device) + _decode_by_torchvision(files[half:], device)


def _decode_on_host(file: Encoded | Problem) -> Tensor | Problem:
    if isinstance(file, Problem):
        return file
    if len(file) == 0:
        return Problem("it is empty")
    frame = _read_frame(memoryview(file))
    if frame is None or not frame.is_upright:
        return _decode_by_pillow(file)
    height, width = frame[:2]
    if height * width > MAX_PIXELS:
        return Problem(f"its header says {height:,} x {width:,} pixels")
    try:
        image: Tensor = _operators().decode_jpeg(_as_tensor(file), RGB, False)
    except RuntimeError:
        return _decode_by_pillow(file)
    return image


def _decode_by_pillow(file: Encoded) -> Tensor | Problem:
    try:
        with Image.open(io.BytesIO(file)) as image:
            if image.width * image.height > MAX_PIXELS:
                return Problem(f"its header says {image.height:,} x {image.width:,} pixels")
            ImageOps.exif_transpose(image, in_place=True)
            return to_tensor(to_mode(image, "RGB"))
    except Exception as error:  # damaged images raise almost anything
        return Problem(reason_of(error))


def _as_tensor(file: Encoded) -> Tensor:
    """Its bytes, copied only where they may not be written: torch warns of those."""
    view = memoryview(file)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


@functools.cache
def _operators() -> Any:
    # Seconds of every command, most of which need none: torchvision brings torch's compiler along.
    import torchvision.io  # noqa: F401, PLC0415  # registers them

    return torch.ops.image


def _to_device(image: Tensor | Problem, device: torch.device) -> Tensor | Problem:
    return image if isinstance(image, Problem) else image.to(device)
