"""JPEG files to pixels and back: here alone is known which library does it.

The decoder of torchvision is called by its operator: its function warns that another package will replace it, and a
warning cannot be kept silent in one thread alone.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torchvision.io  # registers the operators
from PIL import Image, ImageOps
from torch import Tensor

from collective_pipeline.data import nvjpeg
from collective_pipeline.data.decoding import reason_of, to_mode, to_tensor

Encoded = bytes | bytearray | memoryview  # one file

RGB = torchvision.io.ImageReadMode.RGB.value
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


@dataclass(frozen=True)
class Problem:
    """Why a file is no image."""

    reason: str


def decode(files: Sequence[Encoded | Problem], device: torch.device) -> list[Tensor | Problem]:
    """Every file as uint8 `(3, H, W)` on the device, or what is wrong with it; a problem given stays one.

    Whole JPEG files are decoded by the GPU together where there is one; CMYK, PNG or BMP under another name, what is to
    be turned as its camera says, and whatever the GPU refuses, on the CPU. Truncated files are refused. Many threads
    may call it and run side by side. On the GPU torchvision's decoder has a stream of its own that does not wait for
    the caller's: memory that the caller's stream has freed must be at rest.
    """
    if device.type != "cuda":
        return [_to_device(_decode_on_host(file), device) for file in files]
    images = _decode_on_gpu(files, device)
    decoded: list[Tensor | Problem] = []
    for row, file in enumerate(files):
        image = images.get(row)
        decoded.append(image if image is not None else _to_device(_decode_on_host(file), device))
    return decoded


def encode(image: Tensor, quality: int) -> bytes:
    """A JPEG file of a uint8 image `(3, H, W)`; quality is from 1 to 100."""
    file: Tensor = torch.ops.image.encode_jpeg(image, quality)
    return file.numpy().tobytes()


def is_plain(file: Encoded | Problem) -> bool:
    """Whether it is a whole JPEG file, grey or coloured, of a size that can be decoded, and its pixels are upright."""
    return not isinstance(file, Problem) and _read_plain_frame(file) is not None


class _Frame(NamedTuple):
    """What the header of a JPEG file says."""

    height: int
    width: int
    channels: int
    is_baseline: bool
    is_upright: bool


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


def _decode_on_gpu(files: Sequence[Encoded | Problem], device: torch.device) -> dict[int, Tensor | None]:
    """Images by their rows; nothing of those that it cannot decode."""
    plain = {
        row: (file, frame)
        for row, file in enumerate(files)
        if not isinstance(file, Problem) and (frame := _read_plain_frame(file)) is not None
    }
    images: dict[int, Tensor | None] = {}
    baseline = [row for row, (_, frame) in plain.items() if frame.is_baseline]
    with nvjpeg.borrow(device) as decoder:
        if decoder is not None:
            sizes = [plain[row][1][:2] for row in baseline]
            decoded = decoder.decode([plain[row][0] for row in baseline], sizes, device)
            images.update(zip(baseline, decoded, strict=True))
    others = [row for row in plain if images.get(row) is None]
    decoded = _decode_by_torchvision([_as_tensor(plain[row][0]) for row in others], device)
    return images | dict(zip(others, decoded, strict=True))


def _decode_by_torchvision(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """The images; nothing in place of those that it cannot decode."""
    if not files:
        return []
    try:
        return list(torch.ops.image.decode_jpegs_cuda(files, RGB, device))
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
        image: Tensor = torch.ops.image.decode_jpeg(_as_tensor(file), RGB, False)
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


def _to_device(image: Tensor | Problem, device: torch.device) -> Tensor | Problem:
    return image if isinstance(image, Problem) else image.to(device)
