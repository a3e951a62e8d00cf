"""Choose a checkpoint, serve it."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.pipelines.data import create_reader
from collective_pipeline.pipelines.demo.nodes import choose_checkpoint, serve


def create_pipeline() -> Pipeline:
    """From the parameters `demo`, `checkpoint` and `checkpoint_seed` to a page that answers until it is stopped."""
    return Pipeline([create_reader()]) + Pipeline(
        [
            Node(
                choose_checkpoint, inputs=["settings", "models", "outputs"], outputs="served", name="choose_checkpoint"
            ),
            Node(serve, inputs=["served", "settings", "device"], outputs=None, name="serve"),
        ],
        namespace="demo",
        inputs={"settings", "device"},
    )
