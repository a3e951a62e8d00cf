"""What an answer costs in multiply-accumulates, as torch counts them, and what closed gates leave of them.

Suffixes: L gated layers, G gates of all of them side by side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from collective_pipeline.config import Arm
from collective_pipeline.data.batches import ImageSource, Normalise
from collective_pipeline.models.build import DRAWN, build_arm
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.convolution import Blur, Conv2d
from collective_pipeline.models.gating import GatedUnit
from collective_pipeline.models.image_classifier import ImageClassifier

BATCH_SIZE = 512


def count_macs(arm: Arm) -> int:
    """Multiply-accumulates of one image, forward; torch counts two operations for each."""
    with torch.device("meta"):
        model = build_arm(arm).eval()
        images = torch.empty(1, 1, arm.in_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return int(counter.get_total_flops()) // 2


class LayerMacs(NamedTuple):
    """Multiply-accumulates of one layer for one image, all gates open.

    Attributes:
        made_by: The gated layer whose gates close what it makes; none if all of it is needed.
        read_from: The one whose gates close what it reads.
    """

    macs: int
    made_by: int | None
    read_from: int | None


def count_layers(arm: Arm) -> list[LayerMacs]:
    """Every convolution, blur and linear layer of an arm, those of its gates included; their sum is `count_macs`.

    A layer with closed gates need not make the closed channels, wherever the gates are. What reads nothing but those
    channels need not read them if they are zeros: in a block of a ResNet the next convolution, in a VGG the next one
    or the head's first layer, but only with gates after the norm. The output of a ResNet's block is read whole, since
    the skip fills in what the gates close.
    """
    with torch.device("meta"):
        model = build_arm(arm).eval()
        images = torch.empty(1, 1, arm.in_dim)
    made_by, read_from = _gates_of(model)
    layers = []

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        # Every weight is used once, those of a convolution once for every pixel that it makes.
        pixels = output.shape[2:].numel() if isinstance(module, Conv2d | Blur) else 1
        if isinstance(module, Blur):
            weights = module.kernel_KK.numel() * output.shape[1]
        else:
            weights = module.get_parameter("weight").numel()
        layers.append(LayerMacs(weights * pixels, made_by.get(module), read_from.get(module)))

    for module in model.modules():
        if isinstance(module, (*DRAWN, Blur)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(images)
    return layers


def _gates_of(model: nn.Module) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """The gated layers that close what a layer makes, and what it reads."""
    made_by: dict[nn.Module, int] = {}
    read_from: dict[nn.Module, int] = {}
    if not isinstance(model, ImageClassifier):
        return made_by, read_from
    for chain in model.network.chains():
        before: GatedUnit | None = None
        for layer in chain:
            if isinstance(layer, Blur):  # channel by channel: it hands on what it reads
                if before is not None and before.gate is not None:
                    made_by[layer] = before.gate
                continue
            unit = layer if isinstance(layer, GatedUnit) else None
            if unit is not None and unit.gate is not None:
                made_by[unit.conv] = unit.gate
            if before is not None and before.gate is not None and not before.gate_first:
                read_from[layer if unit is None else unit.conv] = before.gate
            before = unit
    return made_by, read_from


def open_shares(gates_G: Tensor, channels: Sequence[int]) -> Tensor:
    """Which part of every layer's gates is open, `(..., L)`, from gates `(..., G)` and an arm's `gated_channels`."""
    layers = (gates_G > 0).float().split(list(channels), dim=-1)
    return torch.stack([layer.mean(dim=-1) for layer in layers], dim=-1)


def executed_macs(layers: Sequence[LayerMacs], open_L: Tensor) -> Tensor:
    """What is left of the multiply-accumulates of `count_layers` where these shares `(..., L)` of gates are open.

    A layer with an open share p that reads an open share q of its input is left with p q. That is exact for one image;
    for many, take the mean of the results, not of the shares: a product of means is not the mean of products.
    """
    whole = open_L.new_ones(open_L.shape[:-1])
    total = torch.zeros_like(whole)
    for macs, made_by, read_from in layers:
        made = whole if made_by is None else open_L[..., made_by]
        read = whole if read_from is None else open_L[..., read_from]
        total += macs * made * read
    return total


def measure_executed_macs(checkpoint: Checkpoint, images: ImageSource, device: torch.device) -> list[float]:
    """The mean over images of what each seed's closed gates leave of the multiply-accumulates; without gates, all.

    Args:
        checkpoint: What was trained.
        images: Uint8.
        device: Where to compute.
    """
    layers = count_layers(checkpoint.arm)
    model = checkpoint.build().to(device)
    if not isinstance(model, ImageClassifier) or model.gating is None:
        return [float(sum(layer.macs for layer in layers))] * len(checkpoint.seeds)
    normalise = Normalise(checkpoint.images, device)
    total_S = torch.zeros(len(checkpoint.seeds), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for chunk, _ in images.chunks(BATCH_SIZE):
            x_BMHW = model.to_maps(normalise(chunk.to(device)).unsqueeze(0))
            gates_SBG = model.gating(x_BMHW)[0].squeeze(1)
            open_SBL = open_shares(gates_SBG, model.gated_channels).double()
            total_S += executed_macs(layers, open_SBL).sum(dim=1)
    means: list[float] = (total_S / len(images)).tolist()
    return means
