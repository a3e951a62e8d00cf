"""What every arm shares: the settings, the device and the split images."""

from typing import Any

import torch

from collective_pipeline.config import OwnExperiment, Parameters, check_parameters
from collective_pipeline.data.batches import check_batches
from collective_pipeline.data.splits import RawImages, Splits, make_splits
from collective_pipeline.training.runtime import choose_device


def read_settings(
    parameters: dict[str, Any], experiment: OwnExperiment | None = None
) -> tuple[Parameters, torch.device]:
    """All parameters, typed, with what this experiment has of its own, and the device that they name."""
    settings = check_parameters(parameters)
    if experiment is not None:
        settings = settings.of_experiment(experiment)
    return settings, choose_device(settings.device)


def split_images(raw_images: RawImages, settings: Parameters) -> Splits:
    """Training, validation and test images: the same for every arm and every seed."""
    splits = make_splits(raw_images, val_fraction=settings.data.val_fraction, split_seed=settings.data.split_seed)
    check_batches(splits, settings.training.batch_size, settings.training.cutout)
    return splits
