"""Every loss term is its definition, for each seed alone."""

import pytest
import torch
import torch.nn.functional as F

from collective_pipeline.config import (
    CollectiveConfig,
    DiversityConfig,
    GateConfig,
    MlpArchitecture,
    ResNetArchitecture,
)
from collective_pipeline.training.losses import (
    cross_entropy,
    diversity,
    embedding_cross_entropy,
    gate_l1,
    legacy_matrix1,
    make_objective,
    member_cross_entropy,
    open_gates,
    reconstruction,
    weighted_sum,
)

SEEDS, MEMBERS, BATCH, FEATURES, CLASSES = 3, 4, 10, 6, 5


@pytest.fixture
def random():
    """A source of numbers that is the same in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def logits(random):
    """Logits of every seed and image, that a gradient can reach."""
    return torch.randn(SEEDS, BATCH, CLASSES, generator=random).requires_grad_()


@pytest.fixture
def labels(random):
    """Another batch for every seed."""
    return torch.randint(CLASSES, (SEEDS, BATCH), generator=random)


@pytest.fixture
def features(random):
    """Members' features, that a gradient can reach."""
    return torch.randn(SEEDS, MEMBERS, BATCH, FEATURES, generator=random).requires_grad_()


def slow_diversity(features_NBE, temperature):
    """Pair by pair and image by image: mean over pairs of |mean over the batch of their cosine| / temperature."""
    num_members, batch, _ = features_NBE.shape
    pairs = []
    for i in range(num_members):
        for j in range(i + 1, num_members):
            cosines = [F.cosine_similarity(features_NBE[i, b], features_NBE[j, b], dim=0) for b in range(batch)]
            pairs.append(abs(sum(cosines) / batch))
    return 2 / (num_members * (num_members - 1)) * sum(pairs) / temperature


def diversity_of(features, temperature=1.0):
    """The term on these features: it reads neither logits nor labels."""
    return diversity("experts", temperature)(None, {"experts": features}, None)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_for_every_seed(logits, labels, label_smoothing):
    """One value a seed, the mean over its own batch, smoothed as asked for."""
    loss = cross_entropy(label_smoothing)(logits, {}, labels)

    assert loss.shape == (SEEDS,)
    for s in range(SEEDS):
        expected = F.cross_entropy(logits[s], labels[s], label_smoothing=label_smoothing)
        torch.testing.assert_close(loss[s], expected)


def test_label_smoothing_asks_for_less_certainty(labels):
    """Certain and right: no loss without smoothing, some with it."""
    certain = 100 * F.one_hot(labels, CLASSES).float()

    assert cross_entropy()(certain, {}, labels).max().item() == pytest.approx(0)
    assert cross_entropy(0.1)(certain, {}, labels).min().item() > 1


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_member_cross_entropy_is_the_mean_over_members(random, labels, label_smoothing):
    """Each member's own logits against the labels that all of them share."""
    member_logits = torch.randn(SEEDS, MEMBERS, BATCH, CLASSES, generator=random)
    loss = member_cross_entropy("experts", label_smoothing)(None, {"experts": member_logits}, labels)

    assert loss.shape == (SEEDS,)
    for s in range(SEEDS):
        losses = [F.cross_entropy(x, labels[s], label_smoothing=label_smoothing) for x in member_logits[s]]
        torch.testing.assert_close(loss[s], sum(losses) / MEMBERS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_members", [2, 3, MEMBERS])
def test_diversity_is_the_slow_double_loop(features, num_members, temperature):
    """Value and gradient agree with the definition written as loops over pairs and images."""
    loss = diversity_of(features[:, :num_members], temperature)
    slow = torch.stack([slow_diversity(seed[:num_members], temperature) for seed in features])

    assert loss.shape == (SEEDS,)
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), features)[0] for value in (loss, slow)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_identical_members_give_1_over_temperature(features, temperature):
    """However many there are, and whatever their lengths."""
    alike = features[:, :1] * torch.arange(1.0, MEMBERS + 1).view(-1, 1, 1)

    torch.testing.assert_close(diversity_of(alike, temperature), torch.full((SEEDS,), 1 / temperature))


def test_opposite_members_are_as_bad_as_identical_ones(features):
    """It is the size of the cosine that counts."""
    opposite = torch.stack([features[:, 0], -features[:, 0]], dim=1)

    torch.testing.assert_close(diversity_of(opposite), torch.ones(SEEDS))


def test_agreement_and_disagreement_cancel_within_a_batch(features):
    """The size is taken of the mean over the batch, as in the original."""
    sign = torch.ones(BATCH, 1)
    sign[: BATCH // 2] = -1
    half_opposite = torch.stack([features[:, 0], sign * features[:, 0]], dim=1)

    torch.testing.assert_close(diversity_of(half_opposite), torch.zeros(SEEDS), rtol=0, atol=1e-6)


def test_orthogonal_members_give_0():
    """Each looks in a direction of its own."""
    axes = torch.eye(MEMBERS).view(1, MEMBERS, 1, MEMBERS).expand(SEEDS, -1, BATCH, -1)

    torch.testing.assert_close(diversity_of(axes), torch.zeros(SEEDS))


def test_a_single_member_gives_0(features):
    """There is no pair to disagree."""
    assert torch.equal(diversity_of(features[:, :1]), torch.zeros(SEEDS))


def test_a_dropped_member_counts_as_orthogonal(features):
    """Zeroed features, as the original model dropout hands them on, have finite loss and gradient."""
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(-1, 1, 1)
    loss = diversity_of(features * mask)
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    kept_pairs = 3 / 6  # 3 of the 6 pairs have no dropped member

    torch.testing.assert_close(loss, kept_pairs * diversity_of(features[:, [0, 1, 3]]))
    assert gradient.isfinite().all()


def test_reconstruction_is_the_mean_squared_error_of_every_seed(features, random):
    """Over members, images and features alike; 0 where nothing was lost."""
    original = torch.randn(features.shape, generator=random)
    loss = reconstruction(None, {"reconstruction": features, "original": original}, None)

    assert loss.shape == (SEEDS,)
    for s in range(SEEDS):
        torch.testing.assert_close(loss[s], F.mse_loss(features[s], original[s]))
    assert not reconstruction(None, {"reconstruction": original, "original": original}, None).any()


@pytest.mark.parametrize("name", ["cross_entropy", "diversity"])
def test_a_seed_does_not_depend_on_its_neighbours(logits, features, labels, name):
    """The gradient of one seed's loss is nothing for the others."""
    terms = {"cross_entropy": (cross_entropy(), logits), "diversity": (diversity("experts"), features)}
    term, reached = terms[name]
    loss = term(logits, {"experts": features}, labels)
    (gradient,) = torch.autograd.grad(loss[1], reached)

    assert gradient[1].any()
    assert not gradient[[0, 2]].any()


def test_weighted_sum_weighs_and_names_its_terms(logits, features, labels):
    """The loss is the weighted sum, and each term stands beside it as it is."""
    terms = {"cross_entropy": (1.0, cross_entropy()), "experts_diversity": (0.25, diversity("experts", 2.0))}
    values = weighted_sum(terms)(logits, {"experts": features}, labels)
    alone = {name: term(logits, {"experts": features}, labels) for name, (_, term) in terms.items()}

    assert list(values) == ["loss", *terms]
    torch.testing.assert_close(values["loss"], alone["cross_entropy"] + 0.25 * alone["experts_diversity"])
    for name, value in alone.items():
        torch.testing.assert_close(values[name], value)


def test_a_term_of_weight_0_is_logged_and_harms_neither_loss_nor_gradient(logits, labels):
    """Not even where what it reads is infinite."""
    gates = torch.full((*labels.shape, 4), torch.inf)
    terms = {"cross_entropy": (1.0, cross_entropy()), "gate_sparsity": (0.0, gate_l1)}
    values = weighted_sum(terms)(logits, {"gates": gates}, labels)
    (gradient,) = torch.autograd.grad(values["loss"].sum(), logits)

    torch.testing.assert_close(values["loss"], values["cross_entropy"])
    assert gradient.isfinite().all() and values["gate_sparsity"].isinf().all()


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        (MlpArchitecture(hidden_dims=(8, 6)), []),
        (CollectiveConfig(), []),
        (CollectiveConfig(expert_diversity=DiversityConfig(weight=0.1)), ["experts_diversity"]),
        (CollectiveConfig(analyst_diversity=DiversityConfig(weight=0.1)), ["analysts_diversity"]),
        (
            CollectiveConfig(
                expert_diversity=DiversityConfig(weight=0.1), analyst_diversity=DiversityConfig(weight=0.2)
            ),
            ["experts_diversity", "analysts_diversity"],
        ),
    ],
    ids=["mlp", "off", "experts", "analysts", "both"],
)
def test_the_objective_has_the_terms_that_are_weighed(architecture, names, logits, features, labels):
    """Cross-entropy always; diversity where its weight is not 0."""
    parts = {"experts": features, "analysts": features[:, :3]}
    values = make_objective(architecture, 0.0)(logits, parts, labels)

    assert list(values) == ["loss", "cross_entropy", *names]


def test_the_objective_uses_every_knob(logits, features, labels):
    """Weights and temperatures of both terms, and label smoothing."""
    config = CollectiveConfig(
        expert_diversity=DiversityConfig(weight=0.1, temperature=2.0),
        analyst_diversity=DiversityConfig(weight=0.3, temperature=0.5),
    )
    analysts = features[:, :3]
    loss = make_objective(config, 0.2)(logits, {"experts": features, "analysts": analysts}, labels)["loss"]
    expected = (
        cross_entropy(0.2)(logits, {}, labels) + 0.1 * diversity_of(features, 2) + 0.3 * diversity_of(analysts, 0.5)
    )

    torch.testing.assert_close(loss, expected)


CHANNELS = (4, 3)


@pytest.fixture
def gates(random):
    """Of two layers, in double precision: about half are shut, as ReLU leaves them, and no two are the same."""
    return torch.randn(SEEDS, BATCH, sum(CHANNELS), generator=random, dtype=torch.float64).relu().requires_grad_()


def of_gates(term):
    """The term as a function of the gates alone."""
    return lambda gates: term(None, {"gates": gates}, None)


GATE_TERMS = {"l1": of_gates(gate_l1), "matrix1": of_gates(legacy_matrix1(CHANNELS))}


def test_gate_l1_is_the_mean_over_images_of_their_gates(gates):
    """It does not depend on the size of the batch; the original's does."""
    loss = GATE_TERMS["l1"](gates)
    twice = torch.cat([gates, gates], dim=1)

    for s in range(SEEDS):
        torch.testing.assert_close(loss[s], sum(image.sum() for image in gates[s]) / BATCH)
    torch.testing.assert_close(GATE_TERMS["l1"](twice), loss)
    torch.testing.assert_close(GATE_TERMS["matrix1"](twice), 2 * GATE_TERMS["matrix1"](gates))


def test_legacy_matrix1_is_torchs_matrix_norm_of_every_layer(gates):
    """Channels are columns, images are rows; layers are summed."""
    loss = GATE_TERMS["matrix1"](gates)

    for s in range(SEEDS):
        expected = sum(torch.linalg.matrix_norm(layer, ord=1) for layer in gates[s].split(CHANNELS, dim=1))
        torch.testing.assert_close(loss[s], expected)


def test_l1_reaches_every_open_gate_and_matrix1_one_channel_of_a_layer(gates):
    """Shut gates are left alone by both."""
    is_open = gates > 0
    reached = {name: torch.autograd.grad(term(gates).sum(), gates)[0] != 0 for name, term in GATE_TERMS.items()}

    assert torch.equal(reached["l1"], is_open)
    for seed, seed_open in zip(reached["matrix1"], is_open, strict=True):
        for layer, layer_open in zip(seed.split(CHANNELS, dim=1), seed_open.split(CHANNELS, dim=1), strict=True):
            (channel,) = layer.any(dim=0).nonzero()
            assert torch.equal(layer[:, channel], layer_open[:, channel])


@pytest.mark.parametrize("name", GATE_TERMS)
def test_gate_terms_have_the_gradients_of_finite_differences(name, random):
    """Away from the corners at 0."""
    gates = torch.rand(SEEDS, BATCH, sum(CHANNELS), generator=random, dtype=torch.float64) + 0.1

    assert torch.autograd.gradcheck(GATE_TERMS[name], gates.requires_grad_())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_embedding_cross_entropy_is_that_of_its_own_logits(logits, labels, label_smoothing):
    """The network's are not read; the gradient is that of finite differences."""
    term = embedding_cross_entropy(label_smoothing)
    loss = term(None, {"embedding_logits": logits}, labels)

    torch.testing.assert_close(loss, cross_entropy(label_smoothing)(logits, {}, labels))
    assert torch.autograd.gradcheck(
        lambda own: term(None, {"embedding_logits": own}, labels), logits.detach().double().requires_grad_()
    )


def test_open_gates_are_counted_in_percent():
    """Of all layers together, for every seed."""
    gates = torch.tensor([[[0.0, 2.0, 0.5, 0.0]], [[1.0, 1.0, 1.0, 0.0]]])

    assert of_gates(open_gates)(gates).tolist() == [50.0, 75.0]


@pytest.mark.parametrize("sparsity", ["l1", "legacy_matrix1"])
def test_a_gated_networks_objective_weighs_its_terms(sparsity, logits, labels, random):
    """By lambda and mu; in the second stage both are only logged."""
    gates = GateConfig(lambda_val=0.3, mu=0.7, sparsity=sparsity)
    architecture = ResNetArchitecture(image_shape=(1, 4, 4), blocks=(1,), width=2, gated=(0, 1), gates=gates)
    parts = {
        "gates": torch.rand(SEEDS, BATCH, 4, generator=random),
        "embedding_logits": torch.randn(SEEDS, BATCH, CLASSES, generator=random),
    }
    term = gate_l1 if sparsity == "l1" else legacy_matrix1((2, 2))
    first = make_objective(architecture, 0.0)(logits, parts, labels)
    second = make_objective(architecture, 0.0, gates_learn=False)(logits, parts, labels)

    own = cross_entropy()(logits, {}, labels)
    auxiliary = 0.3 * term(None, parts, None) + 0.7 * embedding_cross_entropy()(None, parts, labels)
    torch.testing.assert_close(first["loss"], own + auxiliary)
    torch.testing.assert_close(second["loss"], own)
    assert first.keys() == second.keys() >= {"gate_sparsity", "embedding_cross_entropy", "open_gates"}
    torch.testing.assert_close(second["gate_sparsity"], first["gate_sparsity"])
