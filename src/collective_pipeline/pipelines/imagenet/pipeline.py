"""Index, perhaps pack, train, evaluate."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.pipelines import arm
from collective_pipeline.pipelines.data import create_reader
from collective_pipeline.pipelines.imagenet.nodes import (
    clear_for_training,
    describe_updates,
    index_files,
    make_network,
    open_images,
    train,
)

ARM = "imagenet_network"


def create_pipeline() -> Pipeline:
    """From a folder of images to the results of the network."""
    return Pipeline(
        [
            create_reader("imagenet"),
            Node(
                index_files,
                inputs=["settings", "imagenet.known_index"],
                outputs=["imagenet.index", "imagenet.found"],
                name="index_files",
            ),
            Node(
                open_images,
                inputs=["settings", "imagenet.index", "imagenet.packed"],
                outputs="splits",
                name="open_images",
            ),
            Node(make_network, inputs=["settings", "splits"], outputs=f"{ARM}.arm", name="make_network"),
            Node(
                clear_for_training,
                inputs=["splits", "settings", "device", f"{ARM}.arm", f"{ARM}.last"],
                outputs=f"{ARM}.snapshots",
                name="clear_for_training",
            ),
            Node(
                describe_updates,
                inputs=["settings", f"{ARM}.snapshots"],
                outputs="imagenet.facts",
                name="describe_updates",
            ),
        ]
    ) + arm.create_pipeline(ARM, num_arms=1, train=train)
