"""Every loss on a mixture's gates is its definition, and its gradient is what finite differences say."""

import math

import pytest
import torch

from collective_pipeline.config import MixtureArchitecture, RoutingLossConfig
from collective_pipeline.training.losses import make_objective
from collective_pipeline.training.routing_losses import TERMS

SEEDS, BATCH, EXPERTS = 2, 8, 3


def make_gates(num_experts=EXPERTS, batch=BATCH, starved=2.0):
    """Gates that sum to 1 in double precision; the last expert is used e^-starved as much as it would be."""
    z_SBN = torch.randn(SEEDS, batch, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_SBN[..., -1] -= starved
    return z_SBN.softmax(dim=-1).requires_grad_()


def value(name, gates):
    return TERMS[name](None, {"gates": gates}, None)


def one_hot(*experts):
    """Gates of one seed that choose these experts, image by image."""
    return torch.eye(EXPERTS)[list(experts)].unsqueeze(0)


def by_hand(name, g):
    """Image by image and pair by pair, for the gates of one seed as nested lists."""
    num_images, num_experts = len(g), len(g[0])
    experts, usage = range(num_experts), [sum(column) / num_images for column in zip(*g, strict=True)]
    pairs = [(j, k) for j in experts for k in experts if j != k]
    covariance = {
        (j, k): sum((row[j] - usage[j]) * (row[k] - usage[k]) for row in g) / num_images
        for j in experts
        for k in experts
    }
    softmax_of_sums = torch.tensor([num_images * u for u in usage], dtype=torch.float64).softmax(dim=0).tolist()
    return {
        "diversity": sum(row[j] * row[k] for row in g for j, k in pairs) / num_images,
        "balance": sum((1 / num_experts - u) ** 2 for u in usage),
        "min_usage": sum(max(0, 0.3 / num_experts - u) for u in usage),
        "decorrelation": sum(covariance[pair] ** 2 for pair in pairs) / 2,
        "legacy_diversity": -sum(x * math.log(x + 1e-6) for row in g for x in row) / num_images,
        "legacy_balance": sum(math.log(1 / num_experts / p) for p in softmax_of_sums) / num_experts**2,
        "legacy_min_usage": sum(max(0, 0.1 - min(row)) for row in g) / num_images,
        "legacy_correlation": sum(row[j] * row[k] for row in g for j in experts for k in experts) / num_experts**2,
    }[name]


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("num_experts", [2, 5])
def test_a_term_is_its_definition_for_each_seed(name, num_experts):
    gates = make_gates(num_experts)

    assert value(name, gates).tolist() == pytest.approx([by_hand(name, seed) for seed in gates.tolist()], abs=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences(name):
    gates = make_gates(starved=4.0)

    assert torch.autograd.gradcheck(lambda g: value(name, g), gates)
    (gradient,) = torch.autograd.grad(value(name, gates).sum(), gates)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in TERMS if name != "legacy_correlation"])
def test_every_term_but_one_reaches_the_logits_of_the_gates(name):
    z = make_gates(starved=4.0).detach().log().requires_grad_()
    (gradient,) = torch.autograd.grad(value(name, z.softmax(dim=-1)).sum(), z)

    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize(("batch", "num_experts"), [(32, 3), (8, 5)])
def test_the_legacy_correlation_is_constant(batch, num_experts):
    """The original adds it to its loss, where it does nothing: it is B / E^2 whatever the gates are."""
    z = make_gates(num_experts, batch).detach().log().requires_grad_()
    correlation = value("legacy_correlation", z.softmax(dim=-1))
    (gradient,) = torch.autograd.grad(correlation.sum(), z)

    assert correlation.tolist() == pytest.approx([batch / num_experts**2] * SEEDS)
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("name", TERMS)
def test_only_legacy_terms_depend_on_the_size_of_the_batch(name):
    gates = make_gates(starved=4.0)
    ratio = value(name, gates.repeat(1, 4, 1)) / value(name, gates)

    if name in {"legacy_balance", "legacy_correlation"}:
        assert (ratio > 2).all()
    else:
        assert ratio.tolist() == pytest.approx([1] * SEEDS)


def test_the_legacy_balance_is_as_steep_as_the_originals():
    for usage, known in (((12, 10, 10), 0.158), ((16, 8, 8), 1.41), ((30, 1, 1), 6.08)):
        assert value("legacy_balance", torch.tensor([[usage]], dtype=torch.float64)).item() == pytest.approx(
            known, rel=5e-3
        )


def test_sharp_and_even_routing_costs_nothing():
    """What the four terms ask for can be had at once; the original's minimum usage forbids it."""
    ideal = one_hot(0, 1, 2, 2, 1, 0)

    for name in ("diversity", "balance", "min_usage"):
        assert value(name, ideal).item() == pytest.approx(0, abs=1e-6)
    assert value("legacy_min_usage", ideal).item() == pytest.approx(0.1)


def test_collapse_on_one_expert_costs_balance_and_usage():
    collapsed = one_hot(0, 0, 0)

    assert value("diversity", collapsed).item() == pytest.approx(0, abs=1e-6)
    assert value("balance", collapsed).item() == pytest.approx(2 / 3)
    assert value("min_usage", collapsed).item() == pytest.approx(0.2)


def test_the_objective_weighs_the_terms_by_name():
    weights = dict.fromkeys(RoutingLossConfig.model_fields, 0.0) | {"balance": 0.5, "legacy_diversity": 0.1}
    mixture = MixtureArchitecture(image_shape=(1, 4, 4), losses=RoutingLossConfig(**weights))
    gates, labels = make_gates().float(), torch.zeros(SEEDS, BATCH, dtype=torch.int64)
    losses = make_objective(mixture, 0.0)(torch.zeros(SEEDS, BATCH, 4), {"gates": gates}, labels)

    assert losses.keys() == {"loss", "cross_entropy", "routing_balance", "routing_legacy_diversity"}
    total = losses["cross_entropy"] + 0.5 * losses["routing_balance"] + 0.1 * losses["routing_legacy_diversity"]
    assert torch.allclose(losses["loss"], total)


def test_every_term_has_a_weight():
    assert TERMS.keys() == RoutingLossConfig.model_fields.keys()
