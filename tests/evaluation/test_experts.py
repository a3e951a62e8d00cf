"""What experts, members and gated layers do, against the slow definitions."""

import math
from dataclasses import fields, replace

import pandas as pd
import pytest
import torch

from collective_pipeline.config import (
    BaselineConfig,
    CollectiveConfig,
    GateConfig,
    ImageSpec,
    MixtureArchitecture,
    ResNetArchitecture,
)
from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation.experts import (
    CLASS_COLUMNS,
    SAMPLE_COLUMNS,
    SEED_COLUMNS,
    UNIT_COLUMNS,
    ExpertAnalysis,
    describe_at_work,
    describe_experts,
    entropy,
    mutual_information,
)
from collective_pipeline.evaluation.members import ablation_drops, member_outputs, probe_predictions
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.models.matching import match_arm
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


def make_images(num_images, seed):
    """Each class is a bright row of its own in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (num_images,), generator=generator)
    pixels = torch.randint(0, 100, (num_images, *SHAPE), dtype=torch.uint8, generator=generator)
    pixels[torch.arange(num_images), 0, 2 * labels] += 155
    return Images(pixels, labels)


TRAIN, IMAGES = make_images(90, 1), make_images(40, 0)


def described(checkpoint):
    return describe_experts(checkpoint, train=TRAIN, images=IMAGES, device=CPU)


def shown(images):
    """As a network reads them, all at once."""
    return ((images.images.float() / 255 - 0.5) / 0.25).flatten(1)[None]


def answers(checkpoint):
    x = shown(IMAGES)
    with torch.no_grad():
        return x, *checkpoint.build()(x)


def gated():
    gates = GateConfig(embedding_dim=8, offset=0.1)
    network = ResNetArchitecture(image_shape=SHAPE, blocks=(1,), width=3, gated=(0, 1), gates=gates)
    return trained(make_image_arm("resnet18_moe", network, num_classes=3))


def mixture(**changes):
    values = {"n_experts": 2, "channels": (4, 4, 4, 6), "gate_width": 5, "initialise": "fresh"} | changes
    return trained(mixture_arm(MixtureArchitecture(image_shape=SHAPE, **values), num_classes=3))


def collective():
    config = CollectiveConfig(
        n_total=5,
        n_experts=2,
        expert_hidden=(16, 12),
        expert_output=8,
        analyst_hidden=(10, 8),
        analyst_output=6,
        c_expert=0.5,
    )
    return trained(match_arm("collective", config, BaselineConfig(), in_dim=64, num_classes=3))


def without_any():
    return trained(
        make_image_arm("resnet18", ResNetArchitecture(image_shape=SHAPE, blocks=(1,), width=3), num_classes=3)
    )


def by_hand(is_open, labels):
    """The mutual information of two lists, in bits."""
    total, pairs = 0.0, list(zip(is_open, labels, strict=True))
    for pair in set(pairs):
        both = pairs.count(pair) / len(pairs)
        total += both * math.log2(both / (is_open.count(pair[0]) / len(pairs) * labels.count(pair[1]) / len(pairs)))
    return total


def test_layers_of_a_gated_network():
    checkpoint = gated()
    found = described(checkpoint)
    units, classes = found.units, found.classes
    _, logits, parts = answers(checkpoint)
    is_open, labels = parts["gates"] > 0, IMAGES.labels.tolist()

    assert list(units["unit"].unique()) == ["layer 1", "layer 2"]
    for s, seed in enumerate(SEEDS):
        second = units[(units["seed"] == seed) & (units["unit"] == "layer 2")].iloc[0]
        expected = [by_hand(is_open[s, :, gate].tolist(), labels) for gate in range(3, 6)]
        assert second["gate_pct"] == pytest.approx(100 * is_open[s, :, 3:].double().mean().item())
        assert second["information_bits"] == pytest.approx(sum(expected) / 3, abs=1e-9)
        of_b = classes[(classes["seed"] == seed) & (classes["unit"] == "layer 1") & (classes["class"] == "b")]
        assert of_b["gate_pct"].item() == pytest.approx(100 * is_open[s, IMAGES.labels == 1, :3].double().mean().item())
    assert 5 < units["gate_pct"].mean() < 95
    # A layer says nothing alone.
    assert units[["accuracy", "accuracy_lost_without"]].isna().all(axis=None) and classes["accuracy"].isna().all()
    accuracy = 100 * (logits.argmax(dim=-1) == IMAGES.labels).double().mean(dim=1)
    assert found.seeds["accuracy"].tolist() == pytest.approx(accuracy.tolist())
    assert found.seeds[["usage_entropy_bits", "oracle_accuracy"]].isna().all(axis=None)
    assert found.samples["says"].isna().all() and found.samples["confidence_pct"].isna().all()
    assert_samples(found, logits)


def assert_samples(found, logits):
    """An image of each class, with what the first seed says of it, and a row for each unit."""
    rows = found.samples["image"].unique().tolist()
    images = found.samples.drop_duplicates("image")
    units = found.units["unit"].unique().tolist()

    assert sorted(images["class"]) == list(NAMES) and set(images["seed"]) == {SEEDS[0]}
    assert images["class"].tolist() == [NAMES[label] for label in IMAGES.labels[rows]]
    assert images["prediction"].tolist() == [NAMES[k] for k in logits[0, rows].argmax(dim=-1)]
    assert found.samples.groupby("image")["unit"].apply(list).tolist() == [units] * 3


def test_experts_of_a_mixture():
    checkpoint = mixture()
    found = described(checkpoint)
    x, logits, parts = answers(checkpoint)
    model = checkpoint.build()
    with torch.no_grad():
        said = model.expert_logits(x).argmax(dim=-1)
        without = model.logits_without(x).argmax(dim=-1) == IMAGES.labels
    alone, right = said == IMAGES.labels, logits.argmax(dim=-1) == IMAGES.labels

    for s, seed in enumerate(SEEDS):
        together = found.seeds[found.seeds["seed"] == seed].iloc[0]
        assert together["oracle_accuracy"] == pytest.approx(100 * alone[s].any(dim=0).double().mean().item())
        assert together["accuracy"] == pytest.approx(100 * right[s].double().mean().item())
        assert together["usage_entropy_bits"] == pytest.approx(
            entropy(parts["gates"][s].double().mean(dim=0)).item(), abs=1e-6
        )
        for n in range(2):
            unit = found.units[(found.units["seed"] == seed) & (found.units["unit"] == f"expert {n + 1}")].iloc[0]
            assert unit["gate_pct"] == pytest.approx(100 * parts["gates"][s, :, n].mean().item(), abs=1e-3)
            assert unit["accuracy"] == pytest.approx(100 * alone[s, n].double().mean().item())
            lost = right[s].double().mean() - without[s, n].double().mean()
            assert unit["accuracy_lost_without"] == pytest.approx(100 * lost.item())
    assert len(found.classes) == 2 * 2 * 3
    assert_samples(found, logits)
    first = found.samples.iloc[0]
    assert first["gate_pct"] == pytest.approx(100 * parts["gates"][0, first["image"], 0].item(), abs=1e-3)
    assert first["says"] == NAMES[said[0, 0, first["image"]]] and 100 / 3 <= first["confidence_pct"] <= 100


def test_members_of_a_collective():
    """What a member knows is what its probe says; what it is worth is what mean ablation takes away."""
    checkpoint = collective()
    found = described(checkpoint)
    model = checkpoint.build()
    logits, parts = member_outputs(model, shown(IMAGES))
    _, known = member_outputs(model, shown(TRAIN))
    said = torch.cat([probe_predictions(known[name], TRAIN.labels, parts[name])[0] for name in parts], dim=1)
    lost = torch.cat(list(ablation_drops(model, shown(IMAGES), IMAGES.labels).values()), dim=1)
    right = said == IMAGES.labels

    units = ["expert 1", "expert 2", "analyst 1", "analyst 2", "analyst 3"]
    assert found.units["unit"].tolist() == units * 2 and set(found.units["num_gates"]) == {0}
    assert found.units["accuracy"].tolist() == pytest.approx(100 * right.double().mean(dim=-1).flatten().numpy())
    assert found.units["accuracy_lost_without"].tolist() == pytest.approx(lost.flatten().tolist())
    assert found.units[["gate_pct", "information_bits"]].isna().all(axis=None)
    oracle = 100 * right.any(dim=1).double().mean(dim=1)
    assert found.seeds["oracle_accuracy"].tolist() == pytest.approx(oracle.tolist())
    assert found.units["accuracy"].max() > 60, "a probe reads which row is bright"
    of_c = found.classes[(found.classes["unit"] == "analyst 3") & (found.classes["class"] == "c")]
    by_class = 100 * right[:, 4, IMAGES.labels == 2].double().mean(dim=1)
    assert of_c["accuracy"].tolist() == pytest.approx(by_class.tolist()) and of_c["gate_pct"].isna().all()
    assert_samples(found, logits)
    last = found.samples.iloc[-1]
    assert last["says"] == NAMES[said[0, 4, last["image"]]]


@pytest.mark.parametrize("make", [gated, mixture, collective, without_any])
def test_all_networks_have_tables_of_the_same_columns(make):
    found = described(make())
    columns = (UNIT_COLUMNS, CLASS_COLUMNS, SEED_COLUMNS, SAMPLE_COLUMNS)

    assert [tuple(getattr(found, field.name)) for field in fields(found)] == list(columns)
    classes, samples = describe_at_work(make(), train=TRAIN, images=IMAGES, device=CPU)
    pd.testing.assert_frame_equal(classes, found.classes)
    pd.testing.assert_frame_equal(samples, found.samples)


@pytest.mark.parametrize("make", [without_any, lambda: mixture(n_experts=1, losses=UNWEIGHED)])
def test_what_has_no_units_has_empty_tables(make):
    found = described(make())

    assert all(getattr(found, field.name).empty for field in fields(found))


UNWEIGHED = {"diversity": 0, "balance": 0}


@pytest.mark.parametrize("make", [gated, mixture, collective])
def test_seeds_without_good_weights_are_left_out(make):
    """Those that diverged before validation chose any, and those whose weights are not numbers."""
    checkpoint = make()
    broken = {
        name: torch.cat([tensor[:1] * math.nan, tensor[1:]]) if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.weights.items()
    }
    expected = described(checkpoint.of_seeds([SEEDS[1]]))

    for without in (replace(checkpoint, best_epochs=(0, 1)), replace(checkpoint, weights=broken)):
        pd.testing.assert_frame_equal(described(without).units, expected.units)
    assert described(replace(checkpoint, best_epochs=(0, 0))).units.empty


def test_several_networks_stand_below_each_other():
    """One without units among them takes nothing of the others' types away."""
    first, last = described(mixture()), described(collective())
    joined = ExpertAnalysis.join([first, described(without_any()), last])

    assert joined.units["model_type"].tolist() == ["merged_moe"] * 4 + ["collective"] * 10
    assert joined.units["num_gates"].dtype == first.units["num_gates"].dtype
    assert ExpertAnalysis.join([described(without_any())]).units.empty


def test_information_of_what_is_certain_and_of_what_is_not():
    """One bit for a switch that tells two equal classes apart, none for one that knows nothing."""
    joint = torch.tensor([[[5.0, 0.0], [0.0, 5.0]], [[2.0, 2.0], [3.0, 3.0]]])

    assert mutual_information(joint).tolist() == pytest.approx([1.0, 0.0], abs=1e-7)
