"""Stacked convolutions are what as many of torch's own would be, and nothing passes from one seed to another."""

import math

import pytest
import torch
from torch import nn

from collective_pipeline.models.convolution import (
    BatchNorm2d,
    Conv2d,
    GlobalAveragePool,
    to_channels,
    to_features,
    to_maps,
)
from collective_pipeline.models.layers import Stack
from collective_pipeline.randomness import make_generator

STACK = Stack(num_seeds=3, num_members=2)
BATCH, IN, OUT, SIDE = 4, 4, 6, 5
SETTINGS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "bias": True},
    "pointwise": {"kernel_size": 1, "bias": True},
    "stem": {"kernel_size": 7, "stride": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": IN, "bias": True},
}


def maps(channels):
    """Random maps in double precision."""
    return torch.randn(BATCH, channels, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomised(module):
    """The module in double precision with every weight and statistic random."""
    module = module.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return module


def convolution(stack, settings):
    out = 2 * IN if "groups" in settings else OUT
    return Conv2d(stack, IN, out, **settings)


def plain(layer, settings, s, n):
    """One network of the stack as torch's own convolution."""
    out = layer.weight.shape[2]
    padding = settings.get("padding", settings["kernel_size"] // 2)
    own = nn.Conv2d(IN, out, **{"bias": False} | settings | {"padding": padding}).double()
    state = {"weight": layer.weight[s, n]} | ({} if layer.bias is None else {"bias": layer.bias[s, n]})
    own.load_state_dict(state)
    return own


@pytest.mark.parametrize("sharing", ["own", "by_members", "by_all"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_network_of_a_stack_is_torchs_own_convolution(settings, sharing):
    """Whether each reads maps of its own, those of its seed, or those of all."""
    layer = randomised(convolution(STACK, settings))
    num_inputs = {"own": 6, "by_members": 3, "by_all": 1}[sharing]
    x = maps(num_inputs * IN)

    made = layer(x).unflatten(1, (*STACK, -1))

    for s in range(3):
        for n in range(2):
            start = {"own": 2 * s + n, "by_members": s, "by_all": 0}[sharing] * IN
            torch.testing.assert_close(made[:, s, n], plain(layer, settings, s, n)(x[:, start : start + IN]))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs_own(training):
    """In training and after it, its statistics included."""
    norm, own = randomised(BatchNorm2d(STACK, IN)), nn.BatchNorm2d(6 * IN).double()
    own.load_state_dict({name: tensor.flatten() for name, tensor in norm.state_dict().items()}, strict=False)
    norm.train(training), own.train(training)

    torch.testing.assert_close(norm(maps(6 * IN)), own(maps(6 * IN)))
    torch.testing.assert_close(norm.running_mean.flatten(), own.running_mean)
    torch.testing.assert_close(norm.running_var.flatten(), own.running_var)


def network(stack):
    return nn.Sequential(
        Conv2d(stack, IN, OUT, 3, stride=2, bias=True),
        BatchNorm2d(stack, OUT),
        nn.ReLU(),
        Conv2d(stack, OUT, OUT, 3, groups=OUT),
        GlobalAveragePool(stack),
    )


def test_a_seed_is_the_same_beside_others_and_alone():
    """Outputs, gradients and statistics."""
    together = randomised(network(STACK))
    x = maps(3 * 2 * IN)
    made = together(x)
    made.square().sum().backward()

    for s in range(3):
        alone = network(STACK._replace(num_seeds=1)).double()
        fresh = randomised(network(STACK)).state_dict()
        alone.load_state_dict({name: tensor[s : s + 1] for name, tensor in fresh.items()})
        made_alone = alone(x[:, s * 2 * IN : (s + 1) * 2 * IN])
        made_alone.square().sum().backward()
        torch.testing.assert_close(made[s], made_alone[0])
        for one, other in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad[s], other.grad[0])
        for one, other in zip(together.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(one[s], other[0])


def test_a_seed_draws_its_weights_from_its_own_generator():
    """He-normal by fan-out."""
    several, alone = Conv2d(Stack(2), 16, 32, 3, bias=True), Conv2d(Stack(1), 16, 32, 3)
    several.initialise([make_generator(seed, "weights") for seed in (5, 7)])
    alone.initialise([make_generator(7, "weights")])

    assert torch.equal(several.weight[1], alone.weight[0])
    assert several.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)
    assert not several.bias.any()


def test_flattened_images_become_maps_and_pixels_features():
    """Shared images are not copied for the seeds."""
    x = torch.randn(3, BATCH, 2 * SIDE * SIDE)
    made = to_maps(x, (2, SIDE, SIDE))

    assert torch.equal(made.unflatten(1, (3, 2)).transpose(0, 1).flatten(2), x)
    assert to_maps(x[:1], (2, SIDE, SIDE)).shape == (BATCH, 2, SIDE, SIDE)
    assert torch.equal(to_features(made, Stack(3))[:, 0], x)
    means = GlobalAveragePool(STACK)(maps(6 * IN))
    assert means.shape == (3, 2, BATCH, IN)
    torch.testing.assert_close(to_channels(means)[..., 0, 0], maps(6 * IN).mean(dim=(2, 3)))
