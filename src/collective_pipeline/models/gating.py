"""Gates on the channels of a convolutional network, one vector of them for each image (DeepMoE, Wang et al. 2019).

A shallow network embeds the image once; every gated convolution has a head that reads this embedding.

Suffixes as in `convolution`; D embedding features, G gates of all layers side by side, K classes. The heads and the
networks they gate have one member, N = 1.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import gelu, relu

from collective_pipeline.models.convolution import Conv2d, GlobalAveragePool
from collective_pipeline.models.layers import Linear, Stack


class ShallowEmbedding(nn.Module):
    """e = mean over pixels of gelu(conv(... gelu(conv(image)))): 3x3, stride 2, ever wider."""

    def __init__(self, stack: Stack, in_channels: int, dim: int, *, num_layers: int) -> None:
        super().__init__()
        widths = [in_channels, *(dim // num_layers * layer for layer in range(1, num_layers)), dim]
        self.layers = nn.ModuleList(Conv2d(stack, i, o, 3, stride=2, bias=True) for i, o in pairwise(widths))
        self.pool = GlobalAveragePool(stack)

    def forward(self, x_BMHW: Tensor) -> Tensor:
        """Maps of the images to `(S, 1, B, D)`."""
        for layer in self.layers:
            x_BMHW = gelu(layer(x_BMHW))
        return self.pool(x_BMHW)  # type: ignore[no-any-return]


class GateHeads(nn.Module):
    """g = relu(offset + W e + b) for the channels of all gated layers at once.

    With an offset of 1 the network begins near the one without gates, and weight decay pulls it there. At 0, as in the
    original, signal and gradient shrink with every gated layer until they vanish.

    Args:
        stack: Seeds.
        in_dim: D.
        num_gates: G.
        offset: What all gates would be without weights.
        bias: Whether every gate has a constant of its own, b.
    """

    def __init__(self, stack: Stack, in_dim: int, num_gates: int, *, offset: float, bias: bool) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.zeros(*stack, in_dim, num_gates))
        self.bias = nn.Parameter(torch.zeros(*stack, 1, num_gates)) if bias else None

    def initialise(self, generators: Sequence[Generator]) -> None:
        """Normal weights as large as the original's (torch's default, of variance 1 / 3D), zero b, seed by seed."""
        with torch.no_grad():
            if self.bias is not None:
                self.bias.zero_()
            for weight_NDG, generator in zip(self.weight, generators, strict=True):
                drawn = torch.randn(weight_NDG.shape, generator=generator)
                weight_NDG.copy_(drawn / math.sqrt(3 * weight_NDG.shape[1]))

    def forward(self, e_SNBD: Tensor) -> Tensor:
        """`(S, 1, B, D)` to `(S, 1, B, G)`."""
        g_SNBG = torch.bmm(e_SNBD.flatten(0, 1), self.weight.flatten(0, 1)).unflatten(0, self.weight.shape[:2])
        return relu(g_SNBG + (self.offset if self.bias is None else self.offset + self.bias))


class Gating(nn.Module):
    """What decides, for each image, which channels of which layers take part.

    The embedding classifier has no part in that: it lets the embedding learn the classes.
    """

    def __init__(self, embedding: ShallowEmbedding, heads: GateHeads, classifier: Linear) -> None:
        super().__init__()
        self.embedding = embedding
        self.heads = heads
        self.classifier = classifier

    def forward(self, x_BMHW: Tensor) -> tuple[Tensor, Tensor]:
        """The gates `(S, 1, B, G)` of images, and the embedding's own logits `(S, 1, B, K)`."""
        e_S1BD = self.embedding(x_BMHW)
        return self.heads(e_S1BD), self.classifier(e_S1BD)


class GatedUnit(nn.Module):
    """y = g * norm(conv(x)), or in the original's order y = norm(g * conv(x)); without a gate, y = norm(conv(x)).

    After the norm, a closed gate makes a channel of zeros, which neither it nor its reader need compute. Before it, the
    norm makes a constant of those zeros, and the scale of one image's gates disturbs the statistics of all.

    Args:
        conv: Any convolution.
        norm: Any norm of its channels, or none.
        gate: Which of the network's gated layers it is, from 0; none if it has no gate.
        gate_first: The original's order.
    """

    def __init__(self, conv: Conv2d, norm: nn.Module | None, *, gate: int | None, gate_first: bool) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.gate = gate
        self.gate_first = gate_first

    def forward(self, x_BMHW: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """`gates` are of all gated layers, each `(B, S*C, 1, 1)`; the maps keep their precision."""
        y_BMHW: Tensor = self.conv(x_BMHW)
        if self.gate is not None and self.gate_first:
            y_BMHW = y_BMHW * gates[self.gate].to(y_BMHW.dtype)
        if self.norm is not None:
            y_BMHW = self.norm(y_BMHW)
        if self.gate is not None and not self.gate_first:
            y_BMHW = y_BMHW * gates[self.gate].to(y_BMHW.dtype)
        return y_BMHW
