"""Every measure of members equals its definition, written slowly for one seed and one pair, and has its extremes."""

import numpy as np
import pytest
import torch

from collective_pipeline.config import CollectiveConfig
from collective_pipeline.evaluation.members import (
    IMAGES_AT_ONCE,
    ablation_drops,
    agreement,
    linear_cka,
    member_outputs,
    probe_predictions,
)
from collective_pipeline.models.build import build_model, initialise
from collective_pipeline.models.layers import concat_members
from collective_pipeline.randomness import make_generator

SEEDS, IMAGES, IN_DIM, CLASSES = 2, 60, 9, 3
KINDS = {
    "plain": {},
    "varied": {"vary_expert_architectures": True, "vary_analyst_architectures": True},
    "encoded": {"analyst_encoder": True, "head": "encoder_head", "adaptive_collective_min_dim": 8},
}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request):
    config = CollectiveConfig(
        n_total=6,
        n_experts=3,
        expert_hidden=(12, 8),
        expert_output=6,
        analyst_hidden=(10, 6),
        analyst_output=4,
        **request.param,
    )
    model = build_model(config, in_dim=IN_DIM, num_classes=CLASSES, num_seeds=SEEDS)
    initialise(model, [make_generator(seed, "weights") for seed in range(SEEDS)])
    return model


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x():
    return noise(1, IMAGES, IN_DIM)


@pytest.fixture
def labels():
    return torch.arange(IMAGES) % CLASSES


def test_outputs_are_those_of_the_forward_pass_whatever_their_number(model):
    """Images in pieces give what they give at once, without dropout, for every seed and member."""
    many = noise(1, IMAGES_AT_ONCE + 5, IN_DIM)
    logits, parts = member_outputs(model.train(), many)
    with torch.no_grad():
        expected, expected_parts = model.eval()(many)

    torch.testing.assert_close(logits, expected)
    assert parts.keys() == expected_parts.keys() == {"experts", "analysts"}
    for name, part in parts.items():
        torch.testing.assert_close(part, expected_parts[name])
        assert part.shape[:3] == (SEEDS, 3, IMAGES_AT_ONCE + 5)


def test_cka_is_its_definition():
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels, centred by a matrix; widths may differ."""
    wide, narrow = noise(SEEDS, 3, IMAGES, 5) + 3, noise(SEEDS, 2, IMAGES, 4, seed=1)
    centring = np.eye(IMAGES) - 1 / IMAGES

    def hsic(a, b):
        return np.trace(a @ a.T @ centring @ b @ b.T @ centring)

    for seed, cka in enumerate(linear_cka(wide, narrow)):
        members = [*wide[seed].double().numpy(), *narrow[seed].double().numpy()]
        expected = [[hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)) for b in members] for a in members]
        np.testing.assert_allclose(cka, expected)


def test_cka_ignores_rotation_scale_and_offset_and_is_0_for_what_is_uncorrelated():
    """1 for the same features otherwise written down, 0 for other ones."""
    basis, _ = torch.linalg.qr(torch.cat([torch.ones(IMAGES, 1), noise(IMAGES, 8)], dim=1))
    one, other = basis[:, 1:5], basis[:, 5:9]
    rotation, _ = torch.linalg.qr(noise(4, 4, seed=1))
    cka = linear_cka(torch.stack([one, 7 * one @ rotation + 2, other]).unsqueeze(0))

    torch.testing.assert_close(cka[0], torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]]).double(), atol=1e-6, rtol=0)


def test_cka_of_a_silent_member_is_undefined():
    """NaN beside any other, and nothing else is."""
    features = noise(1, 3, IMAGES, 4)
    features[:, 1] = 2.0
    undefined = linear_cka(features)[0].isnan()

    assert undefined[1].all() and undefined[:, 1].all() and undefined.sum() == 5


def test_a_probe_reads_what_is_there_and_no_more():
    """Classes that planes divide are all found; of a silent member only the most frequent class is known."""
    labels = torch.tensor([0, 1, 2, 2] * 15)
    told = noise(1, 1, IMAGES, 4) + 50 * torch.nn.functional.one_hot(labels, 4)
    features = torch.cat([told, torch.full_like(told, 3.0)], dim=1)
    predictions, probabilities = (told[0] for told in probe_predictions(features, labels, features))

    assert torch.equal(predictions[0], labels) and (probabilities[0] > 0.9).all()
    assert predictions[1].tolist() == [2] * IMAGES
    assert probabilities[1].tolist() == pytest.approx([0.5] * IMAGES, abs=1e-3)


def test_a_probe_is_fitted_on_the_training_images_of_one_member(labels):
    """Its predictions do not change with the other members and seeds, nor with the other images to predict."""
    train, test = noise(SEEDS, 2, IMAGES, 5), noise(SEEDS, 2, 40, 5, seed=1)
    train[..., 0] += labels
    predictions, _ = probe_predictions(train, labels, test)

    assert predictions.shape == (SEEDS, 2, 40) and predictions.dtype == torch.int64
    assert not torch.equal(predictions[0, 0], predictions[1, 1])
    for seed in range(SEEDS):
        for member in range(2):
            one = slice(seed, seed + 1), slice(member, member + 1)
            alone, _ = probe_predictions(train[one], labels, test[one][:, :, :10])
            assert torch.equal(alone[0, 0], predictions[seed, member, :10])


def test_agreement_counts_equal_predictions():
    """100 with itself, and otherwise the percentage of equal entries."""
    predictions = torch.randint(CLASSES, (SEEDS, 4, IMAGES), generator=torch.Generator().manual_seed(0))
    for seed, table in enumerate(agreement(predictions)):
        for i, row in enumerate(table.tolist()):
            for j, percent in enumerate(row):
                same = sum(a == b for a, b in zip(predictions[seed, i], predictions[seed, j], strict=True))
                assert percent == pytest.approx(100 * same / IMAGES)


def test_ablation_replaces_one_member_by_its_mean(model, x, labels):
    """Each drop is that of the equations with one output held at its mean, written out; the model is as before."""
    before = member_outputs(model, x)[0]
    drops = ablation_drops(model, x, labels)

    def accuracy(experts, analysts_of):
        h = model.expert_encoder(concat_members(experts))
        analysts = analysts_of(model.analysts(torch.cat([x.unsqueeze(1).expand(SEEDS, 1, -1, -1), h], dim=-1)))
        logits = model.head(model.analyst_encoder(concat_members(analysts))).squeeze(1)
        return 100 * (logits.argmax(-1) == labels).double().mean(1)

    def silence(features, member):
        silenced = features.clone()
        silenced[:, member] = features[:, member].mean(dim=1, keepdim=True)
        return silenced

    with torch.no_grad():
        experts = model.experts(x.unsqueeze(1))
        whole = accuracy(experts, lambda analysts: analysts)
        for member in range(3):
            without = accuracy(silence(experts, member), lambda analysts: analysts)
            torch.testing.assert_close(drops["experts"][:, member], whole - without)
            without = accuracy(experts, lambda analysts, member=member: silence(analysts, member))
            torch.testing.assert_close(drops["analysts"][:, member], whole - without)
    assert any(drop.any() for drop in drops.values())
    assert torch.equal(member_outputs(model, x)[0], before)


def test_a_member_that_says_nothing_is_not_missed(model, x, labels):
    """Without weights its output never changes, so nothing is lost with it."""
    with torch.no_grad():
        for parameter in model.analysts.groups[0].parameters():
            parameter[:, 0] = 0
    silent = model.analysts.positions[0][0]

    assert ablation_drops(model, x, labels)["analysts"][:, silent].tolist() == [0.0] * SEEDS
