"""What a residual network may have beside its convolutions: blur, stochastic depth, its heads, and where it starts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from collective_pipeline.config import ImageSpec, ResNetArchitecture, UserError, VggArchitecture
from collective_pipeline.models.build import build_arm, build_model, initialise
from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from collective_pipeline.models.convolution import BatchNorm2d, Blur
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.models.layers import RandomBits, Stack
from collective_pipeline.models.resnet import StochasticDepth, set_drop_path
from collective_pipeline.randomness import make_generator
from collective_pipeline.training.dropout_bits import DropoutBits

SHAPE, CLASSES, BATCH, SEEDS = (3, 16, 16), 4, 6, (3, 4)
RESNET = {"image_shape": SHAPE, "blocks": (1, 2), "width": 4}
ALL = {"blur": True, "drop_path": 0.5, "head": "conv", "zero_init_residual": True}
WITH_ALL = {
    "basic": ResNetArchitecture(**RESNET, **ALL),
    "bottleneck": ResNetArchitecture(**RESNET, **ALL, bottleneck=True, stem="imagenet"),
}


def network(architecture, seeds=(0,)):
    """In double precision, every seed's weights its own."""
    model = build_model(architecture, in_dim=3 * 16 * 16, num_classes=CLASSES, num_seeds=len(seeds))
    initialise(model, [make_generator(seed, "weights") for seed in seeds])
    return model.double()


def images(num_seeds=1, side=16, batch=BATCH):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_seeds, batch, 3 * side * side, dtype=torch.float64, generator=generator)


def awake(model):
    """With norms that scale by something else than 0."""
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


@pytest.mark.parametrize("size", [(3, 3), (8, 8), (9, 7), (12, 5)])
def test_blur_is_the_binomial_mean_of_a_reflected_map(size):
    """And so are its gradients; it has no parameter, and a constant stays what it is."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    padded = F.pad(x, (1, 2, 1, 2), mode="reflect")
    rows = sum(tap * padded[:, :, k : k + size[0] : 2] for k, tap in enumerate(taps))
    expected = sum(tap * rows[..., k : k + size[1] : 2] for k, tap in enumerate(taps))
    blur = Blur().double()
    blurred = blur(x)
    pull = torch.randn_like(expected)

    torch.testing.assert_close(blurred, expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * pull).sum(), x)[0] for y in (blurred, expected)))
    torch.testing.assert_close(blur(torch.ones_like(x)), torch.ones_like(expected))
    assert not list(blur.parameters()) and not blur.state_dict()


def test_with_blur_maps_have_the_sizes_of_the_original():
    """Eight blurs in a ResNet-50."""
    shape = (3, 224, 224)
    architecture = ResNetArchitecture(
        image_shape=shape, stem="imagenet", blocks=(3, 4, 6, 3), bottleneck=True, blur=True
    )
    sides, blurs = [], []
    with torch.device("meta"):
        model = build_model(architecture, in_dim=3 * 224 * 224, num_classes=10)
        for module in model.modules():
            if isinstance(module, Blur):
                module.register_forward_hook(lambda module, inputs, y: blurs.append(y.shape[-1]))
        stem, last = model.network.pool, [3, 7, 13, 16]
        for module in (stem[0], stem[2], *(model.network.blocks[n - 1] for n in last)):
            module.register_forward_hook(lambda module, inputs, y: sides.append(y.shape[-1]))
        model(torch.empty(1, 1, 3 * 224 * 224))

    assert sides == [112, 55, 55, 28, 14, 7]
    assert blurs == [112, 55, 28, 28, 14, 14, 7, 7]


def test_the_stem_for_small_images_does_not_blur():
    """Only the stages that halve do, each twice."""
    model = network(WITH_ALL["basic"])

    assert sum(isinstance(module, Blur) for module in model.modules()) == 2
    assert isinstance(model.network.pool, nn.Identity)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_smallest_images_that_blur_can_read(stem, stages):
    """One pixel less is refused, in one sentence."""
    settings = {"stem": stem, "blocks": (1,) * stages, "width": 2, "blur": True}
    side = ResNetArchitecture(image_shape=SHAPE, **settings).smallest_side
    for smaller in (0, 1):
        shape = (3, side - smaller, side - smaller)
        architecture = ResNetArchitecture(image_shape=shape, **settings)
        if smaller:
            with pytest.raises(UserError, match=f"too small .* {side}x{side}"):
                build_model(architecture, in_dim=3 * shape[1] ** 2, num_classes=CLASSES)
        else:
            build_model(architecture, in_dim=3 * side**2, num_classes=CLASSES)(torch.randn(1, 2, 3 * side**2))


def test_rates_rise_evenly_from_0_to_the_last_block():
    """In ResNet-50 at 0.2 by 0.0133 from block to block, and the blocks have those rates."""
    architecture = ResNetArchitecture(image_shape=SHAPE, blocks=(3, 4, 6, 3), bottleneck=True, width=2, drop_path=0.2)
    rates = [module.rate for module in network(architecture).modules() if isinstance(module, StochasticDepth)]

    assert rates == pytest.approx([0.2 / 15 * block for block in range(16)])


def test_an_image_keeps_its_branch_or_loses_it_and_nothing_changes_on_average():
    """Each image and each seed for itself, scaled by the share that stays."""
    drop = StochasticDepth(Stack(2), 0.25)
    bits = DropoutBits((0, 1), torch.device("cpu"))
    bits.attach(drop, 4000)
    bits.draw(torch.tensor([0]))
    factors = drop(torch.ones(4000, 2 * 3, 2, 2)).unflatten(1, (2, 3))

    assert {round(value, 4) for value in factors.unique().tolist()} == {0.0, round(4 / 3, 4)}
    assert torch.equal(factors, factors[:, :, :1, :1, :1].expand_as(factors))
    assert (factors[:, 0] != factors[:, 1]).any()
    assert factors.mean(dim=(0, 2, 3, 4)).tolist() == pytest.approx([1, 1], abs=0.04)


@pytest.mark.parametrize("architecture", WITH_ALL.values(), ids=WITH_ALL)
def test_stochastic_depth_is_for_training_and_can_be_switched(architecture):
    """Off, it is as if it were not there; on again, it is there again. Evaluated, a network answers always the same."""
    model, plain = awake(network(architecture)), awake(network(architecture.model_copy(update={"drop_path": 0.0})))
    x = images(batch=40)
    set_drop_path(model, False)
    torch.testing.assert_close(model(x)[0], plain(x)[0])
    set_drop_path(model, True)
    assert not torch.allclose(model(x)[0], plain(x)[0])
    for trained in (model.eval(), plain.eval()):
        assert torch.equal(trained(x)[0], trained(x)[0])


@pytest.mark.parametrize("architecture", WITH_ALL.values(), ids=WITH_ALL)
def test_a_seed_is_the_same_beside_others_and_alone(architecture):
    """What it draws for stochastic depth included."""

    def trained(seeds, x):
        model, bits = awake(network(architecture, seeds)), DropoutBits(seeds, torch.device("cpu"))
        bits.attach(model, BATCH)
        assert sum(isinstance(module, RandomBits) for module in model.modules()) == 2
        bits.draw(torch.tensor([4]))
        return model(x)[0]

    x = images(2)
    together = trained(SEEDS, x)
    for s, seed in enumerate(SEEDS):
        torch.testing.assert_close(trained((seed,), x[s : s + 1])[0], together[s])


@pytest.mark.parametrize("architecture", WITH_ALL.values(), ids=WITH_ALL)
def test_gradients_reach_every_parameter_by_the_second_step(architecture):
    """At the first, a last norm that scales by 0 keeps them from what is before it in its block, and from nothing else.

    Its own scale has a gradient and grows.
    """
    model = network(architecture, SEEDS)
    set_drop_path(model, False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimiser.zero_grad()
        logits, _ = model(images(2))
        (logits**2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(step))).sum().backward()
        behind_zero = {
            f"network.blocks.{b}.units.{u}.{name}"
            for b, block in enumerate(model.network.blocks)
            for u, unit in enumerate(block.units)
            for name, _ in unit.named_parameters()
            if step == 0 and (u < len(block.units) - 1 or name.startswith("conv"))
        }
        for name, parameter in model.named_parameters():
            reached = (parameter.grad.flatten(1).norm(dim=1) > 1e-9).tolist()
            assert reached == [name not in behind_zero] * 2, name
        optimiser.step()


@pytest.mark.parametrize("architecture", WITH_ALL.values(), ids=WITH_ALL)
def test_a_block_begins_as_its_shortcut(architecture):
    """What its units make is scaled by 0, whatever the seed."""
    model = network(architecture, SEEDS).eval()
    passed = []
    for block in model.network.blocks:
        block.register_forward_hook(lambda block, inputs, output: passed.append((block, inputs[0], output)))
    model(images(2))

    for block, x, y in passed:
        skipped = x if block.shortcut_blur is None else block.shortcut_blur(x)
        assert torch.equal(y, F.relu(skipped if block.shortcut is None else block.shortcut(skipped, ())))


def test_a_shortcut_blurred_before_its_convolution_is_the_one_blurred_behind_it():
    """Of a trained network: as the original has it, for a quarter of the work."""
    block = network(ResNetArchitecture(**RESNET, blur=True), SEEDS).eval().network.blocks[1]
    x = torch.randn(2, block.shortcut.conv.weight.shape[0] * block.shortcut.conv.in_channels, 8, 8).double()
    assert block.shortcut_blur is not None

    before, behind = block.shortcut(block.shortcut_blur(x), ()), block.shortcut_blur(block.shortcut(x, ()))
    torch.testing.assert_close(before, behind)


def test_the_convolutional_head_is_the_linear_one():
    """The same seed draws the same weights for it, and the logits are the same: it can be worth nothing but luck."""
    linear, conv = (network(ResNetArchitecture(**RESNET, head=head), SEEDS) for head in ("linear", "conv"))

    torch.testing.assert_close(conv(images(2))[0], linear(images(2))[0])
    assert sum(p.numel() for p in conv.parameters()) == sum(p.numel() for p in linear.parameters())


@pytest.mark.parametrize("architecture", WITH_ALL.values(), ids=WITH_ALL)
def test_images_may_be_squares_of_another_size(architecture):
    """As if the network were built for them."""
    other = architecture.model_copy(update={"image_shape": (3, 24, 24)})
    x = images(2, side=24)

    torch.testing.assert_close(network(architecture, SEEDS).eval()(x)[0], network(other, SEEDS).eval()(x)[0])


def test_a_vgg_reads_images_of_one_size():
    vgg = network(VggArchitecture(image_shape=SHAPE, channels=((4,), (6,)), hidden=8))

    with pytest.raises(UserError, match="a VGG reads images of 16x16 pixels alone"):
        vgg(images(side=24))


def test_a_checkpoint_rebuilds_such_a_network(tmp_path):
    """Nothing of the blur is in the file, and drop-path has no part in its answers."""
    arm = make_image_arm("resnet18", WITH_ALL["basic"], num_classes=CLASSES)
    model = build_arm(arm, num_seeds=2)
    initialise(model, [make_generator(seed, "weights") for seed in SEEDS])
    x = images(2).float()
    awake(model)(x)
    about = ImageSpec(shape=SHAPE, mean=(0.5,) * 3, std=(0.2,) * 3, class_names=tuple("abcd"))
    checkpoint = Checkpoint(arm, "cifar10", about, SEEDS, (1, 1), model.state_dict())
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")

    assert replace(loaded, weights={}) == replace(checkpoint, weights={})
    assert torch.equal(loaded.build()(x)[0], model.eval()(x)[0])
    torch.testing.assert_close(loaded.of_seeds([4]).build()(x[1:])[0][0], model(x)[0][1])
