"""A mixture trains like every arm: its temperature falls on time, whatever breaks in between."""

import math

import pytest
import torch

from collective_pipeline.config import Arm, MixtureArchitecture, Parameters, SubModelArchitecture
from collective_pipeline.data.class_groups import restrict
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from collective_pipeline.models.merging import check_submodels, merge
from collective_pipeline.training import snapshots
from collective_pipeline.training.losses import make_objective
from collective_pipeline.training.optim import make_annealing
from collective_pipeline.training.snapshots import read_snapshot
from collective_pipeline.training.strategies import plan_phases
from collective_pipeline.training.train import score, snapshots_at, train_arm

CPU = torch.device("cpu")
CHANNELS = (4, 6, 8, 8)


class Crash(Exception):
    """In the place of SIGKILL."""


def make_arm(splits, architecture, model_type="merged_moe"):
    return Arm(
        model_type=model_type,
        in_dim=splits.in_dim,
        num_classes=splits.num_classes,
        params=1,
        target_params=1,
        architecture=architecture,
    )


@pytest.fixture
def mixture(splits):
    return MixtureArchitecture(image_shape=splits.image_shape, channels=CHANNELS, gate_width=8, expert_dropout=0.1)


@pytest.fixture
def arm(splits, mixture):
    return make_arm(splits, mixture)


def temperatures(result):
    """At the end of the best epoch of each seed."""
    return result.weights["gate.temperature"].tolist()


def test_annealing_goes_along_half_a_cosine():
    values = make_annealing(2.0, 0.5, num_updates=5).tolist()

    assert values == pytest.approx([0.5 + 0.75 * (1 + math.cos(math.pi * i / 4)) for i in range(5)])
    assert (values[0], values[-1]) == (2.0, 0.5)
    assert make_annealing(2.0, 0.5, num_updates=1).tolist() == [2.0]


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.99}, {"accumulation_steps": 2}])
def test_the_temperature_of_an_epoch_is_that_of_its_last_update(arm, splits, training, changes):
    """In averaged weights too, and each seed keeps that of the epoch which validation chose."""
    config = training.model_validate(training.model_dump() | changes)
    updates_per_epoch = -(-(len(splits.train) // config.batch_size) // config.accumulation_steps)
    expected = make_annealing(2.0, 0.5, num_updates=config.epochs * updates_per_epoch)
    _, result = train_arm(arm, splits, config, seeds=(1, 2, 3), device=CPU)

    for epoch, temperature in zip(result.best_epochs, temperatures(result), strict=True):
        assert temperature == expected[epoch * updates_per_epoch - 1].item()


@pytest.mark.parametrize("updates", [1, 7, 10, 16])
def test_going_on_equals_never_stopping(tmp_path, arm, splits, training, updates, monkeypatch):
    """Temperature, noise and dropout of a run that broke are those of one that did not, to the last bit."""
    monkeypatch.setattr(snapshots, "SECONDS_BETWEEN", -1.0)
    monkeypatch.setattr(snapshots, "SHARE", float("inf"))
    config = training.model_validate(training.model_dump() | {"epochs": 2, "ema_decay": 0.9, "optimizer": "adamw"})

    def run(name, *, stop=None, resume=False):
        done = iter(range(1, 10_000))

        def watch(numbers):
            for number in numbers:
                yield number
                if next(done) == stop:
                    raise Crash

        saved = snapshots_at(
            tmp_path / name, arm, splits, Parameters(seeds=(1, 2), training=config, resume=resume), CPU
        )
        return train_arm(arm, splits, config, seeds=(1, 2), device=CPU, watch=watch, snapshots=saved)[0].weights

    whole = run("whole")
    with pytest.raises(Crash):
        run("broken", stop=updates)
    resumed = run("broken", resume=True)

    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    one, other = (read_snapshot(tmp_path / name).tensors for name in ("whole", "broken"))
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_a_seed_does_not_depend_on_its_neighbours(arm, splits, training):
    together = train_arm(arm, splits, training, seeds=(4, 5), device=CPU)[1]
    alone = train_arm(arm, splits, training, seeds=(5,), device=CPU)[1]

    first = [row["train_loss"] for row in together.history if row["seed"] == 5]
    assert first == pytest.approx([row["train_loss"] for row in alone.history], rel=1e-3)


def test_losses_on_the_gates_are_logged_by_name(arm, splits, training):
    config = training.model_validate(training.model_dump() | {"epochs": 1})
    row = train_arm(arm, splits, config, seeds=(1,), device=CPU)[1].history[0]

    assert {"train_routing_diversity", "train_routing_balance", "train_cross_entropy"} <= row.keys()
    assert row["train_loss"] == pytest.approx(
        row["train_cross_entropy"] + 0.1 * row["train_routing_diversity"] + 0.5 * row["train_routing_balance"]
    )


def test_one_expert_has_no_temperature(splits, training):
    architecture = MixtureArchitecture(
        image_shape=splits.image_shape, channels=CHANNELS, n_experts=1, losses={"diversity": 0, "balance": 0}
    )
    arm = make_arm(splits, architecture, "single_expert")
    (phase,) = plan_phases(arm, build_arm(arm), training, num_seeds=1)

    assert not phase.annealed
    assert make_objective(architecture, 0.0)(torch.zeros(1, 2, 3), {}, torch.zeros(1, 2, dtype=torch.int64)).keys() == {
        "loss", "cross_entropy",
    }  # fmt: skip


def test_sub_models_are_trained_merged_and_the_mixture_learns(tmp_path, splits, mixture, training):
    """From groups to a file of the mixture, as a pipeline would."""
    config = training.model_validate(training.model_dump() | {"epochs": 8, "learning_rate": 0.02})
    groups, seeds = ((0, 1), (1, 2), (0, 2)), (1, 2)
    submodels = []
    for group in groups:
        images = restrict(splits, group, remeasure=False)
        architecture = SubModelArchitecture(image_shape=splits.image_shape, channels=CHANNELS, dropout=0.1)
        submodels.append(
            train_arm(make_arm(images, architecture, "sub_model"), images, config, seeds=seeds, device=CPU)[0]
        )
    check_submodels(submodels, mixture, groups=groups, images=splits.image_spec, seeds=seeds)
    checkpoint, _ = train_arm(
        make_arm(splits, mixture),
        splits,
        config,
        seeds=seeds,
        device=CPU,
        prepare=lambda model, some: merge(model, submodels, mixture, groups=groups, seeds=some),
    )
    save_checkpoint(checkpoint, tmp_path / "best.safetensors")
    scores = score(load_checkpoint(tmp_path / "best.safetensors"), splits.test, splits, config, device=CPU)

    assert min(scores["accuracy"]) > 90
    assert scores == score(checkpoint, splits.test, splits, config, device=CPU)
