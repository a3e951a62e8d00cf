"""What the one training loop promises, for every arm, strategy and knob."""

import math

import pytest
import torch

from collective_pipeline.config import MODEL_TYPES, BaselineConfig, GateConfig, UserError, check_parameters
from collective_pipeline.data.batches import Batches, Normalise
from collective_pipeline.data.splits import Images
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.image_arms import image_architecture, make_image_arm
from collective_pipeline.models.layers import Linear, Stack
from collective_pipeline.models.matching import match_arm
from collective_pipeline.randomness import make_generator
from collective_pipeline.training import loop
from collective_pipeline.training.loop import evaluate, fit
from collective_pipeline.training.losses import cross_entropy, weighted_sum
from collective_pipeline.training.strategies import Phase, plan_phases
from collective_pipeline.training.train import score, train_arm

CPU = torch.device("cpu")


def change(config, **changes):
    return type(config).model_validate(config.model_dump() | changes)


def histories(result, seed):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history if row["seed"] == seed]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_arm_learns(model_type, collective, splits, training):
    """All seven arms go through the same loop and find out what the images show."""
    tolerant = BaselineConfig(tolerance=0.05)
    arm = match_arm(model_type, collective, tolerant, in_dim=splits.in_dim, num_classes=splits.num_classes)
    checkpoint, result = train_arm(arm, splits, change(training, epochs=15), seeds=(1,), device=CPU)

    assert score(checkpoint, splits.test, splits, training, device=CPU)["accuracy"][0] > 90
    assert len(result.history) == 15


def test_same_seed_same_history(arm, splits, training):
    """Training twice with one seed gives the same numbers and weights, to the last bit."""
    first, second = (train_arm(arm, splits, training, seeds=(7,), device=CPU) for _ in range(2))

    assert histories(first[1], 7) == histories(second[1], 7)
    assert all(torch.equal(first[0].weights[name], second[0].weights[name]) for name in first[0].weights)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augmentation_strength": 1.0},
        {"clip_norm": 0.5, "ema_decay": 0.9},
        {"strategy": "layerwise_autoencoding", "epochs": 5},
    ],
)
def test_seed_does_not_depend_on_its_neighbours(arm, splits, training, changes):
    """Every loss of a seed among three is what it is alone, up to float rounding, which grows with the steps.

    The validation loss feels it first: Adam turns the rounding of a bias in front of a normalisation, whose gradient
    is exactly 0, into whole steps, and the running mean follows them with delay.
    """
    config = change(training, learning_rate=1e-3, **changes)
    _, alone = train_arm(arm, splits, config, seeds=(7,), device=CPU)
    _, among = train_arm(arm, splits, config, seeds=(3, 7, 9), device=CPU)

    for row, other in zip(histories(alone, 7), histories(among, 7), strict=True):
        tolerance = 1e-5 if row["epoch"] == 1 else 3e-3
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=tolerance)
        if row["phase"] == "train":
            assert row["val_loss"] == pytest.approx(other["val_loss"], rel=3e-3)


def test_seeds_differ(arm, splits, training):
    """Two seeds are two experiments."""
    _, result = train_arm(arm, splits, training, seeds=(1, 2), device=CPU)

    assert histories(result, 1)[0]["train_loss"] != histories(result, 2)[0]["train_loss"]


@pytest.mark.parametrize(
    ("strategy", "phases"),
    [
        ("end_to_end", {"train": 10}),
        ("pretrain_freeze_finetune", {"pretrain_experts": 3, "train_rest": 4, "finetune": 3}),
        (
            "layerwise_autoencoding",
            {
                "autoencode_experts": 1,
                "autoencode_expert_encoder": 2,
                "autoencode_analysts": 2,
                "autoencode_analyst_encoder": 1,
                "finetune": 4,
            },
        ),
    ],
)
def test_strategies_share_one_budget(arm, splits, training, strategy, phases):
    """Whatever the phases, there are as many epochs in all; the checkpoint is of a phase that trains the arm itself."""
    config = change(training, epochs=10, strategy=strategy)
    checkpoint, result = train_arm(arm, splits, config, seeds=(1,), device=CPU)
    named = [row["phase"] for row in result.history]

    assert {name: named.count(name) for name in dict.fromkeys(named)} == phases
    assert named[checkpoint.best_epochs[0] - 1] in {"train", "train_rest", "finetune"}
    assert score(checkpoint, splits.test, splits, training, device=CPU)["accuracy"][0] > 60


def test_strategy_needs_an_epoch_for_each_phase():
    """Too few epochs for the phases are refused with the configuration."""
    with pytest.raises(UserError, match=r"epochs=3 is too few for training.strategy=layerwise_autoencoding, whose 4"):
        check_parameters({"training": {"epochs": 3, "strategy": "layerwise_autoencoding"}})


def test_frozen_experts_stay(arm, splits, training):
    """While the rest trains, neither the experts' weights nor their running statistics move."""
    config = change(training, epochs=9, strategy="pretrain_freeze_finetune")
    seen = {}

    def keep(epoch):
        seen[epoch.number] = epoch.phase

    states = {}
    original = loop.Fit.select

    def spy(self, epoch, network):
        if epoch.phase == "train_rest":
            states[epoch.number] = {k: v.clone() for k, v in network.state_dict().items() if k.startswith("experts")}
        original(self, epoch, network)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Fit, "select", spy)
        train_arm(arm, splits, config, seeds=(1,), device=CPU, callbacks=[keep])
    first, *others = states.values()

    assert list(seen.values()).count("train_rest") > 1
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_checkpoint_is_the_best_on_validation(arm, splits, training):
    """The weights that come back score on the validation set what the best epoch scored."""
    checkpoint, result = train_arm(arm, splits, change(training, epochs=6), seeds=(1, 2), device=CPU)
    accuracies = score(checkpoint, splits.val, splits, training, device=CPU)["accuracy"]

    for s, seed in enumerate((1, 2)):
        best = max(row["val_accuracy"] for row in histories(result, seed))
        chosen = histories(result, seed)[checkpoint.best_epochs[s] - 1]["val_accuracy"]
        assert accuracies[s] == pytest.approx(best) == pytest.approx(chosen)


def test_accumulation_equals_the_large_batch(arm, splits, training):
    """Two half batches make the update of the whole one, where no layer looks at the batch."""

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = Linear(Stack(1), splits.in_dim, splits.num_classes)

        def forward(self, x):
            return self.linear(x.unsqueeze(1)).squeeze(1), {}

    def final(batch_size, steps):
        model = Flat()
        config = change(
            training,
            epochs=1,
            optimizer="sgd",
            momentum=0.0,
            weight_decay=0.0,
            accumulation_steps=steps,
            batch_size=batch_size,
        )
        objective = weighted_sum({"cross_entropy": (1.0, cross_entropy())})
        batches = Batches(splits, (1,), batch_size=batch_size, augmentation_strength=0.0)
        fit([Phase("train", 1, model, objective, [model])], batches, splits.val, config)
        return model.linear.weight

    def by_hand(batch_size, steps):
        weight = torch.zeros(splits.in_dim, splits.num_classes, requires_grad=True)
        bias = torch.zeros(splits.num_classes, requires_grad=True)
        cut = Batches(splits, (1,), batch_size=batch_size, augmentation_strength=0.0)
        batches = [(x[0], y[0]) for x, y in cut.epoch(1)]
        for start in range(0, len(batches), steps):
            group = batches[start : start + steps]
            loss = sum(torch.nn.functional.cross_entropy(x @ weight + bias, y) for x, y in group) / len(group)
            gradients = torch.autograd.grad(loss, [weight, bias])
            with torch.no_grad():
                weight -= training.learning_rate * gradients[0]
                bias -= training.learning_rate * gradients[1]
        return weight

    # 297 images: 9 batches of 33; 27 of 11 in groups of 3; 9 of 33 in groups of 2 and a last one alone.
    torch.testing.assert_close(final(33, 1), final(11, 3))
    torch.testing.assert_close(final(33, 2)[0, 0], by_hand(33, 2))


def test_early_stopping_stops_each_seed_by_itself(arm, splits, training):
    """A seed that is no better for `patience` epochs has no further rows, and the others go on as without it."""
    config = change(training, epochs=30, early_stopping_patience=2)
    _, result = train_arm(arm, splits, config, seeds=(1, 2, 3), device=CPU)
    _, unstopped = train_arm(arm, splits, change(training, epochs=30), seeds=(1, 2, 3), device=CPU)

    for s, seed in enumerate((1, 2, 3)):
        rows = histories(result, seed)
        assert len(rows) == result.num_epochs[s] == result.best_epochs[s] + 2 or len(rows) == 30
        assert rows == histories(unstopped, seed)[: len(rows)]
    assert min(result.num_epochs) < 30


def test_early_stopping_may_watch_the_loss(arm, splits, training):
    """A seed stops after `patience` epochs without a lower loss of validation, whatever its accuracy did."""
    config = change(training, epochs=60, learning_rate=0.05, early_stopping_patience=3, early_stopping_metric="loss")
    _, result = train_arm(arm, splits, config, seeds=(1, 2), device=CPU)

    losses = [[epoch.metrics["val_loss"][s] for epoch in result.epochs if epoch.running[s]] for s in range(2)]
    assert all(len(of_seed) == 1 + min(range(len(of_seed)), key=of_seed.__getitem__) + 3 for of_seed in losses)
    assert max(map(len, losses)) < 60


def explode(monkeypatch, in_epoch):
    """Let the weights of the second seed become infinite at the start of this epoch."""
    original = loop._PhaseTraining.begin

    def begin(self, epoch, *, goes_on):
        original(self, epoch, goes_on=goes_on)
        if epoch == in_epoch:
            with torch.no_grad():
                for weight in self.parameters:
                    weight[1] = math.inf

    monkeypatch.setattr(loop._PhaseTraining, "begin", begin)


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 1.0, "ema_decay": 0.9}, {"precision": "fp16"}])
def test_diverged_seed_is_stopped_and_named(arm, splits, training, caplog, monkeypatch, changes):
    """A loss that is no longer finite ends that seed within the epoch; its last good weights are kept, it is told.

    The seed beside it is not moved by a bit.
    """
    config = change(training, **changes)
    _, undisturbed = train_arm(arm, splits, config, seeds=(1, 2), device=CPU)
    explode(monkeypatch, in_epoch=3)
    checkpoint, result = train_arm(arm, splits, config, seeds=(1, 2), device=CPU)

    assert result.diverged == [False, True]
    assert [len(histories(result, seed)) for seed in (1, 2)] == [4, 3]
    assert histories(result, 1) == histories(undisturbed, 1)
    assert 1 <= checkpoint.best_epochs[1] <= 2
    assert all(tensor.isfinite().all() for tensor in checkpoint.weights.values())
    assert "seed 2: the loss was no longer finite in epoch 3; its weights after epoch" in caplog.text


@pytest.mark.parametrize("strategy", ["end_to_end", "pretrain_freeze_finetune"])
def test_seed_that_never_had_good_weights_has_none_chosen(arm, splits, training, caplog, monkeypatch, strategy):
    """The others go on; nothing of it can be taken for a result."""
    explode(monkeypatch, in_epoch=1)
    checkpoint, result = train_arm(arm, splits, change(training, strategy=strategy), seeds=(1, 2), device=CPU)

    assert checkpoint.best_epochs[0] > 0 and checkpoint.best_epochs[1] == 0
    assert result.num_epochs == [4, 1]
    assert "seed 2: the loss was no longer finite in epoch 1; there were no good weights before" in caplog.text


def test_all_seeds_may_diverge(arm, splits, training, monkeypatch):
    """Training ends there, with a checkpoint of nothing."""
    monkeypatch.setattr(loop, "_PhaseTraining", ExplodingTraining)
    checkpoint, result = train_arm(arm, splits, training, seeds=(1, 2), device=CPU)

    assert result.diverged == [True, True] and checkpoint.best_epochs == (0, 0)
    assert result.num_epochs == [1, 1] and result.epochs[-1].finished


class ExplodingTraining(loop._PhaseTraining):
    """Every seed's weights are infinite from the start."""

    def begin(self, epoch, *, goes_on):
        super().begin(epoch, goes_on=goes_on)
        with torch.no_grad():
            for weight in self.parameters:
                weight.fill_(math.inf)


@pytest.mark.parametrize("strategy", ["pretrain_freeze_finetune", "layerwise_autoencoding"])
def test_losses_of_low_precision_are_summed_in_full(arm, splits, training, strategy):
    """The first epoch's losses in bf16 are those in fp32, up to the rounding of the products."""
    config = change(training, strategy=strategy, epochs=5)
    _, exact = train_arm(arm, splits, config, seeds=(1,), device=CPU)
    _, rounded = train_arm(arm, splits, change(config, precision="bf16"), seeds=(1,), device=CPU)

    assert rounded.history[0]["train_loss"] == pytest.approx(exact.history[0]["train_loss"], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "multi_step"])
def test_optimizers_and_schedules_learn(arm, splits, training, optimizer, schedule):
    """Every pair of optimiser and schedule lowers the loss."""
    config = change(
        training,
        epochs=5,
        optimizer=optimizer,
        schedule=schedule,
        learning_rate=0.05 if optimizer == "sgd" else 5e-3,
        warmup_epochs=0 if schedule == "one_cycle" else 1,
        label_smoothing=0.1,
        clip_norm=1.0,
        ema_decay=0.9,
    )
    _, result = train_arm(arm, splits, config, seeds=(1,), device=CPU)

    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns(arm, splits, training, precision):
    """Autocast to 16 bits trains to about the same accuracy, and the weights stay fp32."""
    config = change(training, epochs=15, precision=precision)
    checkpoint, _ = train_arm(arm, splits, config, seeds=(1, 2), device=CPU)

    assert min(score(checkpoint, splits.test, splits, training, device=CPU)["accuracy"]) > 90
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.float32}


def test_validation_is_never_augmented_and_never_drops(arm, splits, training):
    """Evaluating twice gives the same numbers, and the split of it into chunks does not matter."""
    checkpoint, _ = train_arm(arm, splits, change(training, augmentation_strength=1.0), seeds=(1,), device=CPU)
    once = score(checkpoint, splits.val, splits, training, device=CPU)
    chunked = score(checkpoint, splits.val, splits, change(training, eval_batch_size=7), device=CPU)

    assert once["accuracy"] == pytest.approx(chunked["accuracy"])
    assert once["loss"] == pytest.approx(chunked["loss"], rel=1e-5)


def test_top_five_counts_the_five_likeliest(splits, training):
    """Top-1 counts the likeliest class, top-5 any of the five likeliest (all, where there are fewer)."""

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.arange(7.0).flip(0).expand(1, x.shape[1], 7), {}

    images = Images(splits.val.images[:7], torch.arange(7))
    scores = evaluate(Fixed(), images, Normalise(splits, CPU), training)

    assert scores["accuracy"].item() == pytest.approx(100 / 7)
    assert scores["top5_accuracy"].item() == pytest.approx(500 / 7)
    assert math.isfinite(scores["loss"].item())


@pytest.mark.parametrize(
    ("accumulation", "first", "at_once", "stops"),
    [
        (1, 0, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1, 0, 4, [4, 8, 9]),
        (1, 6, 4, [8, 9]),
        (2, 0, 4, [4, 5]),
        (2, 0, 3, [3, 4, 5]),
        (9, 0, 4, [1]),
        (20, 0, 4, [1]),
    ],
)
def test_stops_of_an_epoch(arm, splits, training, monkeypatch, accumulation, first, at_once, stops):
    """On a GPU some updates are done at once, never across the last, smaller group; every update is done once."""
    config = change(training, accumulation_steps=accumulation)
    batches = Batches(splits, (1,), batch_size=32, augmentation_strength=0.0)
    model = build_arm(arm, num_seeds=1)
    phase = Phase("train", 4, model, weighted_sum({"cross_entropy": (1.0, cross_entropy())}), [model])
    (span,) = loop._lay_out([phase], batches, config)
    phase_training = loop._PhaseTraining(phase, span, splits.val, config)
    monkeypatch.setattr(loop.cuda, "UPDATES_AT_ONCE", at_once)
    if at_once > 1:
        phase_training.device = torch.device("cuda")

    assert phase_training.stops(first) == stops


def test_updates_of_convolutions_are_done_one_by_one(splits, training):
    """Ten of them would take too long to record."""
    arm = make_image_arm(
        "resnet18", image_architecture("resnet18", splits.image_shape, GateConfig(), width=2), num_classes=10
    )
    batches = Batches(splits, (1,), batch_size=32, augmentation_strength=0.0)
    phases = plan_phases(arm, build_arm(arm, num_seeds=1), training, num_seeds=1)
    spans = loop._lay_out(phases, batches, training)
    phase_training = loop._PhaseTraining(phases[0], spans[0], splits.val, training)
    phase_training.device = torch.device("cuda")

    assert phase_training.stops(0) == [*range(1, len(batches) + 1)]


def test_updates_at_once_are_updates_one_by_one(arm, splits, training, monkeypatch):
    """However many the host starts together."""
    expected, _ = train_arm(arm, splits, change(training, accumulation_steps=2), seeds=(1,), device=CPU)
    monkeypatch.setattr(loop._PhaseTraining, "stops", lambda self, first: [3, 4, 5])
    checkpoint, _ = train_arm(arm, splits, change(training, accumulation_steps=2), seeds=(1,), device=CPU)

    assert all(torch.equal(checkpoint.weights[name], tensor) for name, tensor in expected.weights.items())


EVERYTHING = {"ema_decay": 0.9, "optimizer": "adamw", "schedule": "cosine", "precision": "fp16", "weight_decay": 0.1}


@pytest.mark.parametrize("changes", [EVERYTHING, EVERYTHING | {"optimizer": "sgd", "precision": "fp32"}])
def test_phases_that_go_on_are_one_training(arm, splits, training, changes):
    """Averages, moments, counts and scales are carried over a boundary where nothing else changes."""

    def train(*epochs):
        model = build_arm(arm, num_seeds=2)
        initialise(model, [make_generator(seed, "weights") for seed in (1, 2)])
        objective = weighted_sum({"cross_entropy": (1.0, cross_entropy())})
        phases = [Phase("train", number, model, objective, [model], goes_on=True) for number in epochs]
        batches = Batches(splits, (1, 2), batch_size=32, augmentation_strength=0.0)
        result = fit(phases, batches, splits.val, change(training, epochs=4, **changes))
        return result, model.state_dict()

    (whole, expected), (parts, weights) = train(4), train(1, 2, 1)
    clocks = {"seconds"}
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(parts.weights[name], tensor) for name, tensor in whole.weights.items())
    for mine, other in zip(parts.history, whole.history, strict=True):
        assert {k: v for k, v in mine.items() if k not in clocks} == {k: v for k, v in other.items() if k not in clocks}


def test_what_still_trains_keeps_its_moments_where_other_parts_are_frozen(arm, splits, training):
    config = change(training, ema_decay=0.9)
    model = build_arm(arm, num_seeds=1)
    initialise(model, [make_generator(1, "weights")])
    batches = Batches(splits, (1,), batch_size=32, augmentation_strength=0.0)
    objective = weighted_sum({"cross_entropy": (1.0, cross_entropy())})
    phases = [
        Phase("train", 2, model, objective, trained, goes_on=True) for trained in ([model], [model.experts, model.head])
    ]
    spans = loop._lay_out(phases, batches, config)
    first, second = (
        loop._PhaseTraining(phase, span, splits.val, config) for phase, span in zip(phases, spans, strict=True)
    )
    model.requires_grad_(True)
    first.begin(1, goes_on=False)
    first.update(0, 5)
    second.carry_on(first)

    assert 0 < len(second.parameters) < len(first.parameters)
    for weight in second.parameters:
        for name, tensor in first.optimizer.state[weight].items():
            assert torch.equal(second.optimizer.state[weight][name], tensor)
            assert name != "step" or tensor == 5
    averaged = second.averaged.network.state_dict()
    assert all(torch.equal(averaged[name], tensor) for name, tensor in first.averaged.network.state_dict().items())
    assert any(not torch.equal(averaged[name], tensor) for name, tensor in model.state_dict().items())
