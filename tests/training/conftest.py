"""Arms small enough for a second."""

import pytest

from collective_pipeline.config import Arm, BaselineConfig, CollectiveConfig, TrainingConfig
from collective_pipeline.data.splits import Splits
from collective_pipeline.models.matching import match_arm


@pytest.fixture(scope="session")
def collective() -> CollectiveConfig:
    return CollectiveConfig(
        n_total=5,
        n_experts=2,
        expert_hidden=(16, 12),
        expert_output=8,
        analyst_hidden=(10, 8),
        analyst_output=6,
        c_expert=0.5,
        analyst_encoder=True,
    )


@pytest.fixture(scope="session")
def arm(collective: CollectiveConfig, splits: Splits) -> Arm:
    return match_arm("collective", collective, BaselineConfig(), in_dim=splits.in_dim, num_classes=splits.num_classes)


@pytest.fixture(scope="session")
def training() -> TrainingConfig:
    return TrainingConfig(epochs=4, batch_size=32, augmentation_strength=0.0, learning_rate=5e-3)
