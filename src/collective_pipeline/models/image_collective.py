"""The collective on images: experts read the maps of a shared stem, analysts weigh them, a head decides.

Suffixes: S seeds, B batch, I flattened image, C channels, H encoded features (of maps: height), W width, M analysts (of
maps: all channels side by side, as in `convolution`), N experts, E member features, D features read, K classes.
"""

import torch
from torch import Tensor, nn

from collective_pipeline.models.collective import Members
from collective_pipeline.models.convolution import GlobalAveragePool, to_maps
from collective_pipeline.models.layers import concat_members
from collective_pipeline.models.mixture import Experts, Extractor, ImageShape
from collective_pipeline.models.mlp import Mlp


class ImageCollective(nn.Module):
    """Experts and analysts on shared maps, combined into one classifier.

        f   = stem(x)
        p   = mean over pixels of f
        e_n = expert_n(f)                   n = 1..N
        h   = encode_experts(e_1, ..., e_N)
        a_m = analyst_m(p, h)               m = 1..M
        z   = head(a_1, ..., a_M)

    What the image is to the analysts of a `Collective`, the pooled maps are here; experts and stem are a `Mixture`'s.
    """

    def __init__(
        self,
        *,
        image_shape: ImageShape,
        stem: Extractor,
        pool: GlobalAveragePool,
        experts: Experts,
        expert_encoder: Mlp,
        analysts: Members,
        head: Mlp,
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.stem = stem
        self.pool = pool
        self.experts = experts
        self.expert_encoder = expert_encoder
        self.analysts = analysts
        self.head = head

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and the members' features, `(S, N, B, E)` and `(S, M, B, E)`, as `Collective`."""
        f_BMHW = self.stem(to_maps(x_SBI, self.image_shape))
        p_S1BC = self.pool(f_BMHW)

        e_SNBE = self.experts(f_BMHW)
        h_S1BH = self.expert_encoder(concat_members(e_SNBE))

        ph_S1BD = torch.cat([p_S1BC, h_S1BH], dim=-1)
        a_SMBE = self.analysts(ph_S1BD)

        logits_S1BK = self.head(concat_members(a_SMBE))
        return logits_S1BK.squeeze(1), {"experts": e_SNBE, "analysts": a_SMBE}
