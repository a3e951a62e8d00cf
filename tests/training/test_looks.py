"""Looking at a network while it trains changes nothing of its training, and shows what validation saw."""

import pytest
import torch

from collective_pipeline.config import GateConfig, Parameters, ResNetArchitecture
from collective_pipeline.evaluation.experts import describe_at_work
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.training import snapshots
from collective_pipeline.training.train import score, snapshots_at, train_arm

CPU = torch.device("cpu")
# Whatever has a state of its own: averages, moments, augmentation.
BUSY = {"ema_decay": 0.9, "optimizer": "adamw", "augmentation_strength": 1.0, "schedule": "cosine"}


class Looks(dict):
    """What was shown, by epoch and seeds; then it is spoiled, and the random numbers of the process with it."""

    def __init__(self, splits):
        super().__init__()
        self.splits = splits

    def __call__(self, epoch, checkpoint):
        self[epoch, checkpoint.seeds] = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
        self.accuracy = score(checkpoint, self.splits.val, self.splits, self.config, device=CPU)["accuracy"]
        describe_at_work(checkpoint, train=self.splits.train, images=self.splits.val, device=CPU)
        torch.rand(3)
        for tensor in checkpoint.weights.values():
            tensor.zero_()


@pytest.fixture
def train(splits, training):
    """Trains with or without looks; everything that can be seen of the end but the clock, and the looks."""

    def run(arm, *, seeds=(1, 2), snapshots=None, looks=True, **changes):
        config = training.model_validate(training.model_dump() | changes)
        look = Looks(splits)
        look.config = config
        checkpoint, fit = train_arm(
            arm, splits, config, seeds=seeds, device=CPU, snapshots=snapshots, look=look if looks else None
        )
        history = [{name: value for name, value in row.items() if name != "seconds"} for row in fit.history]
        return (checkpoint.weights, history, checkpoint.best_epochs), look

    return run


def assert_same(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert not [name for name in one[0] if not torch.equal(one[0][name], other[0][name])]


@pytest.mark.parametrize("changes", [{}, BUSY, {"strategy": "pretrain_freeze_finetune"}], ids=["", "busy", "phases"])
def test_training_is_the_same_to_the_last_bit(arm, train, changes):
    plain, none = train(arm, **changes)
    watched, looks = train(arm, expert_analysis_interval=1, **changes)

    assert not none and looks
    assert_same(watched, plain)


def test_it_comes_at_every_multiple_and_shows_what_was_validated(arm, train):
    (_, history, _), looks = train(arm, epochs=5, expert_analysis_interval=2, **BUSY)

    assert list(looks) == [(2, (1, 2)), (4, (1, 2))]
    fourth = [row["val_accuracy"] for row in history if row["epoch"] == 4]
    assert looks.accuracy == pytest.approx(fourth, abs=1e-3)


@pytest.mark.parametrize("interval", [None, 0, 9])
def test_it_never_comes_without_an_interval(arm, train, interval):
    assert not train(arm, expert_analysis_interval=interval)[1]


def test_members_that_are_pretrained_are_no_collective_yet(arm, train):
    """Only phases whose network is the arm itself are looked at."""
    (_, history, _), looks = train(arm, epochs=6, strategy="pretrain_freeze_finetune", expert_analysis_interval=1)

    whole = {row["epoch"] for row in history if row["phase"] != "pretrain_experts"}
    assert {epoch for epoch, _ in looks} <= whole and looks


def test_a_seed_that_has_stopped_is_not_shown(arm, train):
    (_, history, _), looks = train(
        arm, seeds=(1, 2, 3), epochs=12, early_stopping_patience=1, learning_rate=5e-3, expert_analysis_interval=1
    )

    trained = {epoch: tuple(row["seed"] for row in history if row["epoch"] == epoch) for epoch in range(1, 13)}
    assert dict(list(looks)) == {epoch: seeds for epoch, seeds in trained.items() if seeds}
    assert len(set(looks)) > 1 and looks.keys() != {(epoch, (1, 2, 3)) for epoch in range(1, 13)}


def test_networks_that_train_seed_by_seed_are_shown_seed_by_seed(splits, train):
    network = ResNetArchitecture(
        image_shape=splits.image_shape, blocks=(1,), width=2, gated=(0, 1), gates=GateConfig(freeze_epochs=1)
    )
    arm = make_image_arm("resnet18_moe", network, num_classes=splits.num_classes)
    plain, _ = train(arm, epochs=2)
    watched, looks = train(arm, epochs=2, expert_analysis_interval=1)

    assert list(looks) == [(1, (1,)), (2, (1,)), (1, (2,)), (2, (2,))]
    assert_same(watched, plain)


def test_a_run_may_go_on_with_other_looks_and_shows_the_same(tmp_path, arm, splits, training, train, monkeypatch):
    """They are no part of what must be equal; what is shown after an interruption is what would have been."""
    monkeypatch.setattr(snapshots, "SECONDS_BETWEEN", -1.0)
    monkeypatch.setattr(snapshots, "SHARE", float("inf"))
    whole, looks = train(arm, expert_analysis_interval=1)

    def saved(*, resume, interval):
        config = training.model_copy(update={"expert_analysis_interval": interval})
        settings = Parameters(seeds=(1, 2), training=config, resume=resume)
        return snapshots_at(tmp_path / "last", arm, splits, settings, CPU)

    class Crash(Exception):
        pass

    def crash(epoch):
        if epoch.number == 2:
            raise Crash

    with pytest.raises(Crash):
        train_arm(
            arm,
            splits,
            training,
            seeds=(1, 2),
            device=CPU,
            callbacks=[crash],
            snapshots=saved(resume=False, interval=None),
        )
    resumed, rest = train(arm, snapshots=saved(resume=True, interval=1), expert_analysis_interval=1)

    assert_same(resumed, whole)
    assert {epoch for epoch, _ in rest} == {2, 3, 4}
    for when, weights in rest.items():
        assert all(torch.equal(tensor, looks[when][name]) for name, tensor in weights.items())
