"""Gated networks: what is closed is nothing, what is open learns, and every seed is on its own."""

import pytest
import torch

from collective_pipeline.config import GateConfig, ResNetArchitecture, VggArchitecture
from collective_pipeline.models.build import build_model, initialise
from collective_pipeline.models.gating import GatedUnit
from collective_pipeline.randomness import make_generator

SHAPE, CLASSES, BATCH, SEEDS = (3, 16, 16), 4, 6, 2
GATES = GateConfig(embedding_dim=8)
LEGACY = GateConfig(embedding_dim=8, embedding="imagenet", position="pre_norm", offset=0.0)
RESNET = {"image_shape": SHAPE, "blocks": (1, 2), "width": 4}
VGG = {"image_shape": SHAPE, "channels": ((4,), (6, 6)), "hidden": 8, "dropout": 0.0}
ARCHITECTURES = {
    "basic": ResNetArchitecture(**RESNET),
    "bottleneck": ResNetArchitecture(**RESNET, bottleneck=True),
    "basic_gated": ResNetArchitecture(**RESNET, gated=(0, 1), gates=GATES),
    "basic_legacy": ResNetArchitecture(**RESNET, gated=(0, 1), gates=LEGACY),
    "bottleneck_a": ResNetArchitecture(**RESNET, bottleneck=True, gated=(0, 1), gates=GATES),
    "bottleneck_b": ResNetArchitecture(**RESNET, bottleneck=True, gated=(1,), gates=GATES),
    "imagenet_stem": ResNetArchitecture(**RESNET, stem="imagenet", gated=(0, 1), gates=GATES),
    "blurred": ResNetArchitecture(**RESNET, gated=(0, 1), gates=GATES, blur=True),
    "bottleneck_blurred": ResNetArchitecture(
        **RESNET, stem="imagenet", bottleneck=True, gated=(0, 1), gates=GATES, blur=True, head="conv"
    ),
    "blurred_legacy": ResNetArchitecture(**RESNET, gated=(0, 1), gates=LEGACY, blur=True),
    "vgg": VggArchitecture(**VGG),
    "vgg_gated": VggArchitecture(**VGG, gates=GATES),
    "vgg_bn_gated": VggArchitecture(**VGG, normalise=True, gates=GATES),
    "vgg_bn_legacy": VggArchitecture(**VGG, normalise=True, pooled_side=2, gates=LEGACY),
}
GATED = {name: architecture for name, architecture in ARCHITECTURES.items() if architecture.gates is not None}


def network(architecture, seeds=(0,)):
    """In double precision, every seed's weights its own."""
    model = build_model(architecture, in_dim=3 * 16 * 16, num_classes=CLASSES, num_seeds=len(seeds))
    initialise(model, [make_generator(seed, "weights") for seed in seeds])
    return model.double()


def images(num_seeds=1):
    return torch.randn(num_seeds, BATCH, 3 * 16 * 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_gradients_reach_every_parameter(architecture):
    """Of the network, the gates and the embedding's classifier, from logits and parts together."""
    model = network(architecture, (0, 1))
    logits, parts = model(images(2))
    sum((value**2 * torch.randn_like(value)).sum() for value in (logits, *parts.values())).backward()

    for name, parameter in model.named_parameters():
        reached = parameter.grad.flatten(1).norm(dim=1)
        assert (reached > 1e-9 * parameter.grad.norm()).all() and parameter.grad.norm() > 1e-9, name


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_a_seed_is_the_same_beside_others_and_alone(architecture, training):
    """Logits and every part; images that all seeds share come once."""
    together = network(architecture, (3, 4)).train(training)
    x = images(2) if training else images(1)
    logits, parts = together(x)

    for s, seed in enumerate((3, 4)):
        own_logits, own_parts = network(architecture, (seed,)).train(training)(x[s : s + 1] if training else x)
        torch.testing.assert_close(logits[s], own_logits[0])
        assert parts.keys() == own_parts.keys()
        for name in parts:
            torch.testing.assert_close(parts[name][s], own_parts[name][0])


@pytest.mark.parametrize("architecture", GATED.values(), ids=GATED)
def test_one_image_opens_its_gates_alone(architecture):
    """Whatever else is in the batch."""
    model = network(architecture).eval()
    whole, few = model(images()), model(images()[:, :2])

    torch.testing.assert_close(whole[1]["gates"][:, :2], few[1]["gates"])
    torch.testing.assert_close(whole[0][:, :2], few[0])


def close(model, image, gate):
    """Make one gate of one image 0 in every forward pass to come."""

    def shut(module, inputs, gates):
        gates = gates.clone()
        gates[:, :, image, gate] = 0
        return gates

    model.gating.heads.register_forward_hook(shut)


@pytest.mark.parametrize("name", [name for name, architecture in GATED.items() if architecture.gates is GATES])
@pytest.mark.parametrize("training", [True, False])
def test_a_closed_gate_makes_a_zero_channel(name, training):
    """Exactly, of that image alone, in every gated layer."""
    model = network(GATED[name]).train(training)
    for norms in (module for module in model.modules() if hasattr(module, "running_mean")):
        torch.nn.init.normal_(norms.bias)
    units = sorted(
        (unit for unit in model.modules() if isinstance(unit, GatedUnit) and unit.gate is not None),
        key=lambda unit: unit.gate,
    )
    made = {}
    for unit in units:
        unit.register_forward_hook(lambda unit, inputs, output: made.__setitem__(unit.gate, output.clone()))
    assert [unit.gate for unit in units] == list(range(len(model.gated_channels)))

    start = 0
    for layer, channels in enumerate(model.gated_channels):
        close(model, image=1, gate=start + 1)
        model(images())
        assert not made[layer][1, 1].any() and made[layer][0, 1].any() and made[layer][1, 0].any()
        assert made[layer].shape[1] == channels
        start += channels


@pytest.mark.parametrize("architecture", GATED.values(), ids=GATED)
def test_gates_leave_the_maps_their_precision(architecture):
    """Or a network with gates would be trained in fp32 beside one in bfloat16."""
    model, seen = network(architecture).float(), []
    for module in model.modules():
        if isinstance(module, GatedUnit):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(images().float())

    assert set(seen) == {torch.bfloat16}


def test_in_a_residual_sum_a_closed_gate_leaves_the_shortcut():
    """Nothing of the block's own is left in that channel."""
    model = network(ARCHITECTURES["basic_gated"]).eval()
    close(model, image=0, gate=4 + 2)  # the second layer of the first block
    passed = []
    model.network.blocks[0].register_forward_hook(lambda block, inputs, output: passed.extend([inputs[0], output]))
    model(images())

    assert torch.equal(passed[1][0, 2], passed[0][0, 2])
    assert not torch.equal(passed[1][1, 2], passed[0][1, 2])


def test_in_the_originals_order_a_closed_gate_leaves_a_constant():
    """The norm makes something of the zeros: that is why it is not the default."""
    model = network(ARCHITECTURES["basic_legacy"]).train()
    torch.nn.init.ones_(model.gating.heads.weight)
    close(model, image=0, gate=1)
    made = []
    model.network.blocks[0].units[0].register_forward_hook(lambda unit, inputs, output: made.append(output.clone()))
    gates = model(images())[1]["gates"]

    closed = made[0][0, 1]
    assert gates[0, 0, 1] == 0 and gates[0, 1:, 1].any()
    torch.testing.assert_close(closed, closed[0, 0].expand_as(closed))
    assert closed.abs().max() > 0.01


@pytest.mark.parametrize("architecture", GATED.values(), ids=GATED)
def test_gates_begin_at_their_offset(architecture):
    """At 1 the network begins as one without gates; at 0, as in the original, half are shut and the others nearly."""
    gates = network(architecture)(images())[1]["gates"]

    if architecture.gates is GATES:
        assert gates.mean().item() == pytest.approx(1, abs=0.1) and (gates > 0).all()
    else:
        assert gates.mean() < 0.2


def test_a_deep_network_without_norms_begins_alive_only_near_open_gates():
    """In the original form the first layer of a VGG has no gradient at all in single precision."""
    reached = {}
    for offset in (1.0, 0.0):
        gates = GateConfig(embedding_dim=8, offset=offset)
        deep = VggArchitecture(image_shape=SHAPE, channels=((8,) * 12, (8,) * 4), hidden=8, dropout=0.0, gates=gates)
        model = network(deep).float()
        logits, _ = model(images().float())
        torch.nn.functional.cross_entropy(logits[0], torch.arange(BATCH) % CLASSES).backward()
        reached[offset] = model.network.stages[0].units[0].conv.weight.grad.norm().item()

    assert reached[1.0] > 1e-3 and reached[0.0] < 1e-12
