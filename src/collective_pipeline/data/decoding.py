"""One image file to bytes of a wanted shape, and which files of a folder are images."""

import io
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from collective_pipeline.config import UserError
from collective_pipeline.data.cropping import centre_boxes

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
# By PIL's names, whatever a file is called; others may start programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
MODES = {1: "L", 3: "RGB"}  # PIL's names for as many channels


@dataclass(frozen=True)
class Original:
    """An image file as it was: `(width, height)`, and PIL's name for its channels."""

    size: tuple[int, int]
    mode: str


def list_image_files(folder: Path) -> list[Path]:
    """Every image file in `folder` and below, sorted, hidden ones left out; files of other kinds are told."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    chosen = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = Counter(file.suffix.lower() or "no suffix" for file in files if file.suffix.lower() not in SUFFIXES)
    if chosen and others:
        told = ", ".join(f"{count:,} x {suffix}" for suffix, count in sorted(others.items()))
        logger.warning("%s: files that are no png, jpg or bmp are left out: %s", folder, told)
    return chosen


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in PIL's `mode`, grey or colour, on black where it is transparent.

    Raises:
        ValueError: If nobody says which of its numbers is white.
    """
    if image.mode in {"I", "F"}:
        raise ValueError("its pixels are not bytes")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def to_tensor(image: Image.Image) -> Tensor:
    """The bytes of a grey or coloured image, `(C, H, W)`."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1).contiguous()


def read_image(path: Path, shape: tuple[int, int, int], *, centre: float | None = None) -> tuple[Tensor, Original]:
    """The image of a file, as `decode_image` has it.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        # Read at once: PIL's many small reads of the file itself take half as long again.
        return decode_image(path.read_bytes(), shape, centre=centre)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not an image that can be read ({error}): replace it, or remove it from the folder"
        ) from error


def decode_image(data: bytes, shape: tuple[int, int, int], *, centre: float | None = None) -> tuple[Tensor, Original]:
    """The image as uint8 of this `shape`, channels, height and width, and what it was.

    It is turned as its camera says, put on black where it is transparent, and stretched to the size; or with `centre`
    only the square in its middle, whose side is this share of the shorter one.

    Raises:
        ValueError: If it cannot be read, with PIL's reason.
    """
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            original = Original(file.size, file.mode)
            ImageOps.exif_transpose(file, in_place=True)
            image = to_mode(file, MODES[channels])
            if centre is not None:  # as in training, where nothing outside of the square has a part in it
                image = image.crop(_middle(image, centre))
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            return to_tensor(image), original
    except Exception as error:  # damaged images raise almost anything
        raise ValueError(reason_of(error)) from error


def _middle(image: Image.Image, share: float) -> tuple[int, int, int, int]:
    """As PIL wants it: left, upper, right, lower."""
    ((top, left, height, width),) = centre_boxes(torch.tensor([[image.height, image.width]]), share).tolist()
    return left, top, left + width, top + height


def reason_of(error: Exception) -> str:
    """What PIL says is wrong, without the name of the object in memory, which tells nobody anything."""
    return str(error).partition(" <_io.BytesIO")[0]
