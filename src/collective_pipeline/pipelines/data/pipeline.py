"""Parameters and raw images to settings and splits."""

from collections.abc import Callable

import torch
from kedro.pipeline import Node, Pipeline

from collective_pipeline.config import Parameters
from collective_pipeline.pipelines.data.nodes import read_settings, split_images


def create_pipeline(
    read: Callable[..., tuple[Parameters, torch.device]] = read_settings,
    *,
    raw_images: str = "raw_images",
    splits: str = "splits",
) -> Pipeline:
    """What comes before any arm: everything that can be wrong with the input shows here.

    Args:
        read: From all parameters to the settings of the experiment, and the device.
        raw_images: The catalog's entry.
        splits: What the split images are called.
    """
    return Pipeline(
        [
            Node(read, inputs="parameters", outputs=["settings", "device"], name="read_settings"),
            Node(split_images, inputs=[raw_images, "settings"], outputs=splits, name="split_images"),
        ]
    )
