"""Gates that all shut end the training of their seed."""

import logging

import pytest
import torch

from collective_pipeline.config import GateConfig, ResNetArchitecture
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.training.train import train_arm


@pytest.mark.parametrize(("lambda_val", "epochs"), [(0.0, 4), (1e6, 2)])
def test_a_seed_whose_gates_are_all_shut_is_stopped_and_named(splits, training, caplog, lambda_val, epochs):
    gates = GateConfig(embedding_dim=8, lambda_val=lambda_val, freeze_epochs=0)
    network = ResNetArchitecture(image_shape=splits.image_shape, blocks=(1,), width=4, gated=(0, 1), gates=gates)
    config = training.model_copy(update={"epochs": 4, "learning_rate": 0.05, "clip_norm": 1.0})
    arm = make_image_arm("resnet18_moe", network, num_classes=3)
    with caplog.at_level(logging.WARNING):
        _, result = train_arm(arm, splits, config, seeds=(1, 2), device=torch.device("cpu"))

    assert result.num_epochs == [epochs, epochs]
    assert caplog.text.count(f"all of its gates are shut since epoch {epochs}") == 2 * (lambda_val > 0)
