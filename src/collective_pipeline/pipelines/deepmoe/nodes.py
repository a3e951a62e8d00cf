"""What the parameters of DeepMoE say, in the form that every experiment has."""

from collective_pipeline.config import (
    Arm,
    DeepMoeConfig,
    ImageModelType,
    NarrowModelType,
    Parameters,
)
from collective_pipeline.data.splits import Splits
from collective_pipeline.models.image_arms import image_architecture, make_image_arm


def make_arms(settings: Parameters, splits: Splits) -> list[Arm]:
    """The network with gates, the same one without, and a narrower one without."""
    return list_arms(settings.deepmoe, splits.image_shape, splits.num_classes)


def list_arms(config: DeepMoeConfig, image_shape: tuple[int, int, int], num_classes: int) -> list[Arm]:
    """The arms of the experiment for such images.

    Raises:
        UserError: If the images are too small.
    """
    narrow_width = max(1, round(config.narrow * config.width))
    networks: list[tuple[ImageModelType | NarrowModelType, ImageModelType, int]] = [
        (config.model, config.model, config.width),
        (config.dense_model, config.dense_model, config.width),
        ("narrow", config.dense_model, narrow_width),
    ]
    arms = []
    for model_type, name, width in networks:
        architecture = image_architecture(
            name, image_shape, config.gates, stem=config.stem, width=width, wide=config.wide
        )
        arms.append(make_image_arm(model_type, architecture, num_classes=num_classes))
    return arms
