"""Multilayer perceptrons: members, encoders, heads and the six single networks are all one of these two.

Shapes as in `layers`: S seeds, N members, B batch, I inputs, O outputs.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu

from collective_pipeline.models.layers import BatchNorm, Dropout, FanOut, Linear, Stack


class Mlp(nn.Module):
    """Hidden layers of Linear, BatchNorm, ReLU, Dropout; then one Linear.

    `dropout` is one rate for each hidden layer; `normalise=False` leaves BatchNorm out. Members read one shared
    input, or with `shared_input=False` each its own.
    """

    def __init__(
        self,
        stack: Stack,
        dims: Sequence[int],
        *,
        dropout: Sequence[float],
        normalise: bool = True,
        shared_input: bool = True,
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        layers: list[nn.Module] = []
        for (in_dim, out_dim), rate in zip(pairwise(dims[:-1]), dropout, strict=True):
            fans_out = shared_input and not layers
            layers.append((FanOut if fans_out else Linear)(stack, in_dim, out_dim))
            if normalise:
                layers.append(BatchNorm(stack, out_dim))
            layers += [nn.ReLU(), Dropout(stack, out_dim, rate)]
        self.layers = nn.Sequential(*layers, Linear(stack, dims[-2], dims[-1]))

    def forward(self, x_SNBI: Tensor) -> Tensor:
        """`(S, 1, B, I)`, or `(S, N, B, I)` where the input is not shared, to `(S, N, B, O)`."""
        y_SNBO: Tensor = self.layers(x_SNBI)
        return y_SNBO


class ResidualLayer(nn.Module):
    """y = dropout(relu(norm(W x) + skip(x))), the skip being a Linear where the widths differ."""

    def __init__(self, stack: Stack, in_dim: int, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = Linear(stack, in_dim, out_dim)
        self.norm = BatchNorm(stack, out_dim)
        self.skip = nn.Identity() if in_dim == out_dim else Linear(stack, in_dim, out_dim)
        self.dropout = Dropout(stack, out_dim, dropout)

    def forward(self, x_SNBI: Tensor) -> Tensor:
        """`(S, N, B, I)` to `(S, N, B, O)`."""
        y_SNBO: Tensor = self.dropout(relu(self.norm(self.linear(x_SNBI)) + self.skip(x_SNBI)))
        return y_SNBO


def make_residual_mlp(stack: Stack, dims: Sequence[int], *, dropout: float) -> nn.Sequential:
    """Residual layers through the hidden widths of `dims`, then one Linear."""
    layers = [ResidualLayer(stack, in_dim, out_dim, dropout) for in_dim, out_dim in pairwise(dims[:-1])]
    return nn.Sequential(*layers, Linear(stack, dims[-2], dims[-1]))


class Classifier(nn.Module):
    """A single network as an arm: the same interface as `Collective`, and no named parts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and no parts."""
        return self.network(x_SBI.unsqueeze(1)).squeeze(1), {}
