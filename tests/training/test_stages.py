"""A plan by stages is one training: one schedule, one optimiser, one history, whatever changes on the way."""

import pytest
import torch
import torch.nn.functional as F
from tests.training.test_resume import CPU, Crash, always_due, assert_same, ends, train_at  # noqa: F401

from collective_pipeline.config import Parameters, ResNetArchitecture, TrainingConfig
from collective_pipeline.data.batches import MixedLabels, resize
from collective_pipeline.evaluation.predict import Predictor
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.models.resnet import StochasticDepth
from collective_pipeline.training import loop
from collective_pipeline.training.loop import _evaluate_terms, _lay_out, _PhaseTraining
from collective_pipeline.training.snapshots import read_snapshot
from collective_pipeline.training.strategies import plan_phases
from collective_pipeline.training.train import make_batches, score, train_arm

# Of 297 images: 9 updates an epoch, and 14 of smaller images that differ in all that a stage may differ in.
SMALL = {"epochs": 2, "image_size": 8, "batch_size": 21, "mixing": False, "drop_path": False}
LARGE = {"epochs": 2, "image_size": 12}
REGULARISED = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


@pytest.fixture
def staged(splits):
    """A residual network for images of twice the size of the raw ones, with stochastic depth."""
    network = ResNetArchitecture(image_shape=(1, 12, 12), blocks=(1, 1), width=4, drop_path=0.3)
    return make_image_arm("resnet18", network, num_classes=splits.num_classes)


@pytest.fixture
def plan(training):
    """Two stages, everything on."""

    def make(*stages: dict, **changes) -> TrainingConfig:
        own = {"optimizer": "adamw", "schedule": "one_cycle", "ema_decay": 0.9, "clip_norm": 1.0, **REGULARISED}
        values = training.model_dump() | own | changes | {"stages": stages or (SMALL, LARGE)}
        return training.model_validate(values | {"epochs": sum(stage["epochs"] for stage in values["stages"])})

    return make


def rows_of(result):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


def spans_of(arm, splits, config):
    phases = plan_phases(arm, build_arm(arm), config, num_seeds=1)
    return phases, _lay_out(phases, make_batches(splits, [1], config), config)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_schedule_has_an_entry_for_every_update_and_ends_at_its_floor(
    staged, splits, plan, monkeypatch, accumulation_steps
):
    """The rates of the updates that are executed are those of the one cycle over all stages, each once."""
    config = plan(accumulation_steps=accumulation_steps)
    _, spans = spans_of(staged, splits, config)
    used = []
    original = _PhaseTraining._run_update

    def run_update(self, num_batches):
        original(self, num_batches)
        used.append(self.optimizer.param_groups[0]["lr"].item())

    monkeypatch.setattr(_PhaseTraining, "_run_update", run_update)
    _, result = train_arm(staged, splits, config, seeds=(1,), device=CPU)
    per_epoch = (-(-14 // accumulation_steps), -(-9 // accumulation_steps))

    assert [len(span.schedule) for span in spans] == [2 * number for number in per_epoch]
    assert used == torch.cat([span.schedule for span in spans]).tolist()
    # One cycle over as many updates, wherever they fall.
    whole = loop.make_schedule(
        config, rate=config.learning_rate, num_updates=sum(map(len, (s.schedule for s in spans))), warmup_updates=0
    )
    assert used == whole.tolist()
    last_step = whole[-1] / config.learning_rate
    assert last_step < 0.02 and max(used) == pytest.approx(config.learning_rate, rel=0.02)
    starts = [0, per_epoch[0], 2 * per_epoch[0], 2 * per_epoch[0] + per_epoch[1]]
    assert [row["learning_rate"] for row in result.history] == [used[start] for start in starts]


def test_equal_stages_are_one_training(staged, splits, plan):
    """Bit for bit, with moments, averages and the schedule carried over."""
    stage = {"image_size": 12}
    whole, of_whole = train_arm(staged, splits, plan(stage | {"epochs": 4}), seeds=(1, 2), device=CPU)
    parted, of_parted = train_arm(
        staged, splits, plan(stage | {"epochs": 1}, stage | {"epochs": 3}), seeds=(1, 2), device=CPU
    )

    assert rows_of(of_whole) == rows_of(of_parted)
    assert not [name for name in whole.weights if not torch.equal(whole.weights[name], parted.weights[name])]


def test_a_training_without_stages_is_one_stage(splits, training):
    """Of images as they are."""
    network = ResNetArchitecture(image_shape=splits.image_shape, blocks=(1,), width=4)
    arm = make_image_arm("resnet18", network, num_classes=splits.num_classes)
    staged = training.model_validate(training.model_dump() | {"stages": [{"epochs": 2}, {"epochs": 2}]})
    (plain, of_plain), (parted, of_parted) = (
        train_arm(arm, splits, config, seeds=(1,), device=CPU) for config in (training, staged)
    )

    assert [row | {"phase": None} for row in rows_of(of_plain)] == [row | {"phase": None} for row in rows_of(of_parted)]
    assert not [name for name in plain.weights if not torch.equal(plain.weights[name], parted.weights[name])]


def test_same_seed_same_history_and_no_neighbour_matters(staged, splits, plan):
    """Mixing, stochastic depth and all."""
    (_, one), (_, again), (_, among) = (
        train_arm(staged, splits, plan(), seeds=seeds, device=CPU) for seeds in [(7,), (7,), (3, 7)]
    )

    assert rows_of(one) == rows_of(again)
    beside = [row for row in rows_of(among) if row["seed"] == 7]
    for row, other in zip(rows_of(one), beside, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=3e-3)


@pytest.mark.parametrize(
    ("updates", "is_before"), [(20, False), (29, True), (29, False), (40, False)], ids=["first", "end", "begun", "last"]
)
def test_going_on_in_any_stage_equals_never_stopping(tmp_path, staged, splits, plan, updates, is_before):
    """In the middle of the first, at its very end, after one update of the second, and in its last epoch."""

    def settings(*, resume=False):
        return Parameters(seeds=(1,), resume=resume).model_copy(update={"training": plan()})

    whole = train_at(tmp_path / "whole" / "last", staged, splits, settings())
    path = tmp_path / "broken" / "last"
    with pytest.raises(Crash):
        train_at(path, staged, splits, settings(), updates=updates)
    if is_before:
        path.with_name("previous.last").replace(path)
        assert read_snapshot(path).facts["place"] | {"seconds": 0, "usage": 0} == {
            "phase": 0, "epoch": 2, "update": 0, "finished": False, "ranks_played": 1, "seconds": 0, "usage": 0
        }  # fmt: skip
    resumed = train_at(path, staged, splits, settings(resume=True))

    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))


def test_only_epochs_of_the_last_size_are_chosen_and_waited_for(staged, splits, plan, monkeypatch):
    """However good those before were; and patience does not run out while there is nothing to choose from."""
    accuracies = iter([99.0, 98.0, 97.0, 10.0, 9.0, 8.0, 7.0])
    original = _PhaseTraining.metrics
    monkeypatch.setattr(
        _PhaseTraining,
        "metrics",
        lambda self: original(self) | {"val_accuracy": torch.full((1,), next(accuracies))},
    )
    config = plan(SMALL | {"epochs": 3}, LARGE | {"epochs": 4}, early_stopping_patience=2)
    checkpoint, result = train_arm(staged, splits, config, seeds=(1,), device=CPU)

    assert checkpoint.best_epochs == (4,) and result.num_epochs == [6]
    assert [row["phase"] for row in result.history] == ["8px"] * 3 + ["12px"] * 3


def test_losses_of_another_size_are_not_what_later_ones_are_compared_to(staged, splits, plan, monkeypatch):
    """With patience by the loss."""
    losses = iter([0.1, 0.2, 5.0, 4.0, 3.0, 3.5])
    original = _PhaseTraining.metrics
    monkeypatch.setattr(
        _PhaseTraining, "metrics", lambda self: original(self) | {"val_loss": torch.full((1,), next(losses))}
    )
    config = plan(SMALL, LARGE | {"epochs": 4}, early_stopping_patience=1, early_stopping_metric="loss")
    _, result = train_arm(staged, splits, config, seeds=(1,), device=CPU)

    assert result.num_epochs == [6]


def test_stages_say_what_they_leave_off(staged, splits, plan, monkeypatch):
    """Drop-path and mixing, where batches and network are as the stage says."""
    seen = []
    original = _PhaseTraining._run_update

    def run_update(self, num_batches):
        x, y = self.batches.take(self.step)
        drops = [module.on for module in self.phase.network.modules() if isinstance(module, StochasticDepth)]
        seen.append((x.shape[1:], isinstance(y, MixedLabels), set(drops)))
        original(self, num_batches)

    monkeypatch.setattr(_PhaseTraining, "_run_update", run_update)
    train_arm(staged, splits, plan(), seeds=(1,), device=CPU)

    assert list(dict.fromkeys((tuple(shape), mixes, *drops) for shape, mixes, drops in seen)) == [
        ((21, 64), False, False),
        ((32, 144), True, True),
    ]


def test_the_loss_of_mixed_images_is_that_of_both_labels_by_their_shares(staged, splits, plan):
    """By hand, for losses, accuracies and gradients, seed by seed."""
    (phase, *_), _ = spans_of(staged, splits, plan(LARGE, label_smoothing=0.0))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, generator=generator).requires_grad_()
    first, second = torch.randint(3, (2, 2, 5), generator=generator)
    share = torch.tensor([0.3, 1.0])
    losses = _evaluate_terms(phase, logits, {}, MixedLabels(first, second, share))

    by_hand = logits.detach().clone().requires_grad_()
    expected = torch.stack(
        [
            a * F.cross_entropy(rows, one) + (1 - a) * F.cross_entropy(rows, other)
            for rows, one, other, a in zip(by_hand, first, second, share, strict=True)
        ]
    )
    losses["loss"].sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(logits.grad, by_hand.grad)
    hits = [(logits.argmax(dim=-1) == labels).float().mean(dim=1) for labels in (first, second)]
    torch.testing.assert_close(losses["accuracy"], 100 * (share * hits[0] + (1 - share) * hits[1]))


def test_a_network_of_another_size_than_the_images_brings_them_to_its_own(staged, splits, plan):
    """Checkpoint, score and prediction, without anybody's telling."""
    checkpoint, result = train_arm(staged, splits, plan(), seeds=(1,), device=CPU)

    assert checkpoint.images.shape == (1, 12, 12) and splits.image_shape == (1, 6, 6)
    validated = score(checkpoint, splits.val, splits, plan(), device=CPU)
    best = result.history[checkpoint.best_epochs[0] - 1]
    assert validated["accuracy"][0] == best["val_accuracy"]
    assert validated["loss"][0] == pytest.approx(best["val_loss"], rel=1e-5)
    small = splits.test.images
    large = resize(small.float(), (12, 12)).round().to(torch.uint8)
    answers = Predictor(checkpoint, CPU)(large).argmax(dim=1)
    right = 100 * (answers == splits.test.labels).float().mean().item()
    assert right == pytest.approx(score(checkpoint, splits.test, splits, plan(), device=CPU)["accuracy"][0], abs=4)
