"""Parameters and raw images to settings and splits."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.pipelines.data.nodes import read_settings, split_images


def create_pipeline() -> Pipeline:
    """What comes before any arm: everything that can be wrong with the input shows here."""
    return Pipeline(
        [
            Node(read_settings, inputs="parameters", outputs=["settings", "device"], name="read_settings"),
            Node(split_images, inputs=["raw_images", "settings"], outputs="splits", name="split_images"),
        ]
    )
