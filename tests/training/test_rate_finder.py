"""Looking for a learning rate is the beginning of a training, but for the rates."""

import pytest
import torch

from collective_pipeline.config import LrFinderConfig, ResNetArchitecture, UserError, check_parameters
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.training import rate_finder
from collective_pipeline.training.loop import _PhaseTraining
from collective_pipeline.training.rate_finder import find_rates
from collective_pipeline.training.train import train_arm

CPU = torch.device("cpu")


def change(config, **changes):
    return type(config).model_validate(config.model_dump() | changes)


def test_rates_rise_by_one_factor_and_are_those_that_the_optimiser_uses(arm, splits, training, monkeypatch):
    """From the lowest to the highest, over as many epochs as it takes."""
    used = []
    original = _PhaseTraining._run_update

    def run_update(self, num_batches):
        original(self, num_batches)
        used.append(self.optimizer.param_groups[0]["lr"].item())

    monkeypatch.setattr(_PhaseTraining, "_run_update", run_update)
    finder = LrFinderConfig(lowest=1e-6, highest=1e-2, updates=40)
    rates, losses = find_rates(arm, splits, training, finder, device=CPU)

    assert used == rates and len(losses) == 40
    assert rates[0] == pytest.approx(1e-6) and rates[-1] == pytest.approx(1e-2)
    factors = torch.tensor(rates[1:]) / torch.tensor(rates[:-1])
    torch.testing.assert_close(factors, torch.full_like(factors, 1e4 ** (1 / 39)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2, "ema_decay": 0.9, "augmentation_strength": 1.0}])
def test_at_one_rate_it_is_the_training_itself(arm, splits, training, changes):
    """Update by update: their mean is the epoch's loss, of the same seed, to the last digits."""
    config = change(training, epochs=2, learning_rate=1e-3, **changes)
    updates = 10 if changes else 18
    finder = LrFinderConfig(lowest=1e-3 * (1 - 1e-7), highest=1e-3, updates=max(20, updates), seed=7)
    _, losses = find_rates(arm, splits, config, finder, device=CPU)
    _, trained = train_arm(arm, splits, config, seeds=(7,), device=CPU)

    # The last group of batches in an epoch of nine is smaller where there are groups of two.
    weights = [2, 2, 2, 2, 1] if changes else [1] * 9
    for epoch in (0, 1):
        own = losses[epoch * len(weights) : (epoch + 1) * len(weights)]
        mean = sum(w * loss for w, loss in zip(weights, own, strict=True)) / sum(weights)
        assert mean == pytest.approx(trained.history[epoch]["train_loss"], rel=1e-4)


def test_it_ends_where_the_loss_explodes(arm, splits, training):
    """Far beyond what this network stands; what it does before is what it does without an end."""
    config = change(training, optimizer="sgd", momentum=0.0)
    finder = LrFinderConfig(lowest=1e-3, highest=1e9, updates=60)
    rates, losses = find_rates(arm, splits, config, finder, device=CPU)

    assert 5 < len(rates) == len(losses) < 60
    worst = sum(losses[-rate_finder.LAST :]) / rate_finder.LAST
    assert not worst < 4 * min(losses)


def test_stages_mixing_and_pretraining_begin_as_their_training_does(arm, splits, training):
    """With the images of the first stage; with the first phase of a strategy."""
    network = ResNetArchitecture(image_shape=(1, 12, 12), blocks=(1,), width=4, drop_path=0.0)
    staged = make_image_arm("resnet18", network, num_classes=splits.num_classes)
    stages = [{"epochs": 2, "image_size": 8, "batch_size": 20}, {"epochs": 2, "image_size": 12}]
    finder = LrFinderConfig(lowest=1e-4, highest=1e-2, updates=20)
    for subject, config in (
        (staged, change(training, stages=stages, mixup_alpha=0.2)),
        (arm, change(training, strategy="layerwise_autoencoding")),
    ):
        rates, losses = find_rates(subject, splits, config, finder, device=CPU)
        again = find_rates(subject, splits, config, finder, device=CPU)
        assert len(losses) == 20 and (rates, losses) == again


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lowest": 0.1, "highest": 0.01}, "lr_finder: lowest=0.1 is not below highest=0.01"),
        ({"experiment": "deepmo"}, "did you mean 'deepmoe'"),
        ({"updates": 3}, "lr_finder.updates=3"),
        ({"lowest": 0}, "lr_finder.lowest=0"),
    ],
)
def test_what_cannot_be_is_refused(given, told):
    with pytest.raises(UserError) as error:
        check_parameters({"lr_finder": given})
    assert told in str(error.value)
