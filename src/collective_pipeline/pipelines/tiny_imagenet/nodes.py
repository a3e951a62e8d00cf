"""Techniques as arms: what each changes of a network or of its training."""

from collective_pipeline.config import (
    TECHNIQUES,
    Arm,
    GateConfig,
    Parameters,
    Technique,
    TinyImagenetConfig,
)
from collective_pipeline.data.splits import Splits
from collective_pipeline.models.image_arms import image_architecture, make_image_arm


def set_recipes(settings: Parameters) -> list[Parameters]:
    """The settings of every arm: the plain training with its technique."""
    return [
        settings.model_copy(update={"training": settings.tiny_imagenet.training_of(technique)})
        for technique in TECHNIQUES
    ]


def make_arms(settings: Parameters, splits: Splits) -> list[Arm]:
    """The network of every arm."""
    return list_arms(settings.tiny_imagenet, splits.image_shape, splits.num_classes)


def list_arms(config: TinyImagenetConfig, image_shape: tuple[int, int, int], num_classes: int) -> list[Arm]:
    """The network of every arm, for such images.

    Raises:
        UserError: If the images are too small.
    """
    return [_make_arm(technique, config, image_shape, num_classes) for technique in TECHNIQUES]


def _make_arm(
    technique: Technique, config: TinyImagenetConfig, image_shape: tuple[int, int, int], num_classes: int
) -> Arm:
    def has(other: Technique) -> bool:
        return technique in {other, "all_techniques"}

    channels, height, _ = image_shape
    side = config.image_size_of(technique, height)
    architecture = image_architecture(
        config.model,
        (channels, side, side),
        GateConfig(),
        stem=config.stem,
        width=config.width,
        blur=has("blur"),
        drop_path=config.drop_path if has("stochastic_depth") else 0.0,
        head="conv" if has("conv_head") else "linear",
    )
    # Images of an earlier stage may be too small where those of the last one are not.
    for smaller in sorted({stage.image_size or side for stage in config.training_of(technique).stages} - {side}):
        at_first = architecture.model_copy(update={"image_shape": (channels, smaller, smaller)})
        make_image_arm(technique, at_first, num_classes=num_classes)
    return make_image_arm(technique, architecture, num_classes=num_classes)
