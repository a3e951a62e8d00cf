"""A gated network trains in two stages with the loop that trains every other arm."""

import math
from dataclasses import replace

import pytest
import torch

from collective_pipeline.config import GateConfig, ResNetArchitecture, TrainingConfig, UserError, VggArchitecture
from collective_pipeline.data.splits import Images, RawImages, make_splits
from collective_pipeline.evaluation.cost import measure_latency
from collective_pipeline.models.build import build_arm, count_products
from collective_pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.training import snapshots
from collective_pipeline.training.optim import SHAPES
from collective_pipeline.training.strategies import plan_phases
from collective_pipeline.training.train import train_arm

CPU = torch.device("cpu")
SHAPE, CLASSES = (3, 16, 16), 3
GATES = GateConfig(embedding_dim=8, freeze_epochs=1, lambda_val=1e-3)
CONFIG = TrainingConfig(epochs=2, batch_size=32, augmentation_strength=0.0, learning_rate=5e-3)


def change(config, **changes):
    return type(config).model_validate(config.model_dump() | changes)


def make_arm(architecture=None, **gates):
    architecture = architecture or ResNetArchitecture(
        image_shape=SHAPE, blocks=(1, 1), width=4, gated=(0, 1), gates=change(GATES, **gates)
    )
    return make_image_arm("resnet18_moe", architecture, num_classes=CLASSES)


def make_images(num_images, seed):
    """Each class has a bright channel in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % CLASSES
    images = torch.randint(0, 100, (num_images, *SHAPE), generator=generator, dtype=torch.uint8)
    images[torch.arange(num_images), labels] += 60
    return Images(images, labels)


@pytest.fixture(scope="module")
def splits():
    raw = RawImages("cifar10", make_images(300, 0), make_images(30, 1), tuple("abc"))
    return make_splits(raw, val_fraction=0.1, split_seed=0)


def train(arm, splits, config=CONFIG, seeds=(1,), **options):
    return train_arm(arm, splits, config, seeds=seeds, device=CPU, **options)


@pytest.fixture(scope="module")
def trained(splits):
    return train(make_arm(), splits, seeds=(1, 2))


def test_the_loss_falls_and_everything_is_recorded(trained):
    """In two epochs, the second of them in the second stage."""
    rows = [row for row in trained[1].history if row["seed"] == 1]

    assert [row["phase"] for row in rows] == ["train", "freeze_gates"]
    assert rows[1]["train_cross_entropy"] < 0.7 * rows[0]["train_cross_entropy"]
    assert rows[0]["train_loss"] > rows[0]["train_cross_entropy"]
    assert rows[1]["train_loss"] == pytest.approx(rows[1]["train_cross_entropy"])
    for name in ("gate_sparsity", "embedding_cross_entropy", "open_gates"):
        assert all(math.isfinite(row[f"train_{name}"]) for row in rows)


def test_a_seed_learns_the_same_beside_others(trained, splits):
    """Up to float rounding."""
    alone, fit = train(make_arm(), splits, seeds=(2,))

    rows = [row for row in trained[1].history if row["seed"] == 2]
    for one, other in zip(rows, fit.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
    assert trained[0].of_seeds([2]).weights.keys() == alone.weights.keys()


@pytest.mark.parametrize("kind", ["vgg", "dense", "pre_norm"])
def test_the_others_train_too(kind, splits):
    """A VGG with dropout, a network without gates in one stage, the original's order."""
    arm = {
        "vgg": make_arm(VggArchitecture(image_shape=SHAPE, channels=((6,), (6, 6)), hidden=8, gates=GATES)),
        "dense": make_arm(ResNetArchitecture(image_shape=SHAPE, blocks=(1,), width=4, bottleneck=True)),
        "pre_norm": make_arm(position="pre_norm", offset=0.0, sparsity="legacy_matrix1", freeze="embedding"),
    }[kind]
    _, fit = train(arm, splits)

    assert all(math.isfinite(row["train_loss"]) for row in fit.history)
    assert {row["phase"] for row in fit.history} == ({"train"} if kind == "dense" else {"train", "freeze_gates"})


def test_a_checkpoint_gives_the_same_logits_bit_for_bit(trained, splits, tmp_path):
    """Saved, read and built again."""
    checkpoint, _ = trained
    path = tmp_path / "best.safetensors"
    save_checkpoint(checkpoint, path)
    x = torch.randn(1, 20, math.prod(SHAPE))

    again, parts_again = load_checkpoint(path).build()(x)
    logits, parts = checkpoint.build()(x)
    assert torch.equal(again, logits)
    assert all(torch.equal(parts_again[name], parts[name]) for name in parts)


def test_a_checkpoint_of_images_of_another_shape_is_refused(trained, tmp_path):
    """Though they have as many features: a convolution would read them without a word."""
    checkpoint, _ = trained
    path = tmp_path / "best.safetensors"
    save_checkpoint(replace(checkpoint, images=change(checkpoint.images, shape=(3, 8, 32))), path)

    with pytest.raises(UserError, match="the images that it names are not those that its network reads"):
        load_checkpoint(path)


@pytest.mark.parametrize("freeze", ["gates", "embedding"])
def test_the_second_stage_trains_the_network_and_no_gates(freeze):
    """In the original's way the heads go on, and the embedding alone is frozen; nothing teaches the classifier."""
    arm = make_arm(freeze=freeze)
    model = build_arm(arm)
    first, second = plan_phases(arm, model, CONFIG, num_seeds=1)

    assert first.trained == [model] and first.epochs == second.epochs == 1
    assert second.trained == [model.network, *([model.gating.heads] if freeze == "embedding" else [])]


class Recorder:
    """Stands in for snapshots on disk: keeps the state of training after every epoch."""

    name, before = "arm", None

    def __init__(self):
        self.states = []

    def load(self):
        return None

    def is_due(self):
        return True

    def save(self, snapshot, *, wait):
        if snapshot.facts["place"]["update"] == 0:
            self.states.append({name: tensor.clone() for name, tensor in snapshot.tensors.items()})


def test_frozen_gates_do_not_move_and_the_network_does(splits):
    """Not by weight decay either, nor does what the embedding says of an image."""
    recorder = Recorder()
    train(make_arm(freeze_epochs=2), splits, change(CONFIG, epochs=3), snapshots=recorder)
    first, *_, last = recorder.states
    moved = {name: not torch.equal(first[name], last[name]) for name in last if name.startswith("network/")}

    assert len(recorder.states) == 3
    assert not any(moves for name, moves in moved.items() if "gating." in name)
    assert all(moves for name, moves in moved.items() if "gating." not in name)


class Crash(Exception):
    """In the place of SIGKILL."""


@pytest.mark.parametrize("updates", [3, 8, 11])
def test_going_on_equals_never_stopping(updates, splits, tmp_path, monkeypatch):
    """In either stage and between them, to the last bit."""
    monkeypatch.setattr(snapshots, "SECONDS_BETWEEN", -1.0)
    monkeypatch.setattr(snapshots, "SHARE", float("inf"))
    config, done = change(CONFIG, schedule="cosine"), iter(range(1, 100))

    def crash(numbers):
        for number in numbers:
            yield number
            if next(done) == updates:
                raise Crash

    def run(path, *, resume=False, **options):
        saved = snapshots.Snapshots(path, name="gated", identity={}, circumstances={}, resume=resume)
        return train(make_arm(), splits, config, snapshots=saved, **options)

    whole, _ = run(tmp_path / "whole" / "last")
    with pytest.raises(Crash):
        run(tmp_path / "broken" / "last", watch=crash)
    resumed, _ = run(tmp_path / "broken" / "last", resume=True)

    assert whole.best_epochs == resumed.best_epochs
    assert not [name for name, tensor in whole.weights.items() if not torch.equal(tensor, resumed.weights[name])]


@pytest.mark.parametrize("schedule", SHAPES)
def test_both_stages_share_one_schedule(splits, schedule):
    """The learning rate is that of a training without stages."""
    config = change(
        CONFIG, epochs=4, schedule=schedule, batch_size=128, warmup_epochs=0 if schedule == "one_cycle" else 1
    )
    rates = []
    for freeze_epochs in (0, 2):
        _, fit = train(make_arm(freeze_epochs=freeze_epochs), splits, config)
        rates.append([epoch.learning_rate for epoch in fit.epochs])

    assert rates[0] == rates[1]


def test_lambda_closes_gates(splits):
    """And the network learns all the same, through those that are left and its shortcuts."""
    config = change(CONFIG, epochs=8, optimizer="sgd", learning_rate=0.05)
    free, pressed = (train(make_arm(lambda_val=weight), splits, config)[1].history[-1] for weight in (0.0, 0.03))

    assert pressed["train_open_gates"] < 30
    assert free["train_open_gates"] > 60
    assert max(free["train_cross_entropy"], pressed["train_cross_entropy"]) < 0.2


def test_a_stage_without_epochs_is_refused(splits):
    """In one sentence with both numbers."""
    with pytest.raises(UserError, match=r"freeze_epochs=2 leaves its gates none of training\.epochs=2 to learn in"):
        train(make_arm(freeze_epochs=2), splits)


def test_gated_networks_have_latency_and_products():
    """The stem, four gated ones, a shortcut, the head; four of the embedding, the heads, its classifier."""
    arm = make_arm()

    assert measure_latency(arm, CPU) > 0
    assert count_products(arm) == 1 + 4 + 1 + 1 + 4 + 1 + 1
