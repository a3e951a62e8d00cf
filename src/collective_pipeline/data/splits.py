"""Images with labels, and how the training part of a data set is divided. Images stay uint8 throughout."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from collective_pipeline.config import DatasetName, ImageSpec, Stage, UserError, count_of


@dataclass(frozen=True)
class Images:
    """`images`, uint8 `(n, C, H, W)`, and `labels`, int64 `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Self:
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Self:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def is_resident(self) -> bool:
        return True

    def for_stage(self, stage: Stage) -> Self:
        """As they are: whoever reads them brings them to the stage's size."""
        return self

    def examples(self, number: int) -> Tensor:
        """The first ones, uint8 `(number, C, H, W)`."""
        return self.images[:number]

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images with their labels, `size` at a time."""
        return zip(self.images.split(size), self.labels.split(size), strict=True)


@dataclass(frozen=True)
class RawImages:
    """A data set as it is published: a training and a test part."""

    name: DatasetName
    train: Images
    test: Images
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """What every arm is given. `mean` and `std`, per channel on [0, 1], are those of the training part alone."""

    name: DatasetName
    train: Images
    val: Images
    test: Images
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def in_dim(self) -> int:
        return math.prod(self.image_shape)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_spec(self) -> ImageSpec:
        """What a trained network must be given again, beside its weights."""
        return ImageSpec(shape=self.image_shape, mean=self.mean, std=self.std, class_names=self.class_names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all images and labels; every arm asks for it."""
        digest = hashlib.sha256()
        for images in (self.train, self.val, self.test):
            for tensor in (images.images, images.labels):
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def make_splits(raw: RawImages, *, val_fraction: float, split_seed: int) -> Splits:
    """Move `val_fraction` of every class of the training images to a validation part, chosen by `split_seed` alone.

    Raises:
        UserError: If a class would be left without a training or a validation image, or if a channel is blank.
    """
    is_val = choose_val(raw.train.labels, raw.class_names, fraction=val_fraction, seed=split_seed, name=raw.name)
    train = raw.train[~is_val]
    mean, std = moments(train.images)
    if 0 in std:
        raise UserError(
            f"all training pixels of channel {std.index(0)} of {raw.name} are alike: replace its files with fresh ones"
        )
    return Splits(raw.name, train, raw.train[is_val], raw.test, raw.class_names, mean, std)


def choose_val(labels: Tensor, class_names: Sequence[str], *, fraction: float, seed: int, name: str) -> Tensor:
    """Which training images, of these `labels`, are for validation: `fraction` of every class, bool `(n,)`.

    Raises:
        UserError: If a class would be left without a training or a validation image.
    """
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    val_counts = _apportion(counts, fraction)
    for class_name, count, val_count in zip(class_names, counts, val_counts, strict=True):
        if not 0 < val_count < count:
            enough = f" ({math.ceil(100 / count) / 100:g} or more)" if count > 1 and not val_count else ""
            raise UserError(
                f"class '{class_name}' of {name} has {count_of(count, 'training image')}, and "
                f"val_fraction={fraction:g} leaves {val_count} for validation and {count - val_count} for training: "
                f"choose another val_fraction{enough}, or take more images of that class"
            )
    generator = torch.Generator().manual_seed(seed)
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label, rows in enumerate(labels.argsort(stable=True).split(counts)):
        is_val[rows[torch.randperm(len(rows), generator=generator)[: val_counts[label]]]] = True
    return is_val


def _apportion(counts: list[int], fraction: float) -> list[int]:
    """`fraction` of every count, rounded by largest remainders: the sum is the rounded fraction of all."""
    quotas = [count * fraction for count in counts]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: round(sum(counts) * fraction) - sum(shares)]:
        shares[i] += 1
    return shares


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: exact from 256 counts, where a float copy would be 8 times the set."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        weights = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = weights @ levels
        means.append(mean.item())
        stds.append((weights @ (levels - mean).square()).sqrt().item())
    return tuple(means), tuple(stds)
