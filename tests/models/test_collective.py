"""The collective is its five equations, written for all seeds and members at once."""

import pytest
import torch
from torch import nn

from collective_pipeline.config import CollectiveConfig, ModelDropoutConfig
from collective_pipeline.models.build import build_model, initialise
from collective_pipeline.models.collective import MemberDropout, Members
from collective_pipeline.models.layers import (
    BatchNorm,
    ChannelNorm,
    Dropout,
    FanOut,
    Linear,
    RandomBits,
    Stack,
    bits_below,
)
from collective_pipeline.models.mlp import HiddenLayer
from collective_pipeline.randomness import make_generator

SEEDS, BATCH, IN_DIM, NUM_CLASSES = 2, 24, 9, 4
SMALL = CollectiveConfig(
    n_total=7,
    n_experts=2,
    expert_hidden=(12, 8),
    expert_output=6,
    analyst_hidden=(10, 6),
    analyst_output=4,
    c_expert=0.5,
    adaptive_collective_min_dim=8,
    member_dropout=0.0,
    encoder_dropout=0.0,
    head_dropout=0.0,
)
VARIANTS = {
    "plain": {},
    "analyst_encoder": {"analyst_encoder": True},
    "encoder_head": {"head": "encoder_head"},
    "varied": {"vary_expert_architectures": True, "vary_analyst_architectures": True},
    "everything": {
        "vary_expert_architectures": True,
        "vary_analyst_architectures": True,
        "analyst_encoder": True,
        "head": "encoder_head",
        "c_collective": 0.75,
    },
}


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def collective(request):
    """A small collective of every kind, without dropout."""
    return small_collective(**request.param)


@pytest.fixture
def x():
    """A batch of images for every seed."""
    return torch.randn(SEEDS, BATCH, IN_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def unsettle(model):
    """Double precision, with biases, norms and statistics off their defaults."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.double().modules():
            match module:
                case Linear():
                    module.bias.uniform_(-0.5, 0.5, generator=generator)
                case ChannelNorm():
                    for tensor in [*module.parameters(), *module.buffers()]:
                        tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def small_collective(**changes):
    """A small collective in double precision, with biases, norms and statistics off their defaults."""
    config = SMALL.model_copy(update=changes)
    model = build_model(config, in_dim=IN_DIM, num_classes=NUM_CLASSES, num_seeds=SEEDS)
    initialise(model, [make_generator(seed, "weights") for seed in range(SEEDS)])
    return unsettle(model)


class Reference(nn.Module):
    """One seed of a collective from torch's own layers, with copied weights: a list of members, a loop over it."""

    def __init__(self, collective, seed):
        super().__init__()
        self.experts = nn.ModuleList(separate_members(collective.experts, seed))
        self.expert_encoder = separate(collective.expert_encoder, seed)
        self.analysts = nn.ModuleList(separate_members(collective.analysts, seed))
        self.analyst_encoder = separate(collective.analyst_encoder, seed)
        self.head = separate(collective.head, seed)

    def forward(self, x):
        experts = [expert(x) for expert in self.experts]
        encoded = self.expert_encoder(torch.cat(experts, dim=1))
        analysts = [analyst(torch.cat([x, encoded], dim=1)) for analyst in self.analysts]
        logits = self.head(self.analyst_encoder(torch.cat(analysts, dim=1)))
        return logits, {"experts": torch.stack(experts), "analysts": torch.stack(analysts)}


def separate_members(members, seed):
    """Each member by itself, in the members' own order."""
    seen = {}
    for dims in members.dims:
        group = next(group for group in members.groups if group.dims == dims)
        yield separate(group, seed, seen.setdefault(dims, 0))
        seen[dims] += 1


def separate(module, s, n=0):
    """Seed `s` and member `n` of a stacked module, from torch's own layers."""
    match module:
        case HiddenLayer():
            assert module.dropout.rate == 0
            assert module.skip is None
            norms = [] if module.norm is None else [separate(module.norm, s, n)]
            return nn.Sequential(separate(module.linear, s, n), *norms, nn.ReLU())
        case FanOut():
            out_dim = module.linear.weight.shape[-1] // module.num_members
            columns = slice(n * out_dim, (n + 1) * out_dim)
            return linear(module.linear.weight[s, 0, :, columns], module.linear.bias[s, 0, 0, columns])
        case Linear():
            return linear(module.weight[s, n], module.bias[s, n, 0])
        case BatchNorm():
            norm = nn.BatchNorm1d(module.weight.shape[-1]).double()
            norm.load_state_dict({name: tensor[s, n] for name, tensor in module.state_dict().items()}, strict=False)
            return norm
        case _:
            return nn.Sequential(*[separate(child, s, n) for child in module.children()])


def linear(weight_IO, bias_O):
    """Torch's own linear with these weights."""
    layer = nn.Linear(*weight_IO.shape).double()
    layer.load_state_dict({"weight": weight_IO.T, "bias": bias_O})
    return layer


def member_dropout(num_members, rate, form, *, seeds=1):
    """Model dropout in training."""
    return MemberDropout(Stack(seeds, num_members), rate, form).train()


def test_shapes(collective, x):
    """Logits for every seed and image; the members' features for every seed, member and image."""
    logits, parts = collective(x)

    assert logits.shape == (SEEDS, BATCH, NUM_CLASSES)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "experts": (SEEDS, 2, BATCH, SMALL.expert_output),
        "analysts": (SEEDS, 5, BATCH, SMALL.analyst_output),
    }


def test_one_input_serves_all_seeds(collective, x):
    """An evaluation hands its images over once."""
    collective.eval()

    torch.testing.assert_close(collective(x[:1])[0], collective(x[:1].repeat(SEEDS, 1, 1))[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_it_is_what_separate_networks_would_be(collective, x, training):
    """Logits, parts, gradients and running statistics agree with a loop over members built from torch's layers."""
    collective.train(training)
    references = [Reference(collective, s).train(training) for s in range(SEEDS)]
    x.requires_grad_()
    logits, parts = collective(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)

    for s, reference in enumerate(references):
        expected, expected_parts = reference(x[s])
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(logits[s], expected)
        torch.testing.assert_close(parts["experts"][s], expected_parts["experts"])
        torch.testing.assert_close(parts["analysts"][s], expected_parts["analysts"])
        torch.testing.assert_close(gradient[s], expected_gradient[s])
        torch.testing.assert_close(Reference(collective, s).state_dict(), without_counts(reference.state_dict()))


def without_counts(state):
    """The state of torch's layers as if no batch had been counted: the stacked norms do not count."""
    return {name: torch.zeros_like(v) if name.endswith("num_batches_tracked") else v for name, v in state.items()}


def test_gradients_reach_every_parameter(collective, x):
    """Every parameter of every seed is moved, and by finite amounts (in evaluation: norms hide biases before them)."""
    collective.eval()(x)[0].square().sum().backward()

    for name, parameter in collective.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.flatten(1).any(dim=1).all(), name


@pytest.mark.parametrize("form", ["per_image", "original"])
def test_gradients_are_finite_with_every_dropout(x, form):
    """Also where members, features and encoders are dropped, for the analysts' parts as for the logits."""
    torch.manual_seed(0)
    rates = {"member_dropout": 0.5, "encoder_dropout": 0.5, "head_dropout": 0.5}
    drop = ModelDropoutConfig(expert_rate=0.5, analyst_rate=0.5, form=form)
    collective = small_collective(**rates, model_dropout=drop).train()
    logits, parts = collective(x)
    (logits.square().sum() + sum(part.square().sum() for part in parts.values())).backward()

    assert all(parameter.grad.isfinite().all() for parameter in collective.parameters())


def test_images_do_not_depend_on_their_batch_in_eval(collective, x):
    """An image's logits are the same alone as among others."""
    collective.eval()

    torch.testing.assert_close(collective(x[:, :1])[0], collective(x)[0][:, :1])


def test_seeds_do_not_depend_on_each_other(collective, x):
    """Another input for one seed leaves the other seed's logits as they were, in training too."""
    before, other = collective(x)[0], x.clone()
    other[0] += 1
    after = collective(other)[0]

    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_analysts_see_the_raw_input(collective, x):
    """With the experts cut off, the logits still depend on the images."""
    with torch.no_grad():
        last = collective.expert_encoder.layers[-1]
        last.weight.zero_()
        last.bias.zero_()
    x.requires_grad_()
    logits = collective.eval()(x)[0]
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)

    assert gradient.any(dim=-1).all()
    assert logits.std(dim=1).all()


def test_analysts_hear_the_experts(collective, x):
    """With the image hidden from the analysts, the logits still depend on it, through the experts."""
    with torch.no_grad():
        for group in collective.analysts.groups:
            first = next(layer for layer in group.modules() if isinstance(layer, Linear))
            first.weight[:, :, :IN_DIM] = 0
    logits = collective.eval()(x)[0]

    assert logits.std(dim=1).all()


def test_members_come_out_in_their_own_order():
    """However shapes are grouped, the output at place n is member n's."""
    dims = [(5, 4, 3), (5, 6, 3), (5, 4, 3), (5, 4, 4, 3), (5, 6, 3), (5, 4, 3)]
    members = Members(SEEDS, dims, dropout=0.0)
    with torch.no_grad():
        for group, positions in zip(members.groups, ([0, 2, 5], [1, 4], [3]), strict=True):
            group.layers[-1].bias += torch.tensor(positions)[:, None, None]  # all weights are zero
    y = members(torch.randn(SEEDS, 1, BATCH, 5))

    assert y.shape == (SEEDS, len(dims), BATCH, 3)
    assert torch.equal(y, torch.arange(6.0).view(1, 6, 1, 1).expand_as(y))


def test_members_of_one_shape_are_one_batched_parameter():
    """There are as many groups as shapes."""
    members = Members(SEEDS, [(5, 4, 3), (5, 6, 3), (5, 4, 3)], dropout=0.0)

    assert [group.layers[-1].weight.shape[:2] for group in members.groups] == [(SEEDS, 2), (SEEDS, 1)]


def test_members_have_dropout_between_hidden_layers_only():
    """No dropout follows the last hidden layer."""
    members = Members(SEEDS, [(5, 4, 4, 4, 3), (5, 4, 4, 3)], dropout=0.3)
    rates = [[layer.rate for layer in group.modules() if isinstance(layer, Dropout)] for group in members.groups]

    assert rates == [[0.3, 0.3, 0.0], [0.3, 0.0]]


@pytest.mark.parametrize("form", ["per_image", "original"])
@pytest.mark.parametrize("num_members", [2, 3, 8])
def test_members_are_never_all_dropped(num_members, form):
    """Even at a rate near 1, something of every image passes."""
    torch.manual_seed(0)
    dropout = member_dropout(num_members, 0.99, form, seeds=3)
    for _ in range(20):
        y = dropout(torch.ones(3, num_members, 200, 2))

        assert (y != 0).any(dim=1).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("num_members", [2, 3, 6])
def test_dropping_members_keeps_the_expected_sum(num_members, rate):
    """Each member's mean over many images stays about 1."""
    torch.manual_seed(0)
    y = member_dropout(num_members, rate, "per_image")(torch.ones(1, num_members, 40_000, 1))

    assert y.mean(dim=2).flatten().tolist() == pytest.approx([1.0] * num_members, abs=0.06)


def test_the_last_member_left_is_anyone():
    """Where all would be dropped, each member is kept about equally often."""
    torch.manual_seed(0)
    y = member_dropout(4, 0.999, "per_image")(torch.ones(1, 4, 20_000, 1))

    assert (y != 0).float().mean(dim=2).flatten().tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_per_image_draws_for_every_image():
    """With the bits given: each image keeps what is above the threshold, or its largest; whole members at a time."""
    threshold = bits_below(0.5)
    bits_BN = [[threshold, threshold - 1], [threshold + 5, threshold + 9], [threshold - 9, threshold - 5]]
    dropout = member_dropout(2, 0.5, "per_image")
    dropout.draw.bits = torch.tensor(bits_BN, dtype=torch.int16).T.reshape(1, 2, 3, 1)
    kept_NB = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    x = torch.rand(1, 2, 3, 4)

    torch.testing.assert_close(dropout(x), x * kept_NB[None, :, :, None] / 0.625)  # kept: 1 - 1/2 + (1/2)^2 / 2


def test_the_original_form_draws_once_and_does_not_rescale():
    """One mask for the whole batch of a seed, values as they were or zero."""
    torch.manual_seed(0)
    x = 1 + torch.rand(200, 3, 5, 4)
    y = member_dropout(3, 0.5, "original", seeds=200)(x)
    kept_SNBE = y != 0

    assert torch.equal(kept_SNBE, kept_SNBE[:, :, :1, :1].expand_as(y))
    assert torch.equal(y[kept_SNBE], x[kept_SNBE])
    assert len(kept_SNBE[:, :, 0, 0].unique(dim=0)) == 7  # all masks but the empty one


@pytest.mark.parametrize(("form", "zeros"), [("per_image", False), ("original", True)])
def test_zeros_reach_the_parts_in_the_original_form_only(x, form, zeros):
    """What the losses see as members' features: whole per image, with the zeros in the original form."""
    torch.manual_seed(0)
    drop = ModelDropoutConfig(expert_rate=0.9, analyst_rate=0.9, form=form)
    parts = small_collective(model_dropout=drop).train()(x)[1]

    for part in parts.values():
        assert bool((part == 0).all(dim=-1).any()) == zeros


@pytest.mark.parametrize("form", ["per_image", "original"])
def test_no_member_is_dropped_in_eval(x, form):
    """Model dropout is for training alone."""
    drop = ModelDropoutConfig(expert_rate=0.9, analyst_rate=0.9, form=form)

    torch.testing.assert_close(small_collective(model_dropout=drop).eval()(x), small_collective().eval()(x))


@pytest.mark.parametrize("form", ["per_image", "original"])
@pytest.mark.parametrize(("num_members", "rate"), [(1, 0.9), (3, 0.0)])
def test_a_single_member_and_rate_0_are_never_dropped(num_members, rate, form):
    """The features pass untouched in training too, and no random numbers are asked for."""
    dropout = member_dropout(num_members, rate, form, seeds=SEEDS)
    x = torch.rand(SEEDS, num_members, BATCH, 3)

    assert torch.equal(dropout(x), x)
    assert not [module for module in dropout.modules() if isinstance(module, RandomBits)]


@pytest.mark.parametrize("form", ["per_image", "original"])
def test_model_dropout_changes_the_logits(x, form):
    """The members' dropped outputs are what the encoders read."""
    torch.manual_seed(0)
    drop = ModelDropoutConfig(expert_rate=0.5, form=form)
    dropped, whole = small_collective(model_dropout=drop).train()(x)[0], small_collective().train()(x)[0]

    assert not torch.allclose(dropped, whole)
