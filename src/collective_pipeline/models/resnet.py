"""Residual networks (He et al. 2016): two or three convolutions around a skip, any of them gated.

Suffixes as in `convolution`; K classes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.functional import relu

from collective_pipeline.models.convolution import Blur, GlobalAveragePool, to_channels, to_features
from collective_pipeline.models.gating import GatedUnit
from collective_pipeline.models.layers import Linear, RandomBits, Stack, bits_below


class StochasticDepth(nn.Module):
    """While training, an image's maps are zeros with probability `rate`, else 1 / (1 - rate) times what they were.

    So a block is left out, and nothing changes on average (Huang et al. 2016). `set_drop_path` switches it.
    """

    def __init__(self, stack: Stack, rate: float) -> None:
        super().__init__()
        self.stack = stack
        self.rate = rate
        self.on = True
        self.draw = RandomBits(stack, 1) if rate else None

    def forward(self, x_BMHW: Tensor) -> Tensor:
        """Same shape as the input."""
        if not self.training or not self.on or self.draw is None:
            return x_BMHW
        x_BSNCHW: Tensor = x_BMHW.unflatten(1, (*self.stack, -1))
        keep_SNB1: Tensor = self.draw(x_BSNCHW.permute(1, 2, 0, 3, 4, 5)) >= bits_below(self.rate)
        factor_SNB1 = keep_SNB1.to(x_BMHW.dtype) / (1 - self.rate)
        return x_BMHW * to_channels(factor_SNB1.expand(-1, -1, -1, x_BSNCHW.shape[3]))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def set_drop_path(model: nn.Module, on: bool) -> None:
    """Whether stochastic depth takes part from now on, in training; a CUDA graph keeps what it was recorded with."""
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.on = on


class ResidualBlock(nn.Module):
    """y = relu(drop(unit_n(... relu(unit_1(x)))) + shortcut(x)); the shortcut is the identity where shapes agree.

    Where a gate of the last unit is closed, the channel is what the shortcut gives.

    Args:
        units: From the block's input on.
        shortcut: None: the identity.
        drop: What leaves the units' part out for some images.
        blur: What halves the maps before the last unit, where no unit does.
        shortcut_blur: What halves those that the shortcut reads then, as in Zhang 2019. Behind its convolution, which
            mixes no pixels, it would make the same of a trained network for four times the work.
    """

    def __init__(
        self,
        units: Sequence[GatedUnit],
        shortcut: GatedUnit | None,
        *,
        drop: StochasticDepth,
        blur: Blur | None = None,
        shortcut_blur: Blur | None = None,
    ) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.shortcut = shortcut
        self.drop = drop
        self.blur = blur
        self.shortcut_blur = shortcut_blur

    def forward(self, x_BMHW: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """`gates` as for `GatedUnit`."""
        skipped = x_BMHW if self.shortcut_blur is None else self.shortcut_blur(x_BMHW)
        if self.shortcut is not None:
            skipped = self.shortcut(skipped, gates)
        *units, last = self.units
        for unit in units:
            x_BMHW = relu(unit(x_BMHW, gates), inplace=True)
        if self.blur is not None:
            x_BMHW = self.blur(x_BMHW)
        return relu(self.drop(last(x_BMHW, gates)) + skipped, inplace=True)


class PointwiseHead(nn.Module):
    """The Linear of the same stack as a 1x1 convolution of the one pixel that is left: the same weights are drawn."""

    def __init__(self, stack: Stack, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stack = stack
        self.weight = nn.Parameter(torch.zeros(*stack, num_classes, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(*stack, num_classes))

    def initialise(self, generators: Sequence[Generator]) -> None:
        """What `Linear.initialise` draws, by fan-in; seed s draws from `generators[s]` alone."""
        num_classes, in_channels = self.weight.shape[2:4]
        with torch.no_grad():
            self.bias.zero_()
            for weight_NOI11, generator in zip(self.weight, generators, strict=True):
                drawn_NIO = torch.randn(len(weight_NOI11), in_channels, num_classes, generator=generator)
                weight_NOI11.copy_(drawn_NIO.mT[..., None, None] * math.sqrt(2 / in_channels))

    def forward(self, x_SNBC: Tensor) -> Tensor:
        """`(S, N, B, C)` to `(S, N, B, K)`."""
        x_BM11 = to_channels(x_SNBC)
        y_BM11 = F.conv2d(x_BM11, self.weight.flatten(0, 2), self.bias.flatten(), groups=math.prod(self.stack))
        return to_features(y_BM11, self.stack)


class ResNet(nn.Module):
    """Stem, residual blocks, mean over pixels, one Linear; `pool` is what halves the maps of the stem, if anything."""

    def __init__(
        self,
        stem: GatedUnit,
        pool: nn.Module,
        blocks: Sequence[ResidualBlock],
        mean: GlobalAveragePool,
        head: Linear | PointwiseHead,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.pool = pool
        self.blocks = nn.ModuleList(blocks)
        self.mean = mean
        self.head = head

    def forward(self, x_BMHW: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Maps of images, and gates as for `GatedUnit`, to logits `(S, 1, B, K)`."""
        x_BMHW = self.pool(relu(self.stem(x_BMHW, gates), inplace=True))
        for block in self.blocks:
            x_BMHW = block(x_BMHW, gates)
        return self.head(self.mean(x_BMHW))  # type: ignore[no-any-return]

    def chains(self) -> list[list[nn.Module]]:
        """Layers in rows in which each reads only what the one before it made: no channel passes beside them."""
        return [_chain(block) for block in self.blocks if isinstance(block, ResidualBlock)]


def _chain(block: ResidualBlock) -> list[nn.Module]:
    *units, last = block.units
    return [*units, last] if block.blur is None else [*units, block.blur, last]
