"""From configuration to network: the only place where models meet their configuration.

Suffixes as in `collective`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, nn

from collective_pipeline.config import (
    Architecture,
    Arm,
    CollectiveConfig,
    MixtureArchitecture,
    MlpArchitecture,
    SubModelArchitecture,
)
from collective_pipeline.models.collective import Collective, MemberDropout, Members
from collective_pipeline.models.convolution import Conv2d
from collective_pipeline.models.layers import Linear, Stack
from collective_pipeline.models.mixture import build_mixture, build_sub_model
from collective_pipeline.models.mlp import Classifier, Mlp


def build_model(architecture: Architecture, *, in_dim: int, num_classes: int, num_seeds: int = 1) -> nn.Module:
    """The network that `architecture` describes, for `num_seeds` seeds at once: `(S, B, in_dim)` to `(S, B, K)`.

    Its weights are zero until `initialise` draws them.
    """
    match architecture:
        case CollectiveConfig():
            return _build_collective(architecture, in_dim=in_dim, num_classes=num_classes, num_seeds=num_seeds)
        case MlpArchitecture(hidden_dims=hidden_dims, dropout=rate, residual=residual):
            stack, dims = Stack(num_seeds), (in_dim, *hidden_dims, num_classes)
            return Classifier(Mlp(stack, dims, dropout=[rate] * len(hidden_dims), residual=residual))
        case SubModelArchitecture(image_shape=image_shape, channels=channels, dropout=rate):
            return build_sub_model(Stack(num_seeds), image_shape, channels, dropout=rate, num_classes=num_classes)
        case MixtureArchitecture():
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


def build_arm(arm: Arm, *, num_seeds: int = 1) -> nn.Module:
    """The network of an arm; see `build_model`."""
    return build_model(arm.architecture, in_dim=arm.in_dim, num_classes=arm.num_classes, num_seeds=num_seeds)


def count_products(arm: Arm) -> int:
    """How many matrix products and convolutions a forward pass has, members of one shape counted once."""
    with torch.device("meta"):
        return sum(isinstance(module, Linear | Conv2d) for module in build_arm(arm).modules())


def initialise(model: nn.Module, generators: Sequence[Generator]) -> None:
    """Draw all weights: He-normal for every arm alike, seed s from `generators[s]` (on the CPU) alone."""
    for module in model.modules():
        if isinstance(module, Linear | Conv2d):
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

    def encoder(in_dim: int, out_dim: int, dropout: float) -> Mlp:
        return Mlp(single, (in_dim, math.isqrt(in_dim * out_dim), out_dim), dropout=[dropout])

    def decide(in_dim: int) -> Mlp:
        dims = (in_dim, max(int(in_dim * config.collective_hidden_scale), 2 * num_classes), num_classes)
        return Mlp(single, dims, dropout=[config.head_dropout], normalise=False)

    head: nn.Module = decide(collective_dim)
    if config.head == "encoder_head":
        compressed = max(int(collective_dim * config.c_collective), 2 * num_classes)
        head = nn.Sequential(encoder(collective_dim, compressed, config.head_dropout), decide(compressed))

    experts = hidden(config.expert_hidden, config.num_experts, varied=config.vary_expert_architectures)
    analysts = hidden(config.analyst_hidden, config.num_analysts, varied=config.vary_analyst_architectures)
    drop = config.model_dropout
    return Collective(
        experts=members(in_dim, experts, config.expert_output),
        expert_encoder=encoder(all_experts, encoded_dim, config.encoder_dropout),
        analysts=members(analyst_in, analysts, config.analyst_output),
        analyst_encoder=encoder(all_analysts, collective_dim, config.encoder_dropout)
        if config.analyst_encoder
        else nn.Identity(),
        head=head,
        expert_dropout=MemberDropout(Stack(num_seeds, config.num_experts), drop.expert_rate, drop.form),
        analyst_dropout=MemberDropout(Stack(num_seeds, config.num_analysts), drop.analyst_rate, drop.form),
    )
