"""A convolutional network and what gates it, as an arm: from flattened images to logits and parts.

Suffixes as in `gating`.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from collective_pipeline.config import UserError
from collective_pipeline.models.convolution import to_channels, to_maps
from collective_pipeline.models.gating import Gating
from collective_pipeline.models.resnet import ResNet
from collective_pipeline.models.vgg import Vgg


class ImageClassifier(nn.Module):
    """A convolutional network as an arm, with or without gates.

    Attributes:
        network: Maps and gates to logits `(S, 1, B, K)`.
        gated_channels: C of every gated layer, from the image on; none without gates.
    """

    def __init__(
        self,
        network: ResNet | Vgg,
        gating: Gating | None,
        *,
        image_shape: tuple[int, int, int],
        gated_channels: Sequence[int],
    ) -> None:
        super().__init__()
        self.network = network
        self.gating = gating
        self.image_shape = image_shape
        self.gated_channels = tuple(gated_channels)

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and, with gates, the parts `gates` `(S, B, G)` and `embedding_logits` `(S, B, K)`.

        The gates of all layers stand side by side, `gated_channels` of each.
        """
        x_BMHW = self.to_maps(x_SBI)
        if self.gating is None:
            return self.network(x_BMHW, ()).squeeze(1), {}

        g_S1BG, embedding_logits_S1BK = self.gating(x_BMHW)
        gates = [to_channels(g_S1BC) for g_S1BC in g_S1BG.split(self.gated_channels, dim=-1)]
        logits_S1BK = self.network(x_BMHW, gates)
        parts = {"gates": g_S1BG.squeeze(1), "embedding_logits": embedding_logits_S1BK.squeeze(1)}
        return logits_S1BK.squeeze(1), parts

    def to_maps(self, x_SBI: Tensor) -> Tensor:
        """Images as maps; a ResNet, which ends in a mean over pixels, reads square ones of any other size as well.

        Raises:
            UserError: If a VGG is to do so.
        """
        channels, height, width = self.image_shape
        if x_SBI.shape[-1] != math.prod(self.image_shape):
            if not isinstance(self.network, ResNet):
                raise UserError(
                    f"a VGG reads images of {height}x{width} pixels alone: choose a ResNet for several sizes"
                )
            height = width = math.isqrt(x_SBI.shape[-1] // channels)
        return to_maps(x_SBI, (channels, height, width))
