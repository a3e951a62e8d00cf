"""Layers that carry a stack of independent networks: weights `(S, N, in, out)`, features `(S, N, B, in)`.

S seeds, N members, B batch, D features. One network alone is the case S = N = 1, so there is one implementation.
Nothing in this file mixes two entries of S or of N.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn

BN_EPSILON, BN_MOMENTUM = 1e-5, 0.1  # torch's own


class Stack(NamedTuple):
    """How many networks of one shape a layer holds."""

    num_seeds: int
    num_members: int = 1


class Linear(nn.Module):
    """y = x W + b, for every seed and member; an input with S = 1 is shared by all seeds."""

    def __init__(self, stack: Stack, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*stack, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(*stack, 1, out_dim))

    def initialise(self, generators: Sequence[Generator]) -> None:
        """He-normal weights by fan-in, zero biases; seed s draws from `generators[s]` alone."""
        std = math.sqrt(2 / self.weight.shape[2])
        with torch.no_grad():
            self.bias.zero_()
            for weight_NIO, generator in zip(self.weight, generators, strict=True):
                weight_NIO.copy_(torch.randn(weight_NIO.shape, generator=generator) * std)

    def forward(self, x_SNBI: Tensor) -> Tensor:
        """`(S, N, B, in)` to `(S, N, B, out)`."""
        y_TBO = torch.baddbmm(self.bias.flatten(0, 1), self._flatten(x_SNBI), self.weight.flatten(0, 1))
        return self._unflatten(y_TBO)

    def product(self, x_SNBI: Tensor) -> Tensor:
        """The same without the bias."""
        return self._unflatten(torch.bmm(self._flatten(x_SNBI), self.weight.flatten(0, 1)))

    def _flatten(self, x_SNBI: Tensor) -> Tensor:
        return x_SNBI.expand(len(self.weight), -1, -1, -1).flatten(0, 1)

    def _unflatten(self, y_TBO: Tensor) -> Tensor:
        return y_TBO.view(*self.weight.shape[:2], *y_TBO.shape[1:])


class FanOut(nn.Module):
    """y_n = x W_n + b_n for members that read the same x.

    Their matrices stand side by side in one Linear: one large product instead of N, and neither the input nor its
    gradient is ever copied N times (6 analysts, 3 seeds on a CPU: 3 ms a step instead of 27).
    """

    def __init__(self, stack: Stack, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.num_members = stack.num_members
        self.linear = Linear(Stack(stack.num_seeds), in_dim, stack.num_members * out_dim)

    def forward(self, x_S1BI: Tensor) -> Tensor:
        """`(S, 1, B, in)` to `(S, N, B, out)`."""
        return self._unflatten(self.linear(x_S1BI))

    def product(self, x_S1BI: Tensor) -> Tensor:
        """The same without the biases."""
        return self._unflatten(self.linear.product(x_S1BI))

    def _unflatten(self, y_S1BM: Tensor) -> Tensor:
        return y_S1BM.view(len(y_S1BM), y_S1BM.shape[2], self.num_members, -1).transpose(1, 2)


class ChannelNorm(nn.Module):
    """The state of batch normalisation (Ioffe & Szegedy 2015), and what it does to the channels of all networks.

    Every channel is scaled by `scale` at first.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, stack: Stack, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((*stack, dim), scale))
        self.bias = nn.Parameter(torch.zeros(*stack, dim))
        self.register_buffer("running_mean", torch.zeros(*stack, dim))
        self.register_buffer("running_var", torch.ones(*stack, dim))
        self.over_ranks = False

    def normalise(self, y_BC: Tensor) -> Tensor:
        """`(B, S*N*D)`, or with more dimensions: each channel over all but its own, then scaled and shifted."""
        if self.over_ranks and self.training:
            return self._normalise_over_ranks(y_BC)
        return F.batch_norm(
            y_BC,
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            training=self.training,
            momentum=BN_MOMENTUM,
            eps=BN_EPSILON,
        )

    def _normalise_over_ranks(self, y_BC: Tensor) -> Tensor:
        """Over the batches of all processes, which are of one size; gradients pass between them as well."""
        others = [dim for dim in range(y_BC.ndim) if dim != 1]
        of_rank = torch.stack([y_BC.float().mean(dim=others), y_BC.float().square().mean(dim=others)])
        mean_C, square_C = (_SumOverRanks.apply(of_rank) / dist.get_world_size()).unbind()
        var_C = (square_C - mean_C.square()).clamp(min=0)
        count = y_BC.numel() // y_BC.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.view(-1).lerp_(mean_C, BN_MOMENTUM)
            self.running_var.view(-1).lerp_(var_C * (count / (count - 1)), BN_MOMENTUM)
        scale_C = self.weight.view(-1) * (var_C + BN_EPSILON).rsqrt()
        shape = [-1, *[1] * (y_BC.ndim - 2)]
        shifted = self.bias.view(-1) - mean_C * scale_C
        normalised: Tensor = y_BC * scale_C.view(shape) + shifted.view(shape)
        return normalised.to(y_BC.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Of a tensor of every process; what changes in it changes the losses of all of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def normalise_over_ranks(model: nn.Module) -> None:
    """Let all norms of `model` see the batches of all processes that train it together."""
    for module in model.modules():
        if isinstance(module, ChannelNorm):
            module.over_ranks = True


class BatchNorm(ChannelNorm):
    """Normalise every feature over the batch alone, then scale and shift."""

    def forward(self, x_SNBD: Tensor) -> Tensor:
        """Same shape as the input."""
        num_seeds, num_members, batch, dim = x_SNBD.shape
        # One fused kernel over S*N*D channels: 3 to 4 times faster on a CPU than mean, variance and scale by hand.
        y_BC = self.normalise(x_SNBD.permute(2, 0, 1, 3).reshape(batch, -1))
        return y_BC.view(batch, num_seeds, num_members, dim).permute(1, 2, 0, 3)


class RandomBits(nn.Module):
    """16 random bits for each of `dim` features of every image and member, as signed integers.

    The training loop fills `bits` before each step from every seed's own generator (`training.dropout_bits`), so that
    a seed's draws cannot depend on its neighbours. Left alone, it draws from torch's global generator.
    """

    def __init__(self, stack: Stack, dim: int) -> None:
        super().__init__()
        self.num_members = stack.num_members
        self.dim = dim
        self.bits: Tensor | None = None

    def forward(self, x_SNBD: Tensor) -> Tensor:
        """Bits `(S, N, B, dim)` for the features of `x`."""
        if self.bits is not None:
            return self.bits
        shape = (*x_SNBD.shape[:3], self.dim)
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=x_SNBD.device)


class Dropout(nn.Module):
    """Zero features with probability `rate` while training and scale the others by 1 / (1 - rate)."""

    def __init__(self, stack: Stack, dim: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draw = RandomBits(stack, dim) if rate else None

    def forward(self, x_SNBD: Tensor) -> Tensor:
        """Same shape as the input."""
        if not self.training or self.draw is None:
            return x_SNBD
        keep_SNBD: Tensor = self.draw(x_SNBD) >= bits_below(self.rate)
        kept_SNBD: Tensor = x_SNBD * keep_SNBD.to(x_SNBD.dtype).mul_(1 / (1 - self.rate))
        return kept_SNBD

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def bits_below(probability: float) -> int:
    """The 16-bit signed number that a uniform one is below with this `probability`."""
    return min(round(probability * 2**16), 2**16 - 1) - 2**15


def concat_members(x_SNBD: Tensor) -> Tensor:
    """All members' features side by side, `(S, 1, B, N*D)`."""
    return x_SNBD.transpose(1, 2).flatten(2).unsqueeze(1)
