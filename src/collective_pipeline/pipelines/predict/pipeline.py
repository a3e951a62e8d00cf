"""Choose a checkpoint, find the images, predict."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.pipelines.data import create_reader
from collective_pipeline.pipelines.predict.nodes import choose_checkpoint, list_images, predict


def create_pipeline() -> Pipeline:
    """From the parameters `images`, and what names a checkpoint and its seed, to a table of probabilities."""
    return Pipeline([create_reader()]) + Pipeline(
        [
            Node(choose_checkpoint, inputs=["settings", "models"], outputs="model", name="choose_checkpoint"),
            Node(list_images, inputs=["settings", "model"], outputs="images", name="list_images"),
            Node(
                predict, inputs=["images", "model", "settings", "device"], outputs="predictions", name="predict_images"
            ),
        ],
        namespace="predict",
        inputs={"settings", "device"},
    )
