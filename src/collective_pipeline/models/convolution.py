"""Convolutions for a stack of independent networks: weights `(S, N, out, in, k, k)`, maps `(B, S*N*C, H, W)`.

S seeds, N members, B batch, C channels, H height, W width, I input features, M all channels of a map side by side: of
seed 0 those of its member 0, then of its member 1, ... One network alone is an ordinary convolution on ordinary
maps; several are one grouped convolution. The members of a seed side by side are at the same time one map of N*C
channels for `Stack(S)`: nothing has to be moved to read them together. Nothing in this file mixes two entries of S.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from collective_pipeline.models.layers import ChannelNorm, Stack


class Conv2d(nn.Module):
    """Cross-correlation with k x k kernels, for every seed and member.

    Args:
        stack: Seeds and members.
        in_channels: Channels read by each member.
        out_channels: Channels made by each.
        kernel_size: k.
        stride: Of both axes.
        padding: Zeros on every side; by default as many as keep the size at stride 1.
        groups: Within each member; `in_channels` for a depthwise convolution.
        bias: Whether a constant is added to every channel.
    """

    def __init__(
        self,
        stack: Stack,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.stride = stride
        self.padding = kernel_size // 2 if padding is None else padding
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(*stack, out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(*stack, out_channels)) if bias else None

    def initialise(self, generators: Sequence[Generator]) -> None:
        """He-normal weights by fan-out, zero biases; seed s draws from `generators[s]` alone."""
        fan_out = self.weight[0, 0, :, 0].numel() / self.groups
        with torch.no_grad():
            if self.bias is not None:
                self.bias.zero_()
            for weight_NOIKK, generator in zip(self.weight, generators, strict=True):
                drawn = torch.randn(weight_NOIKK.shape, generator=generator)
                weight_NOIKK.copy_(drawn * math.sqrt(2 / fan_out))

    def forward(self, x_BMHW: Tensor) -> Tensor:
        """Maps of every member, of every seed (its members share them) or of all seeds alike, to `(B, S*N*out, ...)`.

        What is shared is read as it is, never copied, but for a convolution in groups.
        """
        num_inputs = x_BMHW.shape[1] // self.in_channels
        num_networks = self.weight.shape[:2].numel()
        if self.groups > 1 and num_inputs < num_networks:
            maps = x_BMHW.unflatten(1, (num_inputs, self.in_channels))
            x_BMHW, num_inputs = maps.repeat_interleave(num_networks // num_inputs, dim=1).flatten(1, 2), num_networks
        return F.conv2d(
            x_BMHW,
            self.weight.flatten(0, 2),
            None if self.bias is None else self.bias.flatten(),
            stride=self.stride,
            padding=self.padding,
            groups=num_inputs * self.groups,
        )


class BatchNorm2d(ChannelNorm):
    """Normalise every channel over batch and pixels, then scale and shift."""

    def forward(self, x_BMHW: Tensor) -> Tensor:
        """Same shape as the input."""
        return self.normalise(x_BMHW)


class Blur(nn.Module):
    """Half the pixels of both axes: binomial means of 4x4, one for every second pixel, so that nothing aliases.

    After Zhang 2019; edges reflect. The weights are constants, exact in bfloat16 too.
    """

    kernel_KK: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps_K = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel_KK", torch.outer(taps_K, taps_K) / 64, persistent=False)

    def forward(self, x_BMHW: Tensor) -> Tensor:
        """Maps of 3x3 pixels or more to maps of half the size, rounded up."""
        channels = x_BMHW.shape[1]
        padded_BMHW = _reflect(_reflect(x_BMHW, 2), 3)
        return F.conv2d(padded_BMHW, self.kernel_KK.expand(channels, 1, -1, -1), stride=2, groups=channels)


def _reflect(x_BMHW: Tensor, dim: int) -> Tensor:
    """One pixel more before and two behind. The gradients of torch's own padding add up in any order on a GPU."""
    size = x_BMHW.shape[dim]
    edges = [x_BMHW.narrow(dim, place, 1) for place in (1, size - 2, size - 3)]
    return torch.cat([edges[0], x_BMHW, *edges[1:]], dim=dim)


class GlobalAveragePool(nn.Module):
    """The mean of every channel over all pixels."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x_BMHW: Tensor) -> Tensor:
        """Maps `(B, S*N*C, H, W)` to features `(S, N, B, C)`."""
        return to_features(x_BMHW.mean(dim=(2, 3), keepdim=True), self.stack)


def to_maps(x_SBI: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Flattened images `(S, B, C*H*W)` as maps `(B, S*C, H, W)`.

    Images that all seeds share come with S = 1 and stay so: `Conv2d` reads maps of C channels for every seed.
    """
    maps_BSCHW: Tensor = x_SBI.transpose(0, 1).unflatten(-1, image_shape)
    maps_BMHW = maps_BSCHW.flatten(1, 2)
    # cuDNN wants the channels last in memory. On a CPU, the backward pass of strided 1x1 convolutions of such maps
    # writes where it must not (torch 2.15 with oneDNN: "corrupted size vs. prev_size").
    return maps_BMHW.contiguous(memory_format=torch.channels_last) if maps_BMHW.is_cuda else maps_BMHW.contiguous()


def to_features(x_BMHW: Tensor, stack: Stack) -> Tensor:
    """Maps `(B, S*N*C, H, W)` as features `(S, N, B, C*H*W)`, the form that `layers` read."""
    x_BSNCHW: Tensor = x_BMHW.unflatten(1, (*stack, -1))
    return x_BSNCHW.flatten(3).permute(1, 2, 0, 3)


def to_channels(x_SNBC: Tensor) -> Tensor:
    """Features `(S, N, B, C)` as maps of one pixel `(B, S*N*C, 1, 1)`: a factor for every channel of larger maps."""
    return x_SNBC.permute(2, 0, 1, 3).flatten(1)[..., None, None]
