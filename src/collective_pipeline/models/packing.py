"""Closed gates skipped: only the channels that some image of a group opens are computed, in dense kernels.

A convolution with a share p of its channels open that reads a share q of them costs p q of itself, and the copy of
that part of its weights. Norms are folded into the weights. Suffixes as in `convolution`; S = 1.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from collective_pipeline.config import UserError
from collective_pipeline.models.convolution import BatchNorm2d
from collective_pipeline.models.gating import GatedUnit
from collective_pipeline.models.image_classifier import ImageClassifier
from collective_pipeline.models.layers import BN_EPSILON
from collective_pipeline.models.resnet import ResidualBlock, ResNet
from collective_pipeline.models.vgg import VggStage


class PackedClassifier(nn.Module):
    """The same answers as a trained network with gates, without the channels that are closed.

    Args:
        model: Of one seed, in evaluation mode, with its gates after the norms.
        group_size: How many images are computed at once. Images for which the embedding guesses the same class stand
            together, since they open much the same gates; of a channel that one of a group opens, all are computed.

    Raises:
        UserError: If the network is none of that.
    """

    def __init__(self, model: ImageClassifier, *, group_size: int = 32) -> None:
        super().__init__()
        if not can_be_packed(model):
            raise UserError(
                "only closed gates after a norm can be skipped, and this network has none: choose an arm with gates "
                "and gates.position=post_norm"
            )
        units = _units_of(model)
        if model.training or len(units[0].conv.weight) != 1:
            raise UserError("closed gates are skipped in a network of one seed in evaluation mode: build it so")
        self.model = model
        self.group_size = group_size
        self.places = {unit: i for i, unit in enumerate(units)}
        for i, unit in enumerate(units):  # as buffers they go where the network goes
            weight_OIKK, bias_O = _fold(unit)
            self.register_buffer(f"weight_{i}", weight_OIKK, persistent=False)
            self.register_buffer(f"bias_{i}", bias_O, persistent=False)

    def forward(self, x_1BI: Tensor) -> Tensor:
        """Images `(1, B, I)` to logits `(1, B, K)`."""
        assert self.model.gating is not None
        x_BMHW = self.model.to_maps(x_1BI)
        gates_11BG, guesses_11BK = self.model.gating(x_BMHW)
        order = guesses_11BK[0, 0].argmax(dim=1).argsort()
        logits = [self._group(x_BMHW[rows], gates_11BG[0, 0, rows]) for rows in order.split(self.group_size)]
        return torch.cat(logits)[order.argsort()].unsqueeze(0)

    def _group(self, x_BMHW: Tensor, gates_BG: Tensor) -> Tensor:
        gates = gates_BG.split(self.model.gated_channels, dim=1)
        network, maps = self.model.network, Maps(x_BMHW)
        if isinstance(network, ResNet):
            maps = Maps(network.pool(self._unit(network.stem, maps, gates).activated().values))
            for block in network.blocks:
                assert isinstance(block, ResidualBlock)
                maps = self._block(block, maps, gates)
            logits_11BK: Tensor = network.head(network.mean(maps.values))
            return logits_11BK[0, 0]
        for stage in network.stages:
            assert isinstance(stage, VggStage)
            maps = self._units(stage.units, maps, gates)
            maps = maps.pooled()
        return network.read(maps.whole(network.num_channels))[0, 0]

    def _block(self, block: ResidualBlock, maps: "Maps", gates: Sequence[Tensor]) -> "Maps":
        skipped = maps if block.shortcut_blur is None else maps.blurred(block.shortcut_blur)
        if block.shortcut is not None:
            skipped = self._unit(block.shortcut, skipped, gates)
        *units, last = block.units
        maps = self._units(units, maps, gates)
        if block.blur is not None:
            maps = maps.blurred(block.blur)
        added = self._unit(last, maps, gates)
        if added.channels is None:
            return Maps(relu(added.values + skipped.values))
        return Maps(relu(skipped.values.index_add(1, added.channels, added.values)))

    def _units(self, units: Iterable[nn.Module], maps: "Maps", gates: Sequence[Tensor]) -> "Maps":
        for unit in units:
            maps = self._unit(unit, maps, gates).activated()
        return maps

    def _unit(self, unit: nn.Module, maps: "Maps", gates: Sequence[Tensor]) -> "Maps":
        assert isinstance(unit, GatedUnit)
        place = self.places[unit]
        weight_OIKK, bias_O = self.get_buffer(f"weight_{place}"), self.get_buffer(f"bias_{place}")
        if maps.channels is not None:
            weight_OIKK = weight_OIKK.index_select(1, maps.channels)
        if unit.gate is None:
            return Maps(_convolve(unit, maps.values, weight_OIKK, bias_O))
        gates_BO = gates[unit.gate]
        channels = (gates_BO > 0).any(dim=0).nonzero().squeeze(1)
        if len(channels) == len(bias_O):  # nothing to copy
            return Maps(_convolve(unit, maps.values, weight_OIKK, bias_O) * gates_BO[:, :, None, None])
        y_BOHW = _convolve(unit, maps.values, weight_OIKK.index_select(0, channels), bias_O[channels])
        return Maps(y_BOHW * gates_BO[:, channels, None, None], channels)


class Maps(NamedTuple):
    """Maps of some channels alone, `(B, C, H, W)`, and which they are; None: all. Those that are absent are zero."""

    values: Tensor
    channels: Tensor | None = None

    def activated(self) -> "Maps":
        """After relu."""
        return Maps(relu(self.values), self.channels)

    def pooled(self) -> "Maps":
        """The largest of every 2x2 pixels."""
        batch, channels, height, width = self.values.shape
        if not channels:  # the kernel refuses it
            return Maps(self.values.new_zeros(batch, 0, height // 2, width // 2), self.channels)
        return Maps(max_pool2d(self.values, 2), self.channels)

    def blurred(self, blur: nn.Module) -> "Maps":
        """Half the pixels: a closed channel is zero before and after."""
        batch, channels, height, width = self.values.shape
        if not channels:
            return Maps(self.values.new_zeros(batch, 0, -(-height // 2), -(-width // 2)), self.channels)
        return Maps(blur(self.values), self.channels)

    def whole(self, num_channels: int) -> Tensor:
        """All of so many channels."""
        if self.channels is None:
            return self.values
        batch, _, height, width = self.values.shape
        zeros = self.values.new_zeros(batch, num_channels, height, width)
        return zeros.index_copy(1, self.channels, self.values)


def can_be_packed(model: ImageClassifier) -> bool:
    """Whether the network has gates, and all of them after norms."""
    return model.gating is not None and not any(unit.gate is not None and unit.gate_first for unit in _units_of(model))


def _units_of(model: ImageClassifier) -> list[GatedUnit]:
    return [module for module in model.network.modules() if isinstance(module, GatedUnit)]


def _convolve(unit: GatedUnit, x_BIHW: Tensor, weight_OIKK: Tensor, bias_O: Tensor) -> Tensor:
    if 0 not in weight_OIKK.shape:
        return F.conv2d(x_BIHW, weight_OIKK, bias_O, stride=unit.conv.stride, padding=unit.conv.padding)
    # Nothing is made, or of nothing: kernels refuse what has no channels.
    height, width = (
        (side + 2 * unit.conv.padding - weight_OIKK.shape[-1]) // unit.conv.stride + 1 for side in x_BIHW.shape[2:]
    )
    return bias_O[:, None, None].expand(len(x_BIHW), -1, height, width)


def _fold(unit: GatedUnit) -> tuple[Tensor, Tensor]:
    """One convolution that does what this unit's and its norm do, without its gate: weights and biases."""
    conv, norm = unit.conv, unit.norm
    weight_OIKK = conv.weight[0, 0].detach()
    bias_O = torch.zeros_like(weight_OIKK[:, 0, 0, 0]) if conv.bias is None else conv.bias[0, 0].detach()
    if norm is None:
        return weight_OIKK, bias_O
    assert isinstance(norm, BatchNorm2d)
    scale_O = (norm.weight * (norm.running_var + BN_EPSILON).rsqrt())[0, 0].detach()
    shift_O = norm.bias[0, 0].detach() - norm.running_mean[0, 0] * scale_O
    return weight_OIKK * scale_O[:, None, None, None], bias_O * scale_O + shift_O
