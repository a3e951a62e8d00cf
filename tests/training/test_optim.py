"""Schedules, clipping, loss scaling and averaging, seed by seed."""

import pytest
import torch
from torch import nn

from collective_pipeline.config import TrainingConfig
from collective_pipeline.training.optim import (
    AveragedWeights,
    LossScaler,
    clip_by_seed,
    make_optimizer,
    make_schedule,
)

TORCH_OPTIMIZERS = {
    "adam": lambda groups, rate: torch.optim.Adam(groups, lr=rate),
    "adamw": lambda groups, rate: torch.optim.AdamW(groups, lr=rate),
    "adamax": lambda groups, rate: torch.optim.Adamax(groups, lr=rate),
    "sgd": lambda groups, rate: torch.optim.SGD(groups, lr=rate, momentum=0.8),
    "rmsprop": lambda groups, rate: torch.optim.RMSprop(groups, lr=rate, momentum=0.8),
    "adagrad": lambda groups, rate: torch.optim.Adagrad(groups, lr=rate, eps=1e-8),
    "adadelta": lambda groups, rate: torch.optim.Adadelta(groups, lr=rate, eps=1e-8),
}


def rates(**changes):
    """The learning rate of each of 100 updates, as a part of its highest."""
    config = TrainingConfig(**changes)
    schedule = make_schedule(config, rate=2.0, num_updates=100, warmup_updates=10 * bool(config.warmup_epochs))

    assert schedule.shape == (100,)
    return (schedule / 2).tolist()


def test_constant_stays():
    """No schedule, no change."""
    assert set(rates()) == {1.0}


def test_warmup_rises_in_equal_steps():
    """From nothing to the full rate, then the schedule."""
    seen = rates(warmup_epochs=1)

    assert seen[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert set(seen[10:]) == {1.0}


def test_cosine_falls_to_nothing():
    """Never rising, half at half time, near 0 at the end."""
    seen = rates(schedule="cosine")

    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 1 and seen[50] == pytest.approx(0.5) and seen[-1] < 0.001


def test_one_cycle_rises_then_falls():
    """Starts at a 25th, is highest after 30 %, ends near 0."""
    seen = rates(schedule="one_cycle")

    assert seen[0] == pytest.approx(1 / 25)
    assert seen[30] == pytest.approx(1)
    assert seen[:31] == sorted(seen[:31]) and seen[30:] == sorted(seen[30:], reverse=True)
    assert seen[-1] < 0.002


def test_multi_step_falls_at_the_milestones():
    """A tenth after half, a hundredth after three quarters."""
    seen = rates(schedule="multi_step")

    assert seen == pytest.approx([1.0] * 50 + [0.1] * 25 + [0.01] * 25)


def test_only_matrices_are_decayed():
    """Biases and norms keep out of the decayed group."""
    names = {"weight": (1, 1, 2, 2), "bias": (1, 1, 1, 2), "norm.weight": (1, 1, 2), "norm.bias": (1, 1, 2)}
    parameters = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in names.items()]
    decayed, free = make_optimizer(parameters, TrainingConfig(weight_decay=0.1)).param_groups

    assert [len(decayed["params"]), len(free["params"])] == [1, 3]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_optimizers_are_those_of_torch(name):
    """Step by step at a rate that changes, the state being there from the start."""
    config = TrainingConfig(optimizer=name, learning_rate=0.5, weight_decay=0.1, momentum=0.8)
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(2, 1, dim, 2, generator=generator)) for dim in (3, 1)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = make_optimizer([*zip(("weight", "bias"), ours, strict=True)], config)
    groups = [{"params": theirs[0], "weight_decay": 0.1}, {"params": theirs[1], "weight_decay": 0.0}]
    reference = TORCH_OPTIMIZERS[name](groups, 0.5)

    assert [group["lr"].item() for group in optimizer.param_groups] == [0.5, 0.5]
    for rate in (0.5, 0.1, 0.02):
        for group, reference_group in zip(optimizer.param_groups, reference.param_groups, strict=True):
            group["lr"].fill_(rate)
            reference_group["lr"] = rate
        for parameter, other in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs)


def test_the_decay_of_adagrad_is_that_of_torch():
    """In the schedule, where a recorded step reads its rate, and only Adagrad's."""
    weight, other = (nn.Parameter(torch.ones(1, 1, 2, 2)) for _ in range(2))
    config = TrainingConfig(optimizer="adagrad", lr_decay=0.3, weight_decay=0.0)
    optimizer = make_optimizer([("weight", weight)], config)
    reference = torch.optim.Adagrad([other], lr=2.0, lr_decay=0.3, eps=1e-8)
    for rate in make_schedule(config, rate=2.0, num_updates=4, warmup_updates=0):
        optimizer.param_groups[0]["lr"].copy_(rate)
        for parameter in (weight, other):
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weight, other)
    assert set(rates(lr_decay=0.3)) == {1.0}


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_the_state_of_an_optimizer_stays_where_it_lies(name):
    """Before the first step already, so that a resumed run can fill it."""
    weight = nn.Parameter(torch.zeros(1, 1, 2, 2))
    optimizer = make_optimizer([("weight", weight)], TrainingConfig(optimizer=name))
    before = dict(optimizer.state[weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()

    assert before
    assert all(tensor is before[key] for key, tensor in optimizer.state[weight].items())
    assert all(tensor.any() for tensor in before.values())


def test_clipping_equals_torch_for_each_seed():
    """Each seed's gradients are clipped as torch clips that seed alone."""
    gradients = [torch.randn(3, 4, 5) * torch.tensor([0.01, 1, 10]).view(-1, 1, 1), torch.randn(3, 1, 2)]
    expected = []
    for s in range(3):
        alone = [nn.Parameter(torch.zeros_like(gradient[s])) for gradient in gradients]
        for parameter, gradient in zip(alone, gradients, strict=True):
            parameter.grad = gradient[s].clone()
        nn.utils.clip_grad_norm_(alone, 2.0)
        expected.append([parameter.grad for parameter in alone])

    clip_by_seed(gradients, 2.0)

    for s in range(3):
        for gradient, slow in zip(gradients, expected[s], strict=True):
            torch.testing.assert_close(gradient[s], slow, rtol=1e-5, atol=1e-6)


def test_overflow_of_one_seed_leaves_the_others():
    """A seed whose gradient overflowed gets zeros and half its scale; its neighbour keeps both."""
    scaler = LossScaler(2, torch.device("cpu"), enabled=True)
    before = scaler.scale_S.clone()
    gradient = torch.stack([torch.full((3,), 8.0), torch.tensor([1.0, float("inf"), 1.0])]) * before.view(-1, 1)

    scaler.unscale_([gradient])

    assert gradient.tolist() == [[8.0] * 3, [0.0] * 3]
    assert (scaler.scale_S / before).tolist() == [1.0, 0.5]


def test_scaler_without_fp16_does_nothing():
    """Losses and gradients pass unchanged."""
    scaler = LossScaler(2, torch.device("cpu"), enabled=False)
    loss, gradient = torch.tensor([1.0, 2.0]), torch.tensor([[float("inf")], [1.0]])

    scaler.unscale_([gradient])

    assert torch.equal(scaler.scale(loss), loss)
    assert gradient.tolist() == [[float("inf")], [1.0]]


def test_averaging_covers_buffers_and_forgets_its_start():
    """Weights and running statistics follow the network; the first update takes over nine tenths."""
    network = nn.BatchNorm1d(2)
    averaged = AveragedWeights(network, decay=0.99)
    with torch.no_grad():
        network.weight.fill_(11.0)
        network.running_mean.fill_(5.0)

    averaged.update(network, torch.tensor([0]))
    assert averaged.network.weight.tolist() == pytest.approx([10.0, 10.0])
    assert averaged.network.running_mean.tolist() == pytest.approx([4.5, 4.5])

    for t in range(1, 2001):
        averaged.update(network, torch.tensor([t]))
    assert averaged.network.weight.tolist() == pytest.approx([11.0, 11.0])


@pytest.mark.parametrize(("num_updates", "kept"), [(0, 0.1), (8, 0.5), (890, 0.99), (1_000_000, 0.99)])
def test_averaging_keeps_more_as_it_goes_on(num_updates, kept):
    """(1 + t) / (10 + t) of what it had, and never more than the decay."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    averaged = AveragedWeights(network, decay=0.99)
    nn.init.zeros_(network.weight)

    averaged.update(network, torch.tensor([num_updates]))

    assert averaged.network.weight.item() == pytest.approx(kept)
    assert network.weight.item() == 0
