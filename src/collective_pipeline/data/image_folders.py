"""A labelled data set of equal-sized images that lies as files in a folder for each class."""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from collective_pipeline.config import UserError, count_of, list_some, suggest
from collective_pipeline.data.decoding import list_image_files, read_image
from collective_pipeline.data.splits import Images

logger = logging.getLogger(__name__)

# A few damaged files of many are no reason not to train; more than these are a damaged copy.
MAX_UNUSABLE = 0.01  # of all files
# Small images leave a thread no time outside Python's lock: handed out one by one they would take twice as long.
FILES_AT_ONCE = 256
# What PIL does to a small image holds that lock most of the time: with a thread for each of 64 cores, 60,000 files took
# 40 s where one thread alone reads 5,000 a second.
MAX_THREADS = 4
SECONDS_BETWEEN_LINES = 5.0


def read_image_folders(folder: Path, class_names: Sequence[str], shape: tuple[int, int, int]) -> Images:
    """All images in `folder/<class>/` for each of `class_names`, whose order is that of the labels.

    Args:
        folder: Of one part of a data set, for example its training images.
        class_names: The names of the folders. Within a class, images are in the order of their names.
        shape: Channels, height and width of every image; grey ones become coloured and the other way round.

    Raises:
        UserError: If a class has no folder or no images, a folder is no class, or more than `MAX_UNUSABLE` of the
            files cannot be read or have another size.
    """
    _check_classes(folder, class_names)
    files, labels = [], []
    for label, name in enumerate(class_names):
        of_class = list_image_files(folder / name)
        if not of_class:
            raise UserError(f"{folder / name} holds no png, jpg or bmp file: put the images of that class there")
        files += of_class
        labels += [label] * len(of_class)
    return read_image_files(files, torch.tensor(labels), shape, folder)


def read_image_files(
    files: Sequence[Path], labels: Tensor, shape: tuple[int, int, int], folder: Path, *, stretch: bool = False
) -> Images:
    """The images in these files, without those that cannot be used; messages call where they are `folder`.

    Args:
        files: One image each.
        labels: Of the images.
        shape: Channels, height and width.
        folder: Where they are.
        stretch: Whether images of any size are brought to `shape`.

    Raises:
        UserError: If more than `MAX_UNUSABLE` of the files cannot be read or, unless they are stretched, have another
            size than `shape`.
    """
    images, problems = _read(files, shape, stretch)
    if problems:
        _tell(folder, problems, len(files))
    usable = torch.tensor([row not in problems for row in range(len(files))])
    return Images(images[usable], labels[usable])


def _check_classes(folder: Path, class_names: Sequence[str]) -> None:
    found = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if missing := [name for name in class_names if name not in found]:
        raise UserError(
            f"{folder} lacks a folder of images for {', '.join(missing)}: put the images of each class there"
        )
    if unknown := sorted(found.difference(class_names)):
        raise UserError(f"{folder / unknown[0]} is a folder of no known class{suggest(unknown[0], class_names)}")


def _read(files: Sequence[Path], shape: tuple[int, int, int], stretch: bool) -> tuple[Tensor, dict[int, str]]:
    """The images `(n, C, H, W)`, and what is wrong with those that could not be used, by their rows."""
    images = torch.zeros(len(files), *shape, dtype=torch.uint8)
    problems: dict[int, str] = {}

    def read_rows(rows: range) -> None:
        for row in rows:
            try:
                image, original = read_image(files[row], shape)
            except UserError as error:
                problems[row] = str(error)
                continue
            if not stretch and original.size != (shape[2], shape[1]):
                size = f"{original.size[1]} x {original.size[0]}"
                problems[row] = f"{files[row]} is {size} where the others are {shape[1]} x {shape[2]}"
            images[row] = image

    chunks = [range(len(files))[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)]
    started = last_line = time.perf_counter()
    # Large images are decoded outside that lock.
    with ThreadPoolExecutor(os.cpu_count() if stretch else MAX_THREADS) as pool:
        for rows, _ in zip(chunks, pool.map(read_rows, chunks), strict=True):
            now = time.perf_counter()
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line, left = now, (now - started) / rows.stop * (len(files) - rows.stop)
                logger.info("%s of %s image files are read, %.0f s left", f"{rows.stop:,}", f"{len(files):,}", left)
    return images, problems


def _tell(folder: Path, problems: dict[int, str], num_files: int) -> None:
    """Warn of a few unusable files, refuse many."""
    told = list_some([problems[row] for row in sorted(problems)])
    found = f"{len(problems):,} of the {count_of(num_files, 'image file')} in {folder} cannot be used"
    if len(problems) > MAX_UNUSABLE * num_files:
        raise UserError(f"{found}, more than {100 * MAX_UNUSABLE:g} %: put good ones in their place ({told})")
    logger.warning("%s, left out: %s", found, told)
