"""Gates that all shut end the training of their seed."""

import logging

import pytest
import torch

from collective_pipeline.config import GateConfig, ResNetArchitecture
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.training.train import train_arm


@pytest.fixture
def gated(splits):
    def make(**gates):
        config = GateConfig(embedding_dim=8, **gates)
        network = ResNetArchitecture(image_shape=splits.image_shape, blocks=(1,), width=4, gated=(0, 1), gates=config)
        return make_image_arm("resnet18_moe", network, num_classes=3)

    return make


@pytest.mark.parametrize("lambda_val", [0.0, 1e6])
def test_a_seed_whose_gates_stay_shut_is_stopped_and_named(gated, splits, training, caplog, lambda_val):
    config = training.model_copy(update={"epochs": 15, "learning_rate": 0.05, "clip_norm": 1.0})
    arm = gated(lambda_val=lambda_val, freeze_epochs=0)
    with caplog.at_level(logging.WARNING):
        _, result = train_arm(arm, splits, config, seeds=(1, 2), device=torch.device("cpu"))

    assert all(3 < number < 15 for number in result.num_epochs) if lambda_val else result.num_epochs == [15, 15]
    assert caplog.text.count("of its gates were shut throughout the 3 epochs up to") == 2 * (lambda_val > 0)
    for s, last in enumerate(result.num_epochs if lambda_val else ()):
        shut = [epoch.metrics["train_open_gates"][s] == 0 for epoch in result.epochs[last - 4 : last]]
        assert shut[1:] == [True] * 3


def test_patience_counts_over_both_stages(gated, splits, training):
    """As it does for the network without gates, which has one."""
    config = training.model_copy(update={"epochs": 40, "learning_rate": 0.02, "early_stopping_patience": 2})
    _, result = train_arm(gated(freeze_epochs=3), splits, config, seeds=(1, 2), device=torch.device("cpu"))

    waited = [last - best for last, best in zip(result.num_epochs, result.best_epochs, strict=True)]
    assert waited == [2, 2] and max(result.num_epochs) < 37
