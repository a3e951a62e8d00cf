"""Stacked layers are what as many separate layers would be, and nothing passes from one seed or member to another."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from collective_pipeline.models.layers import (
    BatchNorm,
    Dropout,
    FanOut,
    Linear,
    RandomBits,
    Stack,
    bits_below,
    concat_members,
    normalise_over_ranks,
)
from collective_pipeline.randomness import make_generator

STACK = Stack(num_seeds=3, num_members=4)
BATCH, IN_DIM, OUT_DIM = 16, 5, 6
LAYERS = {
    "linear": lambda stack: Linear(stack, IN_DIM, OUT_DIM),
    "batch_norm": lambda stack: BatchNorm(stack, IN_DIM),
}
SHARING = {
    "linear": lambda stack: Linear(stack, IN_DIM, OUT_DIM),
    "fan_out": lambda stack: FanOut(stack, IN_DIM, OUT_DIM),
}


def randomised(module):
    """The module in double precision with nothing left at its default: every weight and statistic is random."""
    module = module.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return module


def inputs(*shape):
    """Random features in double precision."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def lone_seed(module, make, seed):
    """The module that `make` gives for one seed, with that seed's part of `module`'s weights and statistics."""
    lone = make(STACK._replace(num_seeds=1)).double()
    lone.load_state_dict({name: tensor[seed : seed + 1].clone() for name, tensor in module.state_dict().items()})
    return lone


def given_bits(layer, bits):
    """The layer in training, with its random bits given."""
    layer.draw.bits = bits
    return layer.train()


def test_linear_is_a_linear_for_every_seed_and_member():
    """Each entry of the stack is torch's own linear with that entry's weights."""
    layer = randomised(Linear(STACK, IN_DIM, OUT_DIM))
    x = inputs(*STACK, BATCH, IN_DIM)
    y = layer(x)

    assert y.shape == (*STACK, BATCH, OUT_DIM)
    for s in range(STACK.num_seeds):
        for n in range(STACK.num_members):
            torch.testing.assert_close(y[s, n], F.linear(x[s, n], layer.weight[s, n].T, layer.bias[s, n, 0]))


@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_an_input_with_one_seed_is_shared_by_all(make):
    """Handing an input over once is the same as handing a copy to every seed."""
    layer = randomised(make(Stack(3)))
    x = inputs(1, 1, BATCH, IN_DIM)

    torch.testing.assert_close(layer(x), layer(x.repeat(3, 1, 1, 1)))


def test_fan_out_is_separate_linears_on_one_input():
    """Members that read the same input give what N linears of their own would give."""
    layer = randomised(FanOut(STACK, IN_DIM, OUT_DIM))
    x = inputs(STACK.num_seeds, 1, BATCH, IN_DIM)
    y = layer(x)

    assert y.shape == (*STACK, BATCH, OUT_DIM)
    for s in range(STACK.num_seeds):
        for n in range(STACK.num_members):
            columns = slice(n * OUT_DIM, (n + 1) * OUT_DIM)
            weight, bias = layer.linear.weight[s, 0, :, columns], layer.linear.bias[s, 0, 0, columns]
            torch.testing.assert_close(y[s, n], F.linear(x[s, 0], weight.T, bias))


def test_batch_norm_is_a_batch_norm_for_every_seed_and_member():
    """Several training steps and then an evaluation agree with nn.BatchNorm1d, running statistics included."""
    layer = randomised(BatchNorm(STACK, IN_DIM))
    singles = {}
    for s in range(STACK.num_seeds):
        for n in range(STACK.num_members):
            single = singles[s, n] = nn.BatchNorm1d(IN_DIM).double()
            single.load_state_dict({name: tensor[s, n] for name, tensor in layer.state_dict().items()}, strict=False)
    steps = inputs(4, *STACK, BATCH, IN_DIM) * 3 + 2
    for step, x in enumerate(steps):
        training = step < len(steps) - 1
        y = layer.train(training)(x)

        assert y.shape == x.shape
        for (s, n), single in singles.items():
            torch.testing.assert_close(y[s, n], single.train(training)(x[s, n]))
            torch.testing.assert_close(layer.running_mean[s, n], single.running_mean)
            torch.testing.assert_close(layer.running_var[s, n], single.running_var)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_seed_does_not_depend_on_its_neighbours(make, training):
    """Outputs, gradients and statistics of a seed are those it has alone."""
    together = randomised(make(STACK))
    alone = [lone_seed(together, make, s) for s in range(STACK.num_seeds)]
    x = inputs(*STACK, BATCH, IN_DIM)
    y = together.train(training)(x)
    weights = torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view(y[0].shape)
    (y.square() * weights).sum().backward()

    for s, lone in enumerate(alone):
        y_lone = lone.train(training)(x[s : s + 1])
        (y_lone.square() * weights).sum().backward()
        torch.testing.assert_close(y[s], y_lone[0])
        for ours, theirs in zip(together.parameters(), lone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad[s], theirs.grad[0])
        for ours, theirs in zip(together.buffers(), lone.buffers(), strict=True):
            torch.testing.assert_close(ours[s], theirs[0])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_is_above_the_threshold_and_rescales_it(rate):
    """With the bits given, nothing is left to chance."""
    threshold = bits_below(rate)
    bits = torch.tensor([-(2**15), threshold - 1, threshold, threshold + 1, 2**15 - 1], dtype=torch.int16)
    layer = given_bits(Dropout(Stack(1), 5, rate), bits.view(1, 1, 1, 5))
    x = torch.arange(1.0, 6.0).view(1, 1, 1, 5)
    kept = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])

    torch.testing.assert_close(layer(x), x * kept / (1 - rate))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(rate):
    """About `rate` of the features are zero, and the mean stays about what it was."""
    torch.manual_seed(0)
    y = Dropout(Stack(2, 3), 20, rate).train()(torch.ones(2, 3, 2000, 20))

    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True), (0.0, False)])
def test_dropout_off_changes_nothing(rate, training):
    """In evaluation, and at rate 0, the features pass untouched; rate 0 asks for no random numbers either."""
    layer = Dropout(STACK, IN_DIM, rate).train(training)
    x = inputs(*STACK, BATCH, IN_DIM)

    assert torch.equal(layer(x), x)
    assert rate or not [module for module in layer.modules() if isinstance(module, RandomBits)]


@pytest.mark.parametrize("rate", [0.999, 1 - 2**-16, 1 - 1e-9])
def test_dropout_near_one_still_lets_something_pass(rate):
    """The largest draw survives every rate below 1, and what survives is finite."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(1, 1, -1, 1)
    y = given_bits(Dropout(Stack(1), 1, rate), bits)(torch.ones(1, 1, 2**16, 1))

    assert y.isfinite().all()
    assert y[0, 0, -1, 0] > 0
    assert (y > 0).float().mean().item() <= 0.0011


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.5, 0.999])
def test_bits_below_is_the_wanted_part_of_all_bits(rate):
    """As many of the 65,536 numbers are below the threshold as the probability says, to one."""
    assert abs(bits_below(rate) + 2**15 - rate * 2**16) <= 1


def test_random_bits_are_spread_over_all_16_bits():
    """Left alone, the bits are even over their whole range and come in the shape of the features."""
    torch.manual_seed(0)
    bits = RandomBits(Stack(2, 3), 7)(torch.empty(2, 3, 5000, 100))

    assert bits.shape == (2, 3, 5000, 7)
    assert bits.dtype == torch.int16
    assert bits.float().mean().item() == pytest.approx(0, abs=400)
    assert min(bits.max().item(), -bits.min().item()) > 2**15 - 20


@pytest.mark.parametrize("in_dim", [10, 100, 784])
def test_initialise_is_he_normal_by_fan_in(in_dim):
    """Weights have mean 0 and standard deviation sqrt(2 / in_dim), biases are 0."""
    layer = Linear(Stack(2, 3), in_dim, 500)
    layer.initialise([make_generator(seed, "weights") for seed in (1, 2)])

    std = math.sqrt(2 / in_dim)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert abs(layer.weight.mean().item()) < 0.03 * std
    assert not layer.bias.any()


def test_fan_out_is_initialised_by_the_input_it_reads():
    """The members' matrices standing side by side does not change their scale."""
    layer = FanOut(Stack(1, 8), 100, 200)
    layer.linear.initialise([make_generator(0, "weights")])

    assert layer.linear.weight.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.03)


def test_a_seed_has_the_same_weights_alone_or_among_others():
    """A seed's weights come from its own generator and nothing else."""
    alone, among = Linear(Stack(1, 2), IN_DIM, OUT_DIM), Linear(Stack(3, 2), IN_DIM, OUT_DIM)
    alone.initialise([make_generator(7, "weights")])
    among.initialise([make_generator(seed, "weights") for seed in (3, 7, 5)])

    assert torch.equal(among.weight[1], alone.weight[0])
    assert not torch.equal(among.weight[0], among.weight[1])


def test_initialise_wants_a_generator_for_every_seed():
    """No seed is left at zero for want of a generator."""
    with pytest.raises(ValueError, match="zip"):
        Linear(Stack(2), IN_DIM, OUT_DIM).initialise([make_generator(7, "weights")])


def test_concat_members_puts_features_side_by_side():
    """Member by member, in order, for every seed and image."""
    x = inputs(*STACK, BATCH, IN_DIM)
    y = concat_members(x)

    assert y.shape == (STACK.num_seeds, 1, BATCH, STACK.num_members * IN_DIM)
    assert torch.equal(y[:, 0], torch.cat(x.unbind(1), dim=-1))


@pytest.fixture
def alone_in_a_group():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_a_norm_over_one_rank_is_a_norm():
    """Outputs, running statistics and gradients, at a mean that is large beside the spread."""
    plain, over_ranks = (randomised(BatchNorm(STACK, IN_DIM)).train().float() for _ in range(2))
    normalise_over_ranks(over_ranks)
    x = 5 + torch.randn(3, 4, BATCH, IN_DIM, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for norm in (plain, over_ranks):
        given = x.clone().requires_grad_()
        y = norm(given)
        (y * weights).sum().backward()
        results.append([y, given.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])

    for wanted, found in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(over_ranks.eval()(x), over_ranks(x))  # and in validation nobody is asked
