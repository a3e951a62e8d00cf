"""What gates do, against the slow definitions."""

import math

import pytest
import torch

from collective_pipeline.config import GateConfig, ImageSpec, MixtureArchitecture, ResNetArchitecture
from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation.experts import describe_gates, entropy, mutual_information
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.models.mixture_arms import mixture_arm
from collective_pipeline.randomness import make_generator

CPU, SHAPE, SEEDS, NAMES = torch.device("cpu"), (1, 8, 8), (5, 7), tuple("abc")


def trained(arm):
    """A checkpoint with weights that were only drawn, its gates stretched so that they differ between images."""
    model = build_arm(arm, num_seeds=len(SEEDS))
    initialise(model, [make_generator(seed, "weights") for seed in SEEDS])
    weights = model.state_dict()
    for name, tensor in weights.items():
        if name.endswith(("heads.weight", "gate.network.layers.0.linear.weight")):
            tensor.mul_(30)
    spec = ImageSpec(shape=SHAPE, mean=(0.5,), std=(0.25,), class_names=NAMES)
    return Checkpoint(arm, "mnist", spec, SEEDS, (1, 1), weights)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8, generator=generator),
        torch.randint(0, 3, (40,), generator=generator),
    )


def answers(checkpoint, images):
    """Logits and gates of all images at once."""
    x = ((images.images.float() / 255 - 0.5) / 0.25).flatten(1)[None]
    with torch.no_grad():
        return x, *checkpoint.build()(x)


def by_hand(is_open, labels):
    """The mutual information of two lists, in bits."""
    total, pairs = 0.0, list(zip(is_open, labels, strict=True))
    for pair in set(pairs):
        both = pairs.count(pair) / len(pairs)
        total += both * math.log2(both / (is_open.count(pair[0]) / len(pairs) * labels.count(pair[1]) / len(pairs)))
    return total


def test_layers_of_a_gated_network(images):
    gates = GateConfig(embedding_dim=8, offset=0.1)
    network = ResNetArchitecture(image_shape=SHAPE, blocks=(1,), width=3, gated=(0, 1), gates=gates)
    checkpoint = trained(make_image_arm("resnet18_moe", network, num_classes=3))
    units, classes, mixtures = describe_gates(checkpoint, images, CPU)
    _, _, parts = answers(checkpoint, images)
    is_open, labels = parts["gates"] > 0, images.labels.tolist()

    assert list(units["unit"].unique()) == ["layer 1", "layer 2"] and mixtures.empty
    for s, seed in enumerate(SEEDS):
        second = units[(units["seed"] == seed) & (units["unit"] == "layer 2")].iloc[0]
        expected = [by_hand(is_open[s, :, gate].tolist(), labels) for gate in range(3, 6)]
        assert second["gate_pct"] == pytest.approx(100 * is_open[s, :, 3:].double().mean().item())
        assert second["information_bits"] == pytest.approx(sum(expected) / 3, abs=1e-9)
        of_b = classes[(classes["seed"] == seed) & (classes["unit"] == "layer 1") & (classes["class"] == "b")]
        assert of_b["gate_pct"].item() == pytest.approx(100 * is_open[s, images.labels == 1, :3].double().mean().item())
    assert 5 < units["gate_pct"].mean() < 95


def test_experts_of_a_mixture(images):
    architecture = MixtureArchitecture(
        image_shape=SHAPE, n_experts=2, channels=(4, 4, 4, 6), gate_width=5, initialise="fresh"
    )
    checkpoint = trained(mixture_arm(architecture, num_classes=3))
    units, classes, mixtures = describe_gates(checkpoint, images, CPU)
    x, logits, parts = answers(checkpoint, images)
    model = checkpoint.build()
    with torch.no_grad():
        alone = model.expert_logits(x).argmax(dim=-1) == images.labels
        without = model.logits_without(x).argmax(dim=-1) == images.labels
    right = logits.argmax(dim=-1) == images.labels

    for s, seed in enumerate(SEEDS):
        mixture = mixtures[mixtures["seed"] == seed].iloc[0]
        assert mixture["oracle_accuracy"] == pytest.approx(100 * alone[s].any(dim=0).double().mean().item())
        assert mixture["accuracy"] == pytest.approx(100 * right[s].double().mean().item())
        assert mixture["usage_entropy_bits"] == pytest.approx(
            entropy(parts["gates"][s].double().mean(dim=0)).item(), abs=1e-6
        )
        for n in range(2):
            unit = units[(units["seed"] == seed) & (units["unit"] == f"expert {n + 1}")].iloc[0]
            assert unit["gate_pct"] == pytest.approx(100 * parts["gates"][s, :, n].mean().item(), abs=1e-3)
            assert unit["accuracy"] == pytest.approx(100 * alone[s, n].double().mean().item())
            lost = right[s].double().mean() - without[s, n].double().mean()
            assert unit["accuracy_lost_without"] == pytest.approx(100 * lost.item())
    assert len(classes) == 2 * 2 * 3


def test_information_of_what_is_certain_and_of_what_is_not():
    """One bit for a switch that tells two equal classes apart, none for one that knows nothing."""
    joint = torch.tensor([[[5.0, 0.0], [0.0, 5.0]], [[2.0, 2.0], [3.0, 3.0]]])

    assert mutual_information(joint).tolist() == pytest.approx([1.0, 0.0], abs=1e-7)


def test_networks_without_gates_have_empty_tables(images):
    network = ResNetArchitecture(image_shape=SHAPE, blocks=(1,), width=3)
    tables = describe_gates(trained(make_image_arm("resnet18", network, num_classes=3)), images, CPU)

    assert all(table.empty and len(table.columns) for table in tables)
