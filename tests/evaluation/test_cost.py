"""What an answer costs."""

import pytest
import torch

from collective_pipeline.config import (
    Arm,
    BaselineConfig,
    CollectiveConfig,
    GateConfig,
    ImageCollectiveArchitecture,
    MlpArchitecture,
    ResNetArchitecture,
    VggArchitecture,
)
from collective_pipeline.evaluation.cost import (
    LayerMacs,
    count_layers,
    count_macs,
    executed_macs,
    open_shares,
)
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.convolution import Blur
from collective_pipeline.models.gating import GatedUnit
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.models.matching import match_arm
from collective_pipeline.randomness import make_generator

ARM = Arm(
    model_type="shallow",
    in_dim=784,
    num_classes=10,
    params=1,
    target_params=1,
    architecture=MlpArchitecture(hidden_dims=(512, 512)),
)


def test_macs_are_those_of_the_matrices():
    """Every weight is used once for an image."""
    assert count_macs(ARM) == 784 * 512 + 512 * 512 + 512 * 10


SHAPE = (3, 16, 16)
RESNET = {"image_shape": SHAPE, "blocks": (1, 1), "width": 4}
VGG = {"image_shape": SHAPE, "channels": ((4,), (6, 6)), "hidden": 8}
GATES, LEGACY = GateConfig(embedding_dim=8), GateConfig(embedding_dim=8, position="pre_norm")


def image_arm(architecture):
    name = "vgg11_moe" if isinstance(architecture, VggArchitecture) else "resnet18_moe"
    return make_image_arm(name, architecture, num_classes=5)


BASIC = image_arm(ResNetArchitecture(**RESNET, gated=(0, 1), gates=GATES))
ARMS = {
    "basic": BASIC,
    "bottleneck_a": image_arm(ResNetArchitecture(**RESNET, bottleneck=True, gated=(0, 1), gates=GATES)),
    "bottleneck_b": image_arm(ResNetArchitecture(**RESNET, bottleneck=True, gated=(1,), gates=GATES)),
    "blurred": image_arm(ResNetArchitecture(**RESNET, gated=(0, 1), gates=GATES, blur=True)),
    "bottleneck_blurred": image_arm(
        ResNetArchitecture(**RESNET, stem="imagenet", bottleneck=True, gated=(1,), gates=GATES, blur=True, head="conv")
    ),
    "blurred_legacy": image_arm(ResNetArchitecture(**RESNET, gated=(0, 1), gates=LEGACY, blur=True)),
    "basic_legacy": image_arm(ResNetArchitecture(**RESNET, gated=(0, 1), gates=LEGACY)),
    "vgg": image_arm(VggArchitecture(**VGG, gates=GATES)),
    "dense": image_arm(ResNetArchitecture(**RESNET)),
    "mlp": ARM,
    "image_collective": make_image_arm(
        "conv_collective", ImageCollectiveArchitecture(image_shape=SHAPE, channels=(3, 4, 5, 6)), num_classes=5
    ),
    "collective": match_arm("collective", CollectiveConfig(), BaselineConfig(), in_dim=784, num_classes=10),
}


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_layer_by_layer_the_cost_is_the_same(arm):
    """With all gates open, all of it is executed."""
    layers = count_layers(arm)

    assert sum(layer.macs for layer in layers) == count_macs(arm)
    assert executed_macs(layers, torch.ones(100)).item() == pytest.approx(count_macs(arm))


def convolution(i, o, side, kernel_size=3):
    return i * o * kernel_size**2 * side**2


def test_what_closed_gates_save_is_in_the_right_layers():
    """The outputs of a gated layer, and where nothing else passes, the inputs of what reads them."""

    def gated(name):
        return [layer for layer in count_layers(ARMS[name]) if (layer.made_by, layer.read_from) != (None, None)]

    def basic(read_from):
        return [
            LayerMacs(convolution(4, 4, 16), 0, None),
            LayerMacs(convolution(4, 4, 16), 1, 0 if read_from else None),
            LayerMacs(convolution(4, 8, 8), 2, None),
            LayerMacs(convolution(8, 8, 8), 3, 2 if read_from else None),
        ]

    assert gated("basic") == basic(read_from=True)
    assert gated("basic_legacy") == basic(read_from=False)
    blur = LayerMacs(16 * 8 * 8 * 8, 2, None)
    assert gated("blurred") == [
        *basic(read_from=True)[:2],
        LayerMacs(convolution(4, 8, 16), 2, None),
        blur,
        LayerMacs(convolution(8, 8, 8), 3, 2),
    ]
    assert [layer[1:] for layer in gated("blurred_legacy")] == [(0, None), (1, None), (2, None), (2, None), (3, None)]
    assert [layer[1:] for layer in gated("bottleneck_blurred")] == [
        (0, None),
        (None, 0),
        (1, None),
        (1, None),
        (None, 1),
    ]
    assert gated("bottleneck_a") == [
        LayerMacs(convolution(4, 4, 16, 1), 0, None),
        LayerMacs(convolution(4, 4, 16), 1, 0),
        LayerMacs(convolution(4, 16, 16, 1), None, 1),
        LayerMacs(convolution(16, 8, 16, 1), 2, None),
        LayerMacs(convolution(8, 8, 8), 3, 2),
        LayerMacs(convolution(8, 32, 8, 1), None, 3),
    ]
    assert [layer[1:] for layer in gated("bottleneck_b")] == [(0, None), (None, 0), (1, None), (None, 1)]
    assert [layer[1:] for layer in gated("vgg")] == [(0, None), (1, 0), (2, 1), (None, 2)]
    assert gated("dense") == gated("mlp") == gated("collective") == gated("image_collective") == []


def test_executed_macs_are_those_of_the_open_channels():
    """For every image on its own: their mean is not what the mean of the shares would give."""
    layers = count_layers(BASIC)
    gates = torch.ones(2, sum(BASIC.architecture.gated_channels))
    gates[0, :6] = 0  # the first layer is shut, half of the second as well
    shares = open_shares(gates, BASIC.architecture.gated_channels)
    executed = executed_macs(layers, shares)

    assert shares.tolist() == [[0.0, 0.5, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    whole = count_macs(BASIC)
    assert executed.tolist() == [whole - 2 * convolution(4, 4, 16), whole]
    assert executed_macs(layers, shares.mean(dim=0)) < executed.mean()


@pytest.mark.parametrize("name", ["basic", "blurred", "vgg"])
def test_skipping_what_is_not_executed_changes_nothing(name):
    """With the weights of closed outputs and of unread inputs overwritten, the logits are the same."""
    model = build_arm(ARMS[name])
    initialise(model, [make_generator(0, "weights")])
    model.eval()
    closed = torch.rand(sum(model.gated_channels), generator=torch.Generator().manual_seed(0)) < 0.5
    model.gating.heads.register_forward_hook(lambda heads, inputs, gates: gates * ~closed)
    x = torch.randn(1, 3, 3 * 16 * 16, generator=torch.Generator().manual_seed(1))
    logits = model(x)[0]
    layers = closed.split(model.gated_channels)
    for chain in model.network.chains():
        with_weights = [layer for layer in chain if not isinstance(layer, Blur)]
        for unit, reader in zip(with_weights, [*with_weights[1:], None], strict=True):
            if not isinstance(unit, GatedUnit):
                continue
            shut = layers[unit.gate]
            unit.conv.weight.data[0, 0, shut] = 7.0
            if isinstance(reader, GatedUnit):
                reader.conv.weight.data[0, 0, :, shut] = 7.0
            elif reader is not None:
                reader.weight.data[0, 0, shut.repeat_interleave(len(reader.weight[0, 0]) // len(shut))] = 7.0

    torch.testing.assert_close(model(x)[0], logits)
