"""One arm for each technique, each with a training of its own."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.config import TECHNIQUES
from collective_pipeline.pipelines import arm, data
from collective_pipeline.pipelines.tiny_imagenet.nodes import clear_for_training, make_arms, read_settings, set_recipes

ARMS = tuple(f"tiny_imagenet_{technique}" for technique in TECHNIQUES)


def create_pipeline() -> Pipeline:
    """From raw images to the results of all arms."""
    images = data.create_pipeline(read_settings, raw_images="tiny_imagenet.raw_images")
    arms = (arm.create_pipeline(name, num_arms=len(ARMS), settings=f"{name}.settings") for name in ARMS)
    return sum(arms, start=images + _create_preparation())


def _create_preparation() -> Pipeline:
    """What comes before any training: all that can be refused is refused here."""
    return Pipeline(
        [
            Node(set_recipes, inputs="settings", outputs=[f"{name}.settings" for name in ARMS], name="set_recipes"),
            Node(make_arms, inputs=["settings", "splits"], outputs=[f"{name}.arm" for name in ARMS], name="make_arms"),
            Node(
                clear_for_training,
                inputs=[
                    "splits",
                    "device",
                    *(f"{name}.{part}" for part in ("arm", "last", "settings") for name in ARMS),
                ],
                outputs=[f"{name}.snapshots" for name in ARMS],
                name="clear_for_training",
            ),
        ]
    )
