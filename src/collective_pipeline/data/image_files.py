"""A user's own images, read a batch at a time: a folder of image files, one of them, or an idx file."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from collective_pipeline.config import ImageSpec, UserError
from collective_pipeline.data.decoding import MODES, SUFFIXES, list_image_files, read_image
from collective_pipeline.data.small_images import IDX_IMAGES, read_idx

logger = logging.getLogger(__name__)

ADVICE = "give an idx file of images, or a folder of png, jpg or bmp files"


@dataclass(frozen=True)
class ImageSource:
    """Images that wait to be read.

    `names` are files, relative to the folder, or positions in the idx file, from 0; `kind` says which. `read` gives
    those of a slice, uint8 `(B, C, H, W)`.
    """

    kind: str
    names: Sequence[str | int]
    read: Callable[[slice], Tensor]

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All of them in order, `size` at a time.

        Raises:
            UserError: At a file that cannot be read.
        """
        for start in range(0, len(self), size):
            yield self.read(slice(start, start + size))


def find_images(path: Path, known: ImageSpec) -> ImageSource:
    """The images at `path` for a network that reads what is `known`.

    Image files are converted to its shape when they are read; an idx file must have it.

    Raises:
        UserError: If there is nothing at `path`, no image in it, or an idx file that is damaged or of another shape.
    """
    shape = known.shape
    if not path.exists():
        raise UserError(f"there is no {path}: {ADVICE}")
    if path.is_dir():
        chosen = list_image_files(path)
        if not chosen:
            raise UserError(f"{path} holds no png, jpg or bmp file: {ADVICE}")
        return ImageSource("file", [file.relative_to(path).as_posix() for file in chosen], _Reader(chosen, known))
    if path.suffix.lower() in SUFFIXES:
        return ImageSource("file", [path.name], _Reader([path], known))
    images = torch.tensor(read_idx(path, IDX_IMAGES, advice=ADVICE)).unsqueeze(1)
    if images.shape[1:] != shape:
        given, wanted = (" x ".join(map(str, one)) for one in (images.shape[1:], shape))
        raise UserError(
            f"{path} holds {given} images (channels x height x width) where the network reads {wanted}: give a folder "
            "of image files, which are converted, or name the dataset or checkpoint that fits"
        )
    if len(images) == 0:
        raise UserError(f"{path} holds no images: {ADVICE}")
    return ImageSource("index", range(len(images)), images.__getitem__)


class _Reader:
    """Reads image files, several at once, and tells once of what it must change."""

    def __init__(self, files: Sequence[Path], known: ImageSpec) -> None:
        self.files = files
        self.known = known
        self.told: set[str] = set()

    def __call__(self, rows: slice) -> Tensor:
        files = self.files[rows]
        channels, height, width = self.known.shape
        with ThreadPoolExecutor() as pool:
            read = list(pool.map(lambda file: read_image(file, self.known.shape, centre=self.known.centre), files))
        for file, (_, original) in zip(files, read, strict=True):
            if original.size != (width, height):
                was = f"{original.size[1]} x {original.size[0]}"
                part = "" if self.known.centre is None else ", of which the middle is seen"
                self._tell(f"images are resized to {height} x {width}{part}", file, was)
            if original.mode != MODES[channels]:
                self._tell(f"images are converted to {channels} channel(s)", file, f"mode {original.mode}")
        return torch.stack([image for image, _ in read])

    def _tell(self, what: str, file: Path, was: str) -> None:
        if what not in self.told:
            self.told.add(what)
            logger.info("Where needed, %s; the first is %s (%s)", what, file, was)
