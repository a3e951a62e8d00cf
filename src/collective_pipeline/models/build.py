"""From configuration to network: the only place where models meet their configuration.

Suffixes as in `collective`.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Generator, nn

from collective_pipeline.config import (
    Architecture,
    Arm,
    CollectiveConfig,
    GateConfig,
    ImageArchitecture,
    ImageCollectiveArchitecture,
    MixtureArchitecture,
    MlpArchitecture,
    ResNetArchitecture,
    SubModelArchitecture,
    UserError,
    VggArchitecture,
)
from collective_pipeline.models.collective import Collective, MemberDropout, Members
from collective_pipeline.models.convolution import BatchNorm2d, Blur, Conv2d, GlobalAveragePool
from collective_pipeline.models.gating import GatedUnit, GateHeads, Gating, ShallowEmbedding
from collective_pipeline.models.image_classifier import ImageClassifier
from collective_pipeline.models.image_collective import ImageCollective
from collective_pipeline.models.layers import Linear, Stack
from collective_pipeline.models.mixture import POOLED, Experts, Extractor, build_mixture, build_sub_model, map_size
from collective_pipeline.models.mlp import Classifier, Mlp
from collective_pipeline.models.resnet import PointwiseHead, ResidualBlock, ResNet, StochasticDepth
from collective_pipeline.models.vgg import Vgg, VggStage

DRAWN = (Linear, Conv2d, PointwiseHead, GateHeads)  # what has weights to draw, and is a product


def build_model(architecture: Architecture, *, in_dim: int, num_classes: int, num_seeds: int = 1) -> nn.Module:
    """The network that `architecture` describes, for `num_seeds` seeds at once: `(S, B, in_dim)` to `(S, B, K)`.

    Its weights are zero until `initialise` draws them.

    Raises:
        UserError: If the images are too small for it.
    """
    match architecture:
        case CollectiveConfig():
            return _build_collective(architecture, in_dim=in_dim, num_classes=num_classes, num_seeds=num_seeds)
        case MlpArchitecture(hidden_dims=hidden_dims, dropout=rate, residual=residual):
            stack, dims = Stack(num_seeds), (in_dim, *hidden_dims, num_classes)
            return Classifier(Mlp(stack, dims, dropout=[rate] * len(hidden_dims), residual=residual))
        case SubModelArchitecture(image_shape=image_shape, channels=channels, dropout=rate):
            _check_size(image_shape, POOLED, "use larger images")
            return build_sub_model(Stack(num_seeds), image_shape, channels, dropout=rate, num_classes=num_classes)
        case MixtureArchitecture():
            _check_size(architecture.image_shape, POOLED, "use larger images")
            return build_mixture(
                Stack(num_seeds),
                architecture.image_shape,
                architecture.channels,
                num_experts=architecture.n_experts,
                mixes_logits=architecture.combine == "logits",
                gate_width=architecture.gate_width,
                expert_dropout=architecture.expert_dropout,
                gate_dropout=architecture.gate_dropout,
                gate_noise=architecture.gate_noise,
                temperature=architecture.initial_temperature,
                num_classes=num_classes,
            )
        case ImageCollectiveArchitecture():
            _check_size(architecture.image_shape, POOLED, "use larger images")
            return _build_image_collective(architecture, num_classes=num_classes, num_seeds=num_seeds)
        case _:
            return _build_image_classifier(architecture, num_classes=num_classes, num_seeds=num_seeds)


def build_arm(arm: Arm, *, num_seeds: int = 1) -> nn.Module:
    """The network of an arm; see `build_model`."""
    return build_model(arm.architecture, in_dim=arm.in_dim, num_classes=arm.num_classes, num_seeds=num_seeds)


def count_model_params(architecture: Architecture, *, in_dim: int, num_classes: int) -> int:
    """Trainable parameters of one seed's network."""
    # On the meta device a network is shapes only: nothing is allocated or drawn.
    with torch.device("meta"):
        model = build_model(architecture, in_dim=in_dim, num_classes=num_classes)
    return sum(parameter.numel() for parameter in model.parameters())


def count_products(arm: Arm) -> int:
    """How many matrix products and convolutions a forward pass has, members of one shape counted once."""
    with torch.device("meta"):
        return sum(isinstance(module, DRAWN) for module in build_arm(arm).modules())


def initialise(model: nn.Module, generators: Sequence[Generator]) -> None:
    """Draw all weights: He-normal for every arm alike, seed s from `generators[s]` (on the CPU) alone."""
    for module in model.modules():
        if isinstance(module, DRAWN):
            module.initialise(generators)


def vary(dims: Sequence[int], position: int) -> tuple[int, ...]:
    """Hidden widths of the member at `position`: as they are, a quarter wider, deeper, a fifth narrower, and again."""
    match position % 4:
        case 1:
            return tuple(int(dim * 1.25) for dim in dims)
        case 2:
            return (dims[0], (dims[0] + dims[-1]) // 2, dims[-1])
        case 3:
            return tuple(max(1, int(dim * 0.8)) for dim in dims)
        case _:
            return tuple(dims)


def _build_collective(config: CollectiveConfig, *, in_dim: int, num_classes: int, num_seeds: int) -> Collective:
    single = Stack(num_seeds)
    encoded_dim, collective_dim = config.encoded_dim, config.head_input_dim
    all_experts = config.num_experts * config.expert_output
    all_analysts = config.num_analysts * config.analyst_output
    analyst_in = in_dim + encoded_dim

    def hidden(base: Sequence[int], count: int, *, varied: bool) -> list[tuple[int, ...]]:
        return [vary(base, n) if varied else tuple(base) for n in range(count)]

    def members(in_dim: int, hidden_dims: list[tuple[int, ...]], out_dim: int) -> Members:
        dims = [(in_dim, *dims, out_dim) for dims in hidden_dims]
        return Members(num_seeds, dims, dropout=config.member_dropout)

    def decide(in_dim: int) -> Mlp:
        scale = config.collective_hidden_scale
        return _decider(single, in_dim, num_classes, hidden_scale=scale, dropout=config.head_dropout)

    head: nn.Module = decide(collective_dim)
    if config.head == "encoder_head":
        compressed = max(int(collective_dim * config.c_collective), 2 * num_classes)
        head = nn.Sequential(_encoder(single, collective_dim, compressed, config.head_dropout), decide(compressed))

    experts = hidden(config.expert_hidden, config.num_experts, varied=config.vary_expert_architectures)
    analysts = hidden(config.analyst_hidden, config.num_analysts, varied=config.vary_analyst_architectures)
    drop = config.model_dropout
    return Collective(
        experts=members(in_dim, experts, config.expert_output),
        expert_encoder=_encoder(single, all_experts, encoded_dim, config.encoder_dropout),
        analysts=members(analyst_in, analysts, config.analyst_output),
        analyst_encoder=_encoder(single, all_analysts, collective_dim, config.encoder_dropout)
        if config.analyst_encoder
        else nn.Identity(),
        head=head,
        expert_dropout=MemberDropout(Stack(num_seeds, config.num_experts), drop.expert_rate, drop.form),
        analyst_dropout=MemberDropout(Stack(num_seeds, config.num_analysts), drop.analyst_rate, drop.form),
    )


def _build_image_collective(
    config: ImageCollectiveArchitecture, *, num_classes: int, num_seeds: int
) -> ImageCollective:
    single, features, encoded_dim = Stack(num_seeds), config.channels[-1], config.encoded_dim
    experts = Stack(num_seeds, config.n_experts)
    analyst_dims = (features + encoded_dim, *config.analyst_hidden, config.analyst_output)
    return ImageCollective(
        image_shape=config.image_shape,
        stem=Extractor(single, config.image_shape[0], config.channels),
        pool=GlobalAveragePool(single),
        experts=Experts(experts, features, map_size(config.image_shape), config.member_dropout),
        expert_encoder=_encoder(single, config.n_experts * features, encoded_dim, config.encoder_dropout),
        analysts=Members(num_seeds, [analyst_dims] * config.n_analysts, dropout=config.member_dropout),
        head=_decider(single, config.n_analysts * config.analyst_output, num_classes, dropout=config.head_dropout),
    )


def _encoder(stack: Stack, in_dim: int, out_dim: int, dropout: float) -> Mlp:
    return Mlp(stack, (in_dim, math.isqrt(in_dim * out_dim), out_dim), dropout=[dropout])


def _decider(stack: Stack, in_dim: int, num_classes: int, *, dropout: float, hidden_scale: float = 1.0) -> Mlp:
    dims = (in_dim, max(int(in_dim * hidden_scale), 2 * num_classes), num_classes)
    return Mlp(stack, dims, dropout=[dropout], normalise=False)


class _GatedUnits:
    """Makes the units of one network, numbering those that are gated."""

    def __init__(self, stack: Stack, gates: GateConfig | None, *, normalise: bool, bias: bool) -> None:
        self.stack = stack
        self.gates = gates
        self.normalise = normalise
        self.bias = bias
        self.numbers = itertools.count()

    @property
    def gates_have_bias(self) -> bool:
        """The bias that a norm behind the convolution would cancel belongs to the gate behind the norm instead."""
        return self.normalise and self.gates is not None and self.gates.position == "post_norm"

    def make(
        self, i: int, o: int, kernel_size: int, *, stride: int = 1, gated: bool = False, scale: float = 1.0
    ) -> GatedUnit:
        """From `i` to `o` channels, which the norm, if there is one, first scales by `scale`.

        A gated convolution has a bias wherever it has an effect, as in the original.
        """
        bias = not self.gates_have_bias if gated else self.bias
        return GatedUnit(
            Conv2d(self.stack, i, o, kernel_size, stride=stride, bias=bias),
            BatchNorm2d(self.stack, o, scale=scale) if self.normalise else None,
            gate=next(self.numbers) if gated else None,
            gate_first=self.gates is not None and self.gates.position == "pre_norm",
        )


def _check_size(image_shape: tuple[int, int, int], smallest_side: int, advice: str) -> None:
    _, height, width = image_shape
    if min(height, width) < smallest_side:
        raise UserError(
            f"images of {height}x{width} pixels are too small for this network, which halves them until nothing is "
            f"left below {smallest_side}x{smallest_side}: {advice}"
        )


def _build_image_classifier(architecture: ImageArchitecture, *, num_classes: int, num_seeds: int) -> ImageClassifier:
    channels = architecture.image_shape[0]
    _check_size(
        architecture.image_shape, architecture.smallest_side, "use larger images, or a network with fewer stages"
    )
    stack, gates = Stack(num_seeds), architecture.gates
    network: ResNet | Vgg
    match architecture:
        case ResNetArchitecture():
            make = _GatedUnits(stack, gates, normalise=True, bias=False)
            network = _build_resnet(architecture, make, num_classes)
        case VggArchitecture():
            make = _GatedUnits(stack, gates, normalise=architecture.normalise, bias=True)
            network = _build_vgg(architecture, make, num_classes)
    gating = None
    if gates is not None:
        num_gates, dim = sum(architecture.gated_channels), gates.embedding_dim
        gating = Gating(
            ShallowEmbedding(stack, channels, dim, num_layers=4 if gates.embedding == "cifar" else 5),
            GateHeads(stack, dim, num_gates, offset=gates.offset, bias=make.gates_have_bias),
            Linear(stack, dim, num_classes),
        )
    return ImageClassifier(
        network, gating, image_shape=architecture.image_shape, gated_channels=architecture.gated_channels
    )


def _build_resnet(architecture: ResNetArchitecture, make: _GatedUnits, num_classes: int) -> ResNet:
    blocks: list[ResidualBlock] = []
    read = architecture.width
    for stage, num_blocks in enumerate(architecture.blocks):
        for block in range(num_blocks):
            halve = block == 0 and stage > 0
            rate = architecture.drop_rates[len(blocks)]
            blocks.append(_build_block(architecture, make, stage, read, halve=halve, drop_rate=rate))
            read = architecture.block_channels(stage)[-1]
    stem, pool = _build_stem(architecture, make)
    head = (Linear if architecture.head == "linear" else PointwiseHead)(make.stack, read, num_classes)
    return ResNet(stem, pool, blocks, GlobalAveragePool(make.stack), head)


def _build_stem(architecture: ResNetArchitecture, make: _GatedUnits) -> tuple[GatedUnit, nn.Module]:
    channels, width = architecture.image_shape[0], architecture.width
    if architecture.stem == "cifar":
        return make.make(channels, width, 3), nn.Identity()
    if architecture.blur:
        return make.make(channels, width, 7), nn.Sequential(Blur(), nn.MaxPool2d(3, stride=1), Blur())
    return make.make(channels, width, 7, stride=2), nn.MaxPool2d(3, 2, padding=1)


def _build_block(
    architecture: ResNetArchitecture, make: _GatedUnits, stage: int, read: int, *, halve: bool, drop_rate: float
) -> ResidualBlock:
    """One that reads so many channels; the 3x3 convolution before the last one halves the maps, or a blur behind it."""
    made = architecture.block_channels(stage)
    blur = halve and architecture.blur
    stride = 2 if halve and not blur else 1
    strided = len(made) - 2
    units = [
        make.make(
            i,
            o,
            1 if architecture.bottleneck and position != strided else 3,
            stride=stride if position == strided else 1,
            gated=position in architecture.gated,
            scale=0.0 if architecture.zero_init_residual and position == len(made) - 1 else 1.0,
        )
        for position, (i, o) in enumerate(itertools.pairwise((read, *made)))
    ]
    same = not halve and read == made[-1]
    return ResidualBlock(
        units,
        None if same else make.make(read, made[-1], 1, stride=stride),
        drop=StochasticDepth(make.stack, drop_rate),
        blur=Blur() if blur else None,
        shortcut_blur=Blur() if blur else None,
    )


def _build_vgg(architecture: VggArchitecture, make: _GatedUnits, num_classes: int) -> Vgg:
    widths = iter(itertools.pairwise([architecture.image_shape[0], *itertools.chain(*architecture.channels)]))
    gated = architecture.gates is not None
    stages = [
        VggStage([make.make(i, o, 3, gated=gated) for i, o in itertools.islice(widths, len(stage))])
        for stage in architecture.channels
    ]
    features = architecture.channels[-1][-1] * architecture.pooled_side**2
    dims = (features, architecture.hidden, architecture.hidden, num_classes)
    head = Mlp(make.stack, dims, dropout=[architecture.dropout] * 2, normalise=False)
    return Vgg(make.stack, stages, head, pooled_side=architecture.pooled_side)
