"""Parameters and raw images to settings and splits."""

from functools import partial, update_wrapper

from kedro.pipeline import Node, Pipeline

from collective_pipeline.config import OwnExperiment
from collective_pipeline.pipelines.data.nodes import read_settings, split_images


def create_reader(experiment: OwnExperiment | None = None) -> Node:
    """The node that gives the device and the settings, those of an experiment with a section of its own."""
    read = update_wrapper(partial(read_settings, experiment=experiment), read_settings)
    return Node(read, inputs="parameters", outputs=["settings", "device"], name="read_settings")


def create_pipeline(experiment: OwnExperiment | None = None, *, splits: str = "splits") -> Pipeline:
    """What comes before any arm: everything that can be wrong with the input shows here.

    Args:
        experiment: Whose settings and raw images.
        splits: What the split images are called.
    """
    raw_images = "raw_images" if experiment is None else f"{experiment}.raw_images"
    split = Node(split_images, inputs=[raw_images, "settings"], outputs=splits, name="split_images")
    return Pipeline([create_reader(experiment), split])
