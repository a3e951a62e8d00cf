"""Batches cut from images that stay on the device as bytes, for several seeds at once.

Suffixes: S seeds, B batch, T all images of an epoch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from collective_pipeline.config import UserError
from collective_pipeline.data.augment import NUM_DRAWS, RECIPES, augment
from collective_pipeline.data.splits import Splits
from collective_pipeline.randomness import make_generator


class Normalise:
    """Bytes to features of mean 0 and standard deviation 1 by the training part's channels, flattened."""

    def __init__(self, splits: Splits, device: torch.device) -> None:
        self.mean = 255 * torch.tensor(splits.mean, device=device).view(-1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(splits.std, device=device).view(-1, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        """`(..., C, H, W)` in 0..255 to `(..., C*H*W)`; a floating-point input is overwritten."""
        return images.float().sub_(self.mean).mul_(self.scale).flatten(-3)


class Batches:
    """One epoch after another of the training images, each seed in its own order, augmented afresh.

    Iterating yields `(x_SBI, y_SB)`. What is left over after the last whole batch of an epoch is left out; the next
    epoch's order is another, so no image is left out for good. A seed's order and augmentation are drawn on the CPU
    from that seed alone: they are the same for every arm, beside every other seed and on every device.
    """

    def __init__(self, splits: Splits, seeds: Sequence[int], *, batch_size: int, augmentation_strength: float) -> None:
        check_batch_size(splits, batch_size)
        self.train = splits.train
        self.normalise = Normalise(splits, splits.train.images.device)
        self.batch_size = batch_size
        self.recipe = RECIPES[splits.name]
        self.strength = augmentation_strength
        self.orders = [make_generator(seed, "order") for seed in seeds]
        self.augmentations = [make_generator(seed, "augmentation") for seed in seeds]

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.train) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        num_used = len(self) * self.batch_size
        orders = [torch.randperm(len(self.train), generator=generator)[:num_used] for generator in self.orders]
        steps = self._to_device(orders).split(self.batch_size, dim=1)
        if not self.strength:
            for index_SB in steps:
                yield self.normalise(self.train.images[index_SB]), self.train.labels[index_SB]
            return

        draws = [torch.rand(num_used, NUM_DRAWS, generator=generator) for generator in self.augmentations]
        for index_SB, draws_SBD in zip(steps, self._to_device(draws).split(self.batch_size, dim=1), strict=True):
            images = self.train.images[index_SB.flatten()].float()
            images = augment(images, draws_SBD.flatten(0, 1), self.recipe, self.strength)
            yield self.normalise(images.unflatten(0, index_SB.shape)), self.train.labels[index_SB]

    def _to_device(self, per_seed: list[Tensor]) -> Tensor:
        return torch.stack(per_seed).to(self.train.images.device)


def check_batch_size(splits: Splits, batch_size: int) -> None:
    """Raise a `UserError` if there are fewer training images than one batch needs."""
    if len(splits.train) < batch_size:
        raise UserError(
            f"training.batch_size={batch_size} is more than the {len(splits.train)} training images: "
            "choose a smaller one"
        )
