"""A learnable set of tiny images, and arms small enough for a second."""

import pytest
import torch

from collective_pipeline.config import Arm, BaselineConfig, CollectiveConfig, TrainingConfig
from collective_pipeline.data.splits import Images, RawImages, Splits, make_splits
from collective_pipeline.models.matching import match_arm

CLASSES, SIDE = 3, 6


def make_images(num_images: int, seed: int) -> Images:
    """Each class is a bright row of its own in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % CLASSES
    images = torch.randint(0, 100, (num_images, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    images[torch.arange(num_images), 0, 2 * labels] += 120
    return Images(images, labels)


@pytest.fixture(scope="session")
def splits() -> Splits:
    raw = RawImages("mnist", make_images(330, 0), make_images(60, 1), tuple("abc"))
    return make_splits(raw, val_fraction=0.1, split_seed=0)


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
def arm(collective: CollectiveConfig) -> Arm:
    return match_arm("collective", collective, BaselineConfig(), in_dim=SIDE * SIDE, num_classes=CLASSES)


@pytest.fixture(scope="session")
def training() -> TrainingConfig:
    return TrainingConfig(epochs=4, batch_size=32, augmentation_strength=0.0, learning_rate=5e-3)
