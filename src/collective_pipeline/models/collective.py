"""The collective: experts read, analysts weigh, a head decides.

Shape suffixes: S seeds, B batch, I input features, N experts, M analysts, E member features, H encoded features,
K classes. A shared input has 1 in the members' place.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from collective_pipeline.models.layers import RandomBits, Stack, bits_below, concat_members
from collective_pipeline.models.mlp import Mlp


class Collective(nn.Module):
    """Experts and analysts combined into one classifier.

        e_n = expert_n(x)                          n = 1..N
        h   = encode_experts(e_1, ..., e_N)
        a_m = analyst_m(x, h)                      m = 1..M
        z   = head(encode_analysts(a_1, ..., a_M))

    The analysts see the raw input beside the experts' summary: that is what separates a collective from a
    two-stage ensemble. Without an analyst encoder, `analyst_encoder` is the identity.
    """

    def __init__(
        self,
        *,
        experts: "Members",
        expert_encoder: nn.Module,
        analysts: "Members",
        analyst_encoder: nn.Module,
        head: nn.Module,
        expert_dropout: "MemberDropout",
        analyst_dropout: "MemberDropout",
    ) -> None:
        super().__init__()
        self.experts = experts
        self.expert_encoder = expert_encoder
        self.analysts = analysts
        self.analyst_encoder = analyst_encoder
        self.head = head
        self.expert_dropout = expert_dropout
        self.analyst_dropout = analyst_dropout

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and the members' features, `(S, N, B, E)` and `(S, M, B, E)`."""
        x_S1BI = x_SBI.unsqueeze(1)

        e_SNBE = self.experts(x_S1BI)
        kept_SNBE = self.expert_dropout(e_SNBE)
        h_S1BH = self.expert_encoder(concat_members(kept_SNBE))

        xh_S1BD = torch.cat([x_S1BI.expand(len(h_S1BH), -1, -1, -1), h_S1BH], dim=-1)
        a_SMBE = self.analysts(xh_S1BD)
        kept_SMBE = self.analyst_dropout(a_SMBE)

        logits_S1BK = self.head(self.analyst_encoder(concat_members(kept_SMBE)))
        parts = {
            "experts": self.expert_dropout.part(e_SNBE, kept_SNBE),
            "analysts": self.analyst_dropout.part(a_SMBE, kept_SMBE),
        }
        return logits_S1BK.squeeze(1), parts


class Members(nn.Module):
    """Networks side by side; those of one shape are one batched parameter.

    Args:
        num_seeds: S.
        dims: Widths of every member, input and output included. All members share both of those.
        dropout: Rate after every hidden layer but the last.
        shared_input: Whether all read the same, or each its own.
    """

    order: Tensor

    def __init__(
        self, num_seeds: int, dims: Sequence[Sequence[int]], *, dropout: float, shared_input: bool = True
    ) -> None:
        super().__init__()
        self.dims = [tuple(member_dims) for member_dims in dims]
        positions: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, member_dims in enumerate(self.dims):
            positions[member_dims].append(position)
        self.shared_input = shared_input
        self.positions = list(positions.values())
        self.groups = nn.ModuleList(
            Mlp(
                Stack(num_seeds, len(where)),
                shape,
                dropout=[*[dropout] * (len(shape) - 3), 0.0],
                shared_input=shared_input,
            )
            for shape, where in positions.items()
        )
        # Where each member stands among the groups, so that outputs come in the members' own order.
        grouped = [position for where in self.positions for position in where]
        self.register_buffer(
            "order", torch.tensor(sorted(range(len(grouped)), key=grouped.__getitem__)), persistent=False
        )

    def forward(self, x_SNBI: Tensor) -> Tensor:
        """`(S, 1, B, I)`, or `(S, N, B, I)` where the input is not shared, to `(S, N, B, E)`."""
        if len(self.groups) == 1:
            y_SNBE: Tensor = self.groups[0](x_SNBI)
            return y_SNBE
        outputs = [
            group(x_SNBI if self.shared_input else x_SNBI[:, where])
            for group, where in zip(self.groups, self.positions, strict=True)
        ]
        return torch.cat(outputs, dim=1)[:, self.order]


class MemberDropout(nn.Module):
    """Drop whole members while training, never all of them: where none is left, one is kept at random.

    `per_image` draws for every image and divides by the probability of being kept, (1 - r) + r^N / N, so that the
    expected sum stays. `original` draws once for the whole batch, does not rescale, and hands the zeroed outputs
    on as the members' features (so that pairs with a dropped member count as orthogonal).
    """

    def __init__(self, stack: Stack, rate: float, form: Literal["per_image", "original"]) -> None:
        super().__init__()
        self.rate = rate if stack.num_members > 1 else 0.0
        self.form = form
        self.keep_probability = 1 - self.rate + self.rate**stack.num_members / stack.num_members
        self.draw = RandomBits(stack, 1) if self.rate else None

    def forward(self, x_SNBE: Tensor) -> Tensor:
        """Same shape as the input."""
        if not self.training or self.draw is None:
            return x_SNBE
        bits_SNB1: Tensor = self.draw(x_SNBE)
        if self.form == "original":
            bits_SNB1 = bits_SNB1[:, :, :1]
        # The largest draw survives in any case: given that all are dropped, every member is equally likely to be it.
        keep_SNB1 = (bits_SNB1 >= bits_below(self.rate)) | (bits_SNB1 == bits_SNB1.amax(dim=1, keepdim=True))
        scale = 1.0 if self.form == "original" else 1 / self.keep_probability
        return x_SNBE * keep_SNB1.to(x_SNBE.dtype).mul_(scale)

    def part(self, whole_SNBE: Tensor, kept_SNBE: Tensor) -> Tensor:
        """What the losses see as the members' features."""
        return kept_SNBE if self.form == "original" else whole_SNBE
