"""Residual networks (He et al. 2016): two or three convolutions around a skip, any of them gated.

Suffixes as in `convolution`; K classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from collective_pipeline.models.convolution import GlobalAveragePool
from collective_pipeline.models.gating import GatedUnit
from collective_pipeline.models.layers import Linear


class ResidualBlock(nn.Module):
    """y = relu(unit_n(... relu(unit_1(x))) + shortcut(x)); the shortcut is the identity where shapes agree.

    Where a gate of the last unit is closed, the channel is what the shortcut gives.
    """

    def __init__(self, units: Sequence[GatedUnit], shortcut: GatedUnit | None) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.shortcut = shortcut

    def forward(self, x_BMHW: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """`gates` as for `GatedUnit`."""
        skipped = x_BMHW if self.shortcut is None else self.shortcut(x_BMHW, gates)
        *units, last = self.units
        for unit in units:
            x_BMHW = relu(unit(x_BMHW, gates), inplace=True)
        return relu(last(x_BMHW, gates) + skipped, inplace=True)


class ResNet(nn.Module):
    """Stem, residual blocks, mean over pixels, one Linear; `pool` is the stem's max-pooling or the identity."""

    def __init__(
        self, stem: GatedUnit, pool: nn.Module, blocks: Sequence[ResidualBlock], mean: GlobalAveragePool, head: Linear
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
        return [list(block.units) for block in self.blocks if isinstance(block, ResidualBlock)]
