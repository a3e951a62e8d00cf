"""Multilayer perceptrons: members, encoders, heads and the six single networks are all one of these two.

Shapes as in `layers`: S seeds, N members, B batch, I inputs, O outputs.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu

from collective_pipeline.models.layers import BatchNorm, Dropout, FanOut, Linear, Stack


class HiddenLayer(nn.Module):
    """y = dropout(relu(norm(W x + b) + skip(x))).

    Args:
        stack: Seeds and members.
        in_dim: Features read.
        out_dim: Features made.
        dropout: Rate.
        normalise: With BatchNorm.
        fans_out: Whether the members read one shared input, `(S, 1, B, I)`.
        residual: With a skip, which is a Linear where the widths differ.
    """

    def __init__(
        self,
        stack: Stack,
        in_dim: int,
        out_dim: int,
        *,
        dropout: float,
        normalise: bool = True,
        fans_out: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        make = FanOut if fans_out else Linear
        self.linear = make(stack, in_dim, out_dim)
        self.norm = BatchNorm(stack, out_dim) if normalise else None
        self.skip: nn.Module | None = None
        if residual:
            self.skip = nn.Identity() if in_dim == out_dim else make(stack, in_dim, out_dim)
        self.dropout = Dropout(stack, out_dim, dropout)

    def forward(self, x_SNBI: Tensor) -> Tensor:
        """`(S, N, B, I)` to `(S, N, B, O)`."""
        y_SNBO: Tensor = self.linear(x_SNBI)
        if self.norm is not None:
            y_SNBO = self.norm(y_SNBO)
        if self.skip is not None:
            y_SNBO = y_SNBO + self.skip(x_SNBI)
        return self.dropout(relu(y_SNBO))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Hidden layers, then one Linear.

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
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        layers = [
            HiddenLayer(
                stack,
                in_dim,
                out_dim,
                dropout=rate,
                normalise=normalise,
                fans_out=shared_input and stack.num_members > 1 and i == 0,
                residual=residual,
            )
            for i, ((in_dim, out_dim), rate) in enumerate(zip(pairwise(dims[:-1]), dropout, strict=True))
        ]
        self.layers = nn.Sequential(*layers, Linear(stack, dims[-2], dims[-1]))

    def forward(self, x_SNBI: Tensor) -> Tensor:
        """`(S, 1, B, I)`, or `(S, N, B, I)` where the input is not shared, to `(S, N, B, O)`."""
        y_SNBO: Tensor = self.layers(x_SNBI)
        return y_SNBO


class Classifier(nn.Module):
    """A single network as an arm: the same interface as `Collective`, and no named parts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and no parts."""
        return self.network(x_SBI.unsqueeze(1)).squeeze(1), {}
