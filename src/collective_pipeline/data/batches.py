"""Batches cut from images that stay on the device as bytes, for several seeds at once.

Suffixes: S seeds, B batch, T all images of an epoch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.config import ImageSpec, Stage, UserError, count_of
from collective_pipeline.data.augment import (
    NUM_CROP_DRAWS,
    NUM_CUTOUT_DRAWS,
    NUM_DRAWS,
    NUM_MIX_DRAWS,
    RECIPES,
    augment,
    cut_out,
    draw_mix,
    mix,
    random_resized_crop,
)
from collective_pipeline.data.splits import Splits
from collective_pipeline.randomness import make_generator


class Normalise:
    """Bytes to features of mean 0 and standard deviation 1 by the training part's channels, flattened.

    Args:
        known: Of the training part.
        device: Where the images are.
        size: Height and width that images are brought to, if theirs are others. By default those that a network reads,
            where it is known what it reads; else they stay as they are.
    """

    def __init__(self, known: Splits | ImageSpec, device: torch.device, *, size: tuple[int, int] | None = None) -> None:
        self.mean = 255 * torch.tensor(known.mean, device=device).view(-1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(known.std, device=device).view(-1, 1, 1))
        self.size = known.shape[1:] if size is None and isinstance(known, ImageSpec) else size

    def __call__(self, images: Tensor) -> Tensor:
        """`(..., C, H, W)` in 0..255 to `(..., C*H*W)`; a floating-point input is overwritten."""
        pixels = images.float()
        if self.size is not None and pixels.shape[-2:] != self.size:
            pixels = resize(pixels, self.size)
        return pixels.sub_(self.mean).mul_(self.scale).flatten(-3)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """`(..., C, H, W)`, floating point, at this height and width: bilinear, without aliasing where it shrinks."""
    flat = pixels.flatten(0, -4) if pixels.ndim > 3 else pixels.unsqueeze(0)
    resized = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=True)
    return resized.view(*pixels.shape[:-2], *size)


@dataclass(frozen=True)
class MixedLabels:
    """Of images that are each mixed with another one of their batch.

    Attributes:
        labels_SB: Of the images.
        others_SB: Of those that are mixed in.
        share_S: What is left of the first.
    """

    labels_SB: Tensor
    others_SB: Tensor
    share_S: Tensor


Labels = Tensor | MixedLabels


class ImageSource(Protocol):
    """Images to evaluate on: those of a tensor (`Images`), or of files that are read when they are wanted."""

    @property
    def device(self) -> torch.device:
        """Where they are wanted."""

    @property
    def is_resident(self) -> bool:
        """Whether they lie on the device, always at the same addresses."""

    def __len__(self) -> int:
        """Of all images, those that other ranks evaluate included."""

    def for_stage(self, stage: Stage) -> "ImageSource":
        """The same images, as this stage of a plan sees them."""

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes `(B, C, H, W)` and labels `(B,)`, `size` at a time: each image once, on one of the ranks."""


class BatchSource(Protocol):
    """Training batches for all seeds of a network, epoch after epoch.

    Attributes:
        seeds: In their order in a batch.
        device: Where batches are.
        batch_size: B.
        normalise: What stands between images and the network, for whoever evaluates it.
        ranks_played: How many of the ranks that training was planned for this process stands for.
    """

    seeds: Sequence[int]
    device: torch.device
    batch_size: int
    normalise: Normalise
    ranks_played: int

    @property
    def is_resident(self) -> bool:
        """Whether `take` finds every batch of an epoch without `load`."""

    def for_stage(self, stage: Stage | None) -> "BatchSource":
        """The same images in batches as this stage has them; None: these."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def prepare(self, epoch: int) -> None:
        """Begin to draw for an epoch beside what the device does."""

    def begin(self, epoch: int) -> None:
        """From here on batches are of this epoch."""

    def close(self) -> None:
        """End what reads ahead."""

    def load(self, first: int, number: int) -> None:
        """Bring these batches of the epoch, counted from 0, to where `take` finds them."""

    def take(self, step: Tensor) -> tuple[Tensor, Labels]:
        """Features `(S, B, I)` and labels `(S, B)` of the batch at `step`, an int64 tensor of one element."""


class Batches:
    """The batches `(x_SBI, y_SB)` of one epoch after another, each seed in its own order, augmented afresh.

    What is left over after the last whole batch of an epoch is left out; the next epoch's order is another, so no
    image is left out for good. A seed's order and augmentation are drawn on the CPU from that seed and the number of
    the epoch alone: they are the same for every arm, beside every other seed, on every device and after every pause.
    """

    def __init__(
        self,
        splits: Splits,
        seeds: Sequence[int],
        *,
        batch_size: int,
        augmentation_strength: float,
        cutout: int = 0,
        image_size: int | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        check_batches(splits, batch_size, cutout)
        self.splits = splits
        self.train = splits.train
        self.device = splits.train.images.device
        self.image_size = image_size
        size = None if image_size is None else (image_size, image_size)
        self.normalise = Normalise(splits, self.device, size=size)
        self.seeds = seeds
        self.ranks_played = 1
        self.batch_size = batch_size
        self.recipe = RECIPES[splits.name]
        self.strength = augmentation_strength
        self.cutout = cutout
        self.num_draws = count_draws(augmentation_strength, cutout)
        # Always at the same addresses, as a CUDA graph that reads them needs it.
        self.order_KSB = torch.zeros(len(self), len(seeds), batch_size, dtype=torch.int64, device=self.device)
        drawn = (*self.order_KSB.shape, self.num_draws)
        self.draws_KSBD = torch.zeros(drawn, device=self.device) if self.num_draws else None
        self.alphas = (mixup_alpha, cutmix_alpha)
        mixes = (len(self), len(seeds), NUM_MIX_DRAWS)
        self.mixes_KSD = torch.zeros(mixes, device=self.device) if any(self.alphas) else None
        self._drawer = ThreadPoolExecutor(1)
        self._preparing: tuple[int, Future[dict[str, Tensor]]] | None = None

    @property
    def is_resident(self) -> bool:
        return True

    def load(self, first: int, number: int) -> None:
        """They are there."""

    def close(self) -> None:
        """There is nothing to end: what draws an epoch ends with it."""

    def for_stage(self, stage: Stage | None) -> Self:
        """The same images in batches as this stage has them; None: these."""
        if stage is None:
            return self
        return type(self)(
            self.splits,
            self.seeds,
            batch_size=stage.batch_size or self.batch_size,
            augmentation_strength=self.strength,
            cutout=self.cutout,
            image_size=stage.image_size,
            mixup_alpha=self.alphas[0] * stage.mixing,
            cutmix_alpha=self.alphas[1] * stage.mixing,
        )

    @property
    def cuts_alone(self) -> bool:
        """Whether `cut` does all that there is to do to an image, so that one kernel can."""
        return self.image_size is None and self.mixes_KSD is None and not self.recipe.crop_area

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.train) // self.batch_size

    def prepare(self, epoch: int) -> None:
        """Begin to draw for an epoch beside what the device does, so that `begin` need not: worth it for a GPU.

        One epoch at a time: until it has begun, no other is prepared.
        """
        if self._preparing is None:
            self._preparing = epoch, self._drawer.submit(self._draw, epoch)

    def begin(self, epoch: int) -> None:
        """From here on `take` gives the batches of this epoch; epochs count from 1."""
        prepared, self._preparing = self._preparing, None
        drawn = prepared[1].result() if prepared is not None and prepared[0] == epoch else self._draw(epoch)
        self._fill(self.order_KSB, drawn["order"])
        if self.draws_KSBD is not None:
            self._fill(self.draws_KSBD, drawn["draws"])
        if self.mixes_KSD is not None:
            self.mixes_KSD.copy_(drawn["mixes"].transpose(0, 1), non_blocking=True)

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        """The order of every seed, and the draws of its augmentation and its mixing where there are any, on the CPU."""
        num_used = len(self) * self.batch_size

        def order(seed: int) -> Tensor:
            return torch.randperm(len(self.train), generator=make_generator(seed, f"order/{epoch}"))[:num_used]

        def draws(seed: int) -> Tensor:
            return torch.rand(num_used, self.num_draws, generator=make_generator(seed, f"augmentation/{epoch}"))

        def mixes(seed: int) -> Tensor:
            generator = make_generator(seed, f"mixing/{epoch}")
            return draw_mix(generator, len(self), mixup_alpha=self.alphas[0], cutmix_alpha=self.alphas[1])

        wanted = {"order": order, "draws": self.num_draws and draws, "mixes": any(self.alphas) and mixes}
        drawn = {name: torch.stack([draw(seed) for seed in self.seeds]) for name, draw in wanted.items() if draw}
        is_cuda = self.device.type == "cuda"
        return {name: tensor.pin_memory() if is_cuda else tensor for name, tensor in drawn.items()}

    def _fill(self, buffer: Tensor, drawn: Tensor) -> None:
        # Copied as it is, so that the host need not wait, and cut into steps on the device.
        on_device = drawn.to(self.device, non_blocking=True)
        buffer.copy_(on_device.unflatten(1, (len(self), self.batch_size)).transpose(0, 1))

    def take(self, step: Tensor) -> tuple[Tensor, Labels]:
        """The batch at `step` of the epoch, an int64 tensor of one element: the device looks it up, not the host."""
        index_SB = self.order_KSB.index_select(0, step)[0]
        draws_SBD = None if self.draws_KSBD is None else self.draws_KSBD.index_select(0, step)[0]
        x_SBI, labels_SB = self.cut(index_SB, draws_SBD), self.train.labels[index_SB]
        if self.mixes_KSD is None:
            return x_SBI, labels_SB
        mixed = mix(x_SBI.unflatten(-1, self.seen_shape), labels_SB, self.mixes_KSD.index_select(0, step)[0])
        return mixed.images.flatten(2), MixedLabels(labels_SB, mixed.other_labels, mixed.share)

    def cut(self, index_SB: Tensor, draws_SBD: Tensor | None) -> Tensor:
        """The images at `index_SB` as features `(S, B, I)`, moved as `draws_SBD` says."""
        if draws_SBD is None:
            return self.normalise(self.train.images[index_SB])
        images = self._move(self.train.images[index_SB.flatten()].float(), draws_SBD[..., :NUM_DRAWS].flatten(0, 1))
        x_SBI = self.normalise(images.unflatten(0, index_SB.shape))
        if not self.cutout:
            return x_SBI
        side = round(self.cutout * self.seen_shape[1] / self.train.images.shape[2])
        return cut_out(x_SBI.unflatten(-1, self.seen_shape), draws_SBD[..., NUM_DRAWS:], side).flatten(-3)

    @property
    def seen_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image in a batch."""
        channels, height, width = self.train.images.shape[1:]
        return channels, self.image_size or height, self.image_size or width

    def _move(self, images: Tensor, draws: Tensor) -> Tensor:
        """Bytes `(n, C, H, W)`, floating point, augmented; at the size of the batches where that takes no step more."""
        if not self.recipe.crop_area or not self.strength:
            return augment(images, draws, self.recipe, self.strength)
        least = 1 - (1 - self.recipe.crop_area) * min(self.strength, 1.0)
        crops = draws[:, :NUM_CROP_DRAWS]
        return random_resized_crop(images, crops, size=self.seen_shape[1], scale=(least, 1.0), flip=self.recipe.flip)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Labels]]:
        """All batches of one epoch."""
        self.begin(number)
        for step in torch.arange(len(self), device=self.device).split(1):
            yield self.take(step)


def count_draws(augmentation_strength: float, cutout: int) -> int:
    """How many random numbers augmentation takes for an image; those of cutout stand behind the others."""
    return NUM_DRAWS + NUM_CUTOUT_DRAWS if cutout else NUM_DRAWS if augmentation_strength else 0


def check_batches(
    splits: Splits, batch_size: int, cutout: int = 0, *, section: str = "training", whose: str = ""
) -> None:
    """Raise a `UserError` if there are fewer training images than one batch needs, or if nothing is left of one.

    `whose` tells of which network, `section` which parameters.
    """
    if len(splits.train) < batch_size:
        raise UserError(
            f"{section}.batch_size={batch_size} is more than the {count_of(len(splits.train), 'training image')}"
            f"{whose}: choose a smaller one"
        )
    side = min(splits.image_shape[1:])
    if cutout >= side:
        raise UserError(f"{section}.cutout={cutout} leaves nothing of images of {side} pixels{whose}: choose fewer")
