"""VGG networks (Simonyan & Zisserman 2015): stages of 3x3 convolutions, each ended by max-pooling, then an MLP.

Suffixes as in `convolution`; K classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d, relu

from collective_pipeline.models.convolution import Conv2d, to_features
from collective_pipeline.models.gating import GatedUnit
from collective_pipeline.models.layers import Linear, Stack
from collective_pipeline.models.mlp import Mlp


class VggStage(nn.Module):
    """x = relu(unit(x)) for one unit after another, then the largest of every 2x2 pixels."""

    def __init__(self, units: Sequence[GatedUnit]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, x_BMHW: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """`gates` as for `GatedUnit`."""
        for unit in self.units:
            x_BMHW = relu(unit(x_BMHW, gates), inplace=True)
        return max_pool2d(x_BMHW, 2)


class Vgg(nn.Module):
    """Stages of convolutions, and a head that reads maps of `pooled_side` pixels a side."""

    def __init__(self, stack: Stack, stages: Sequence[VggStage], head: Mlp, *, pooled_side: int) -> None:
        super().__init__()
        self.stack = stack
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.pooled_side = pooled_side

    @property
    def num_channels(self) -> int:
        """Of the last stage's maps, for each seed."""
        last = [module for module in self.stages.modules() if isinstance(module, Conv2d)][-1]
        return last.weight.shape[2]

    def forward(self, x_BMHW: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Maps of images, and gates as for `GatedUnit`, to logits `(S, 1, B, K)`."""
        for stage in self.stages:
            x_BMHW = stage(x_BMHW, gates)
        return self.read(x_BMHW)

    def read(self, x_BMHW: Tensor) -> Tensor:
        """What the head makes of the last stage's maps."""
        x_BMHW = adaptive_avg_pool2d(x_BMHW, self.pooled_side)
        return self.head(to_features(x_BMHW, self.stack))  # type: ignore[no-any-return]

    def chains(self) -> list[list[nn.Module]]:
        """Layers in rows in which each reads only what the one before it made: no channel passes beside them."""
        units = [unit for stage in self.stages if isinstance(stage, VggStage) for unit in stage.units]
        first = next(module for module in self.head.modules() if isinstance(module, Linear))
        return [[*units, first]]
