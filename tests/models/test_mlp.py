"""Multilayer perceptrons are their textbook layers in order, for every seed and member."""

import pytest
import torch
from torch import nn

from collective_pipeline.models.build import initialise
from collective_pipeline.models.layers import Dropout, FanOut, Linear, Stack
from collective_pipeline.models.mlp import Classifier, HiddenLayer, Mlp
from collective_pipeline.randomness import make_generator

SEEDS, BATCH = 2, 12
DIMS = (7, 6, 6, 5, 4)
NETWORKS = {
    "plain": lambda rate=0.0: Classifier(Mlp(Stack(SEEDS), DIMS, dropout=[rate] * 3)),
    "residual": lambda rate=0.0: Classifier(Mlp(Stack(SEEDS), DIMS, dropout=[rate] * 3, residual=True)),
}


@pytest.fixture(params=NETWORKS.values(), ids=list(NETWORKS))
def network(request):
    """A small network of either kind, with random weights, biases and statistics."""
    return randomised(request.param())


@pytest.fixture
def x():
    """A batch of images for every seed."""
    return torch.randn(SEEDS, BATCH, DIMS[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomised(module):
    """The module in double precision: its weights drawn, biases, norms and statistics moved off their defaults."""
    initialise(module, [make_generator(seed, "weights") for seed in range(SEEDS)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.double().state_dict().items():
            if not name.endswith("weight") or tensor.dim() == 3:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return module


def linear_of(layer, s, n=0):
    """Torch's own linear with the weights of seed `s` and member `n`."""
    if isinstance(layer, FanOut):
        weight_INO = layer.linear.weight[s, 0].unflatten(1, (layer.num_members, -1))
        weight_IO, bias_O = weight_INO[:, n], layer.linear.bias[s, 0, 0].unflatten(0, (layer.num_members, -1))[n]
    else:
        weight_IO, bias_O = layer.weight[s, n], layer.bias[s, n, 0]
    single = nn.Linear(*weight_IO.shape).double()
    single.load_state_dict({"weight": weight_IO.T, "bias": bias_O})
    return single


def norm_of(layer, s, n=0):
    """Torch's own batch norm with the weights and statistics of seed `s` and member `n`."""
    single = nn.BatchNorm1d(layer.weight.shape[-1]).double()
    single.load_state_dict({name: tensor[s, n] for name, tensor in layer.state_dict().items()}, strict=False)
    return single


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("normalise", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("num_members", [1, 3])
def test_an_mlp_is_linear_norm_relu_and_a_last_linear(x, num_members, normalise, training):
    """The stack agrees with torch's own layers in this order, in training without dropout as in evaluation."""
    mlp = randomised(Mlp(Stack(SEEDS, num_members), DIMS, dropout=[0.0] * 3, normalise=normalise)).train(training)
    *hidden, last = mlp.layers
    references = {}
    for s in range(SEEDS):
        for n in range(num_members):
            layers = []
            for layer in hidden:
                norms = [norm_of(layer.norm, s, n)] if normalise else []
                layers += [linear_of(layer.linear, s, n), *norms, nn.ReLU()]
            references[s, n] = nn.Sequential(*layers, linear_of(last, s, n)).train(training)
    y = mlp(x.unsqueeze(1))

    assert len(hidden) == 3
    assert [*y.shape] == [SEEDS, num_members, BATCH, DIMS[-1]]
    for (s, n), reference in references.items():
        torch.testing.assert_close(y[s, n], reference(x[s]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("out_dim", [7, 5], ids=["same_width", "other_width"])
def test_a_residual_layer_adds_what_it_skips(x, out_dim, training):
    """relu(norm(W x) + skip(x)): the skip is x itself where the widths agree, a linear where they do not."""
    layer = randomised(HiddenLayer(Stack(SEEDS), 7, out_dim, dropout=0.0, residual=True)).train(training)
    norms = [norm_of(layer.norm, s).train(training) for s in range(SEEDS)]  # before ours learn from the batch
    y = layer(x.unsqueeze(1))

    assert isinstance(layer.skip, nn.Identity) == (out_dim == 7)
    for s, norm in enumerate(norms):
        skipped = x[s] if out_dim == 7 else linear_of(layer.skip, s)(x[s])
        expected = torch.relu(norm(linear_of(layer.linear, s)(x[s])) + skipped)
        torch.testing.assert_close(y[s, 0], expected)


def test_a_residual_mlp_is_its_layers_in_order(x):
    """Residual layers through the hidden widths, then one linear."""
    network = randomised(Mlp(Stack(SEEDS), DIMS, dropout=[0.0] * 3, residual=True)).eval()
    *hidden, last = network.layers
    y = x.unsqueeze(1)
    for layer in hidden:
        y = layer(y)

    assert [type(layer.skip) for layer in hidden] == [Linear, nn.Identity, Linear]
    for s in range(SEEDS):
        torch.testing.assert_close(network(x.unsqueeze(1))[s, 0], linear_of(last, s)(y[s, 0]))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_dropout_is_the_last_of_a_hidden_layer(x, residual):
    """Features are zero or, whole with what was skipped, scaled: in training alone."""
    torch.manual_seed(0)
    layer, whole = (
        randomised(HiddenLayer(Stack(SEEDS), 7, 5, dropout=rate, residual=residual)).train() for rate in (0.5, 0.0)
    )
    y, expected = layer(x.unsqueeze(1)), whole(x.unsqueeze(1))
    kept = y != 0

    torch.testing.assert_close(y, 2 * expected * kept)
    assert 0.2 < kept[expected > 0].double().mean().item() < 0.8
    torch.testing.assert_close(layer.eval()(x.unsqueeze(1)), whole.eval()(x.unsqueeze(1)))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("rates", [[0.1, 0.2, 0.0], [0.3, 0.3, 0.3]])
def test_every_hidden_layer_has_its_rate_of_dropout(rates, residual):
    """The rates stand where they were asked for, and nowhere after the last linear."""
    mlp = Mlp(Stack(SEEDS), DIMS, dropout=rates, residual=residual)

    assert [layer.rate for layer in mlp.modules() if isinstance(layer, Dropout)] == rates
    assert isinstance(mlp.layers[-1], Linear)


def test_a_rate_is_wanted_for_every_hidden_layer():
    """Too few rates are an error, not layers without dropout."""
    with pytest.raises(ValueError, match="zip"):
        Mlp(Stack(1), DIMS, dropout=[0.1])


def test_members_read_one_shared_input(x):
    """A stack of members gives one output for each member and seed."""
    mlp = Mlp(Stack(SEEDS, 3), DIMS, dropout=[0.0] * 3).double()

    assert mlp(x.unsqueeze(1)).shape == (SEEDS, 3, BATCH, DIMS[-1])


def test_a_classifier_gives_logits_and_no_parts(network, x):
    """Logits for every seed and image."""
    logits, parts = network(x)

    assert logits.shape == (SEEDS, BATCH, DIMS[-1])
    assert not parts


def test_gradients_reach_every_parameter(network, x):
    """Every parameter of every seed is moved, and by finite amounts (in evaluation: norms hide biases before them)."""
    network.eval()(x)[0].square().sum().backward()

    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.flatten(1).any(dim=1).all(), name


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_gradients_are_finite_in_training(make, x):
    """Also with dropout."""
    torch.manual_seed(0)
    network = randomised(make(rate=0.5)).train()
    network(x)[0].square().sum().backward()

    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_images_do_not_depend_on_their_batch_in_eval(network, x):
    """An image's logits are the same alone as among others."""
    network.eval()

    torch.testing.assert_close(network(x[:, :1])[0], network(x)[0][:, :1])


def test_seeds_do_not_depend_on_each_other(network, x):
    """Another input for one seed leaves the other seed's logits as they were, in training too."""
    before, other = network(x)[0], x.clone()
    other[0] += 1
    after = network(other)[0]

    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
