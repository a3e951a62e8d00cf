"""How long answers take."""

from dataclasses import replace

import pytest
import torch
from tests.evaluation.test_cost import ARM

from collective_pipeline.config import GateConfig, ImageSpec
from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation import latency
from collective_pipeline.evaluation.cost import count_macs, measure_executed_macs
from collective_pipeline.evaluation.latency import SKIPPING_COLUMNS, measure_latency, measure_skipping, take_turns
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.image_arms import image_architecture, make_image_arm
from collective_pipeline.randomness import make_generator

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_latency_is_of_batches_of_that_size(batch_size, monkeypatch):
    """The network sees as many images as were asked for, and the time is one of that many."""
    seen = set()
    forward = torch.nn.Module.__call__

    def watched(module, x):
        seen.add(x.shape[-2])
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Module, "__call__", watched)

    assert measure_latency(ARM, CPU, batch_size=batch_size) > 0
    assert seen == {batch_size}


def test_ways_take_turns():
    """In their order, in every round; what warms up does not count."""
    called = []
    ways = {name: lambda name=name: called.append(name) for name in "abc"}

    times = take_turns(ways, CPU, rounds=3, warm_up=2)

    assert called == list("abc") * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def checkpoint_of(name, **gates):
    arm = make_image_arm(name, image_architecture(name, SHAPE, GateConfig(**gates), width=2), num_classes=3)
    model = build_arm(arm, num_seeds=2)
    initialise(model, [make_generator(seed, "weights") for seed in (7, 8)])
    known = ImageSpec(shape=SHAPE, mean=(0.5,), std=(0.2,), class_names=("a", "b", "c"))
    return Checkpoint(arm, "mnist", known, (7, 8), (1, 1), model.state_dict())


def random_images(number):
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randint(0, 256, (number, *SHAPE), generator=generator, dtype=torch.uint8),
        torch.zeros(number, dtype=torch.int64),
    )


def test_skipping_is_measured_beside_the_whole_networks(monkeypatch):
    """For every batch size, also one that is larger than there are images; without an offset about half is shut."""
    monkeypatch.setattr(latency, "BATCH_SIZES", (1, 50))
    monkeypatch.setattr(latency, "ROUNDS", 2)
    dense = checkpoint_of("resnet18")

    table = measure_skipping(checkpoint_of("resnet18_moe", offset=0.0), dense, random_images(20), CPU)

    assert list(table.columns) == list(SKIPPING_COLUMNS) and list(table["batch_size"]) == [1, 50]
    assert (table.filter(like="_ms") > 0).all(axis=None)
    all_open = measure_skipping(checkpoint_of("resnet18_moe", offset=1e3), dense, random_images(20), CPU)
    assert (table["executed_pct"] < all_open["executed_pct"]).all() and (table["executed_pct"] > 0).all()


@pytest.mark.parametrize(("name", "gates"), [("resnet18", {}), ("resnet18_moe", {"position": "pre_norm"})])
def test_nothing_is_measured_where_nothing_can_be_skipped(name, gates):
    table = measure_skipping(checkpoint_of(name, **gates), checkpoint_of("resnet18"), random_images(4), CPU)

    assert list(table.columns) == list(SKIPPING_COLUMNS) and table.empty


def test_images_are_met_in_no_order_of_their_classes(monkeypatch):
    """All of them once: what is executed on average is what is counted over the whole set."""
    monkeypatch.setattr(latency, "BATCH_SIZES", (1,))
    monkeypatch.setattr(latency, "ROUNDS", 24)
    monkeypatch.setattr(latency, "WARM_UP", 0)
    gated, dense, images = checkpoint_of("resnet18_moe", offset=0.0), checkpoint_of("resnet18"), random_images(24)
    seen = []
    cut = latency.Normalise.__call__

    def watched(normalise, pixels):
        seen.append(pixels.clone())
        return cut(normalise, pixels)

    monkeypatch.setattr(latency.Normalise, "__call__", watched)
    table = measure_skipping(gated, dense, images, CPU)
    monkeypatch.setattr(latency.Normalise, "__call__", cut)

    whole = measure_executed_macs(gated.of_seeds([7]), images, CPU)[0] / count_macs(dense.arm)
    assert table["executed_pct"].iloc[0] == pytest.approx(100 * whole)
    places = [next(i for i, one in enumerate(images.images) if torch.equal(one, image[0])) for image in seen]
    assert sorted(places) == list(range(24)) != places


def test_a_seed_that_diverged_is_not_measured(monkeypatch):
    monkeypatch.setattr(latency, "BATCH_SIZES", (1,))
    gated, dense = checkpoint_of("resnet18_moe"), checkpoint_of("resnet18")
    none_is_good = replace(gated, best_epochs=(0, 0))
    second_is_good = replace(
        gated, best_epochs=(0, 1), weights={name: tensor.clone() for name, tensor in gated.weights.items()}
    )
    for tensor in second_is_good.weights.values():
        tensor[0] = torch.nan

    assert measure_skipping(none_is_good, dense, random_images(4), CPU).empty
    assert measure_skipping(second_is_good, dense, random_images(4), CPU)["executed_pct"].notna().all()
