"""Mixtures of experts on images that are merged from sub-models, and the sub-models themselves.

Suffixes: S seeds, N experts, B batch, I flattened image, C channels, H height, W width, M all channels of a map side by
side (as in `convolution`), F features of an expert, R features of the analyst, K classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from collective_pipeline.models.convolution import BatchNorm2d, Conv2d, GlobalAveragePool, to_features, to_maps
from collective_pipeline.models.layers import Dropout, Linear, RandomBits, Stack
from collective_pipeline.models.mlp import HiddenLayer, Mlp

ImageShape = tuple[int, int, int]  # channels, height, width
Channels = tuple[int, int, int, int]
POOLED = 4  # pixels of an image on each axis that become one pixel of the extracted maps


class ConvBlock(nn.Sequential):
    """y = relu(norm(conv(x))), k x k."""

    def __init__(self, stack: Stack, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(
            Conv2d(stack, in_channels, out_channels, kernel_size),
            BatchNorm2d(stack, out_channels),
            nn.ReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """y = relu(blocks(x) + shortcut(x)); the shortcut is a 1x1 convolution where the channels differ."""

    def __init__(self, stack: Stack, in_channels: int, out_channels: int, *, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(ConvBlock(stack, in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks))
        )
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else Conv2d(stack, in_channels, out_channels, kernel_size=1)
        )

    def forward(self, x_BMHW: Tensor) -> Tensor:
        """Maps of every seed to maps of the same size."""
        return relu(self.blocks(x_BMHW) + self.shortcut(x_BMHW), inplace=True)


class Extractor(nn.Sequential):
    """What all experts read: maps of a quarter of the image's height and width."""

    def __init__(self, stack: Stack, in_channels: int, channels: Channels) -> None:
        first, second, third, last = channels
        super().__init__(
            ConvBlock(stack, in_channels, first),
            ResidualBlock(stack, first, second, num_blocks=1),
            nn.MaxPool2d(2),
            ResidualBlock(stack, second, third, num_blocks=2),
            nn.MaxPool2d(2),
            ConvBlock(stack, third, last, kernel_size=1),
        )


class Experts(nn.Module):
    """h_n = dropout(mean over pixels of dropout(relu(norm(pointwise_n(depthwise_n(f)))))), members of one stack.

    Args:
        stack: Seeds and experts.
        channels: Of the maps that all experts read, and F.
        map_size: Height times width of those maps.
        dropout: Rate of both dropouts.
    """

    def __init__(self, stack: Stack, channels: int, map_size: int, dropout: float) -> None:
        super().__init__()
        self.stack = stack
        self.channels = channels
        self.depthwise = Conv2d(stack, channels, channels, kernel_size=3, groups=channels)
        self.pointwise = Conv2d(stack, channels, channels, kernel_size=1)
        self.norm = BatchNorm2d(stack, channels)
        self.map_dropout = Dropout(stack, channels * map_size, dropout)
        self.feature_dropout = Dropout(stack, channels, dropout)

    def forward(self, f_BMHW: Tensor) -> Tensor:
        """Maps `(B, S*C, H, W)` to features `(S, N, B, F)`."""
        y_BMHW = relu(self.norm(self.pointwise(self.depthwise(f_BMHW))))
        y_SNBD = self.map_dropout(to_features(y_BMHW, self.stack))
        return self.feature_dropout(y_SNBD.unflatten(-1, (self.channels, -1)).mean(dim=-1))  # type: ignore[no-any-return]


class SubModel(nn.Module):
    """A network for one group of classes: extractor, one expert, one Linear. Alone it is the dense baseline."""

    def __init__(self, image_shape: ImageShape, extractor: Extractor, experts: Experts, classifier: Linear) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.extractor = extractor
        self.experts = experts
        self.classifier = classifier

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and no parts."""
        h_S1BF = self.experts(self.extractor(to_maps(x_SBI, self.image_shape)))
        return self.classifier(h_S1BF).squeeze(1), {}


class SoftmaxGate(nn.Module):
    """g = softmax(z / T + noise), z by a network with one hidden layer; noise only while training.

    The temperature T is part of the state, `(S,)`: a network that is read from a file decides as it did before.

    Args:
        stack: Seeds.
        dims: Features read, hidden features, experts.
        dropout: Rate after the hidden layer.
        noise: Standard deviation of the noise.
        temperature: T until training moves it.
    """

    temperature: Tensor

    def __init__(
        self, stack: Stack, dims: tuple[int, int, int], *, dropout: float, noise: float, temperature: float
    ) -> None:
        super().__init__()
        self.network = Mlp(stack, dims, dropout=[dropout])
        self.noise = noise
        self.draw = RandomBits(stack, dims[-1]) if noise else None
        self.register_buffer("temperature", torch.full((stack.num_seeds,), temperature))

    def forward(self, p_S1BC: Tensor) -> Tensor:
        """Pooled maps `(S, 1, B, C)` to gates `(S, B, N)`, which sum to 1."""
        z_S1BN = self.network(p_S1BC).float() / self.temperature.view(-1, 1, 1, 1)
        if self.training and self.draw is not None:
            z_S1BN = z_S1BN + self.noise * normal_from_bits(self.draw(z_S1BN))
        return z_S1BN.softmax(dim=-1).squeeze(1)  # type: ignore[no-any-return]


class OpenGate(nn.Module):
    """g = 1 for the only expert there is."""

    def forward(self, p_S1BC: Tensor) -> Tensor:
        """Pooled maps `(S, 1, B, C)` to ones, `(S, B, 1)`."""
        return p_S1BC.new_ones(len(p_S1BC), p_S1BC.shape[2], 1)


class FeatureHead(nn.Module):
    """z = classify([sum_n g_n h_n, r]), r = analyst(p): the gates mix features, beside which an analyst's stand."""

    def __init__(self, analyst: nn.Module, classifier: Linear) -> None:
        super().__init__()
        self.analyst = analyst
        self.classifier = classifier

    def forward(self, g_SBN: Tensor, h_SNBF: Tensor, p_S1BC: Tensor) -> Tensor:
        """Gates, experts' features and pooled maps to logits `(S, B, K)`."""
        features_S1BD = torch.cat([mix(g_SBN, h_SNBF).unsqueeze(1), self.analyst(p_S1BC)], dim=-1)
        return self.classifier(features_S1BD).squeeze(1)  # type: ignore[no-any-return]


class LogitHead(nn.Module):
    """z = sum_n g_n classify_n(h_n): every expert decides, and the gates mix their decisions."""

    def __init__(self, classifiers: Linear) -> None:
        super().__init__()
        self.classifiers = classifiers

    def forward(self, g_SBN: Tensor, h_SNBF: Tensor, p_S1BC: Tensor) -> Tensor:
        """Gates and experts' features to logits `(S, B, K)`; the pooled maps are not needed."""
        return mix(g_SBN, self.classifiers(h_SNBF))


class Mixture(nn.Module):
    """Experts on shared maps, weighed image by image.

        f   = extract(x)
        p   = mean over pixels of f
        h_n = expert_n(f)                   n = 1..N
        g   = gate(p)
        z   = head(g, h_1, ..., h_N, p)

    All experts are run for every image: the mixture is soft and saves nothing.
    """

    def __init__(
        self,
        *,
        image_shape: ImageShape,
        extractor: Extractor,
        pool: GlobalAveragePool,
        experts: Experts,
        gate: SoftmaxGate | OpenGate,
        head: FeatureHead | LogitHead,
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.extractor = extractor
        self.pool = pool
        self.experts = experts
        self.gate = gate
        self.head = head

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and the gates, `(S, B, N)`."""
        h_SNBF, p_S1BC = self.read(x_SBI)
        g_SBN = self.gate(p_S1BC)
        return self.head(g_SBN, h_SNBF, p_S1BC), {"gates": g_SBN}

    def read(self, x_SBI: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' features `(S, N, B, F)` and the pooled maps `(S, 1, B, C)`."""
        f_BMHW = self.extractor(to_maps(x_SBI, self.image_shape))
        return self.experts(f_BMHW), self.pool(f_BMHW)

    def expert_logits(self, x_SBI: Tensor) -> Tensor:
        """What each expert says alone, its gate 1 and the others 0: `(S, N, B, K)`."""
        h_SNBF, p_S1BC = self.read(x_SBI)
        num_seeds, num_experts, batch, _ = h_SNBF.shape
        alone_NN = torch.eye(num_experts, device=h_SNBF.device)
        return self._decide_each(h_SNBF, p_S1BC, [gates_N.expand(num_seeds, batch, -1) for gates_N in alone_NN])

    def logits_without(self, x_SBI: Tensor) -> Tensor:
        """What the others say without each expert, their gates raised to sum to 1: `(S, N, B, K)`."""
        h_SNBF, p_S1BC = self.read(x_SBI)
        g_SBN = self.gate(p_S1BC)
        others_NN = 1 - torch.eye(g_SBN.shape[-1], device=g_SBN.device)
        return self._decide_each(
            h_SNBF, p_S1BC, [nn.functional.normalize(g_SBN * others_N, p=1, dim=-1) for others_N in others_NN]
        )

    def _decide_each(self, h_SNBF: Tensor, p_S1BC: Tensor, gates: Sequence[Tensor]) -> Tensor:
        return torch.stack([self.head(g_SBN, h_SNBF, p_S1BC) for g_SBN in gates], dim=1)


def mix(g_SBN: Tensor, y_SNBF: Tensor) -> Tensor:
    """The experts' outputs weighed by the gates, `(S, B, F)`."""
    return (g_SBN.transpose(1, 2).unsqueeze(-1) * y_SNBF).sum(dim=1)


def normal_from_bits(bits: Tensor) -> Tensor:
    """Normally distributed numbers from uniform 16-bit signed ones, by the inverse of the distribution function."""
    return math.sqrt(2) * torch.erfinv((bits.float() + 0.5) / 2**15)


def build_sub_model(
    stack: Stack, image_shape: ImageShape, channels: Channels, *, dropout: float, num_classes: int
) -> SubModel:
    """A sub-model; parameters as in `build_mixture`."""
    return SubModel(
        image_shape,
        Extractor(stack, image_shape[0], channels),
        Experts(stack, channels[-1], map_size(image_shape), dropout),
        Linear(stack, channels[-1], num_classes),
    )


def build_mixture(
    stack: Stack,
    image_shape: ImageShape,
    channels: Channels,
    *,
    num_experts: int,
    mixes_logits: bool,
    gate_width: int,
    expert_dropout: float,
    gate_dropout: float,
    gate_noise: float,
    temperature: float,
    num_classes: int,
) -> Mixture:
    """A mixture without weights.

    Args:
        stack: Seeds.
        image_shape: Channels, height and width.
        channels: Of the extractor's four stages; the last is F as well.
        num_experts: N; one alone has no gate.
        mixes_logits: Whether the experts' logits are mixed, or their features.
        gate_width: Hidden features of the gate, and R.
        expert_dropout: Rate of both dropouts of an expert.
        gate_dropout: Rate in the gate and the analyst.
        gate_noise: Standard deviation.
        temperature: Of the gate at first.
        num_classes: K.
    """
    features = channels[-1]
    experts = Stack(stack.num_seeds, num_experts)
    head: FeatureHead | LogitHead
    if mixes_logits:
        head = LogitHead(Linear(experts, features, num_classes))
    else:
        analyst = nn.Sequential(
            HiddenLayer(stack, features, gate_width, dropout=gate_dropout),
            HiddenLayer(stack, gate_width, gate_width, dropout=0.0),
        )
        head = FeatureHead(analyst, Linear(stack, features + gate_width, num_classes))
    gate: SoftmaxGate | OpenGate = OpenGate()
    if num_experts > 1:
        dims = (features, gate_width, num_experts)
        gate = SoftmaxGate(stack, dims, dropout=gate_dropout, noise=gate_noise, temperature=temperature)
    return Mixture(
        image_shape=image_shape,
        extractor=Extractor(stack, image_shape[0], channels),
        pool=GlobalAveragePool(stack),
        experts=Experts(experts, features, map_size(image_shape), expert_dropout),
        gate=gate,
        head=head,
    )


def map_size(image_shape: ImageShape) -> int:
    """Height times width of what an `Extractor` makes of such an image."""
    _, height, width = image_shape
    return (height // POOLED) * (width // POOLED)
