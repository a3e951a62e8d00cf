"""One arm for each technique, each with a training of its own."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.config import TECHNIQUES
from collective_pipeline.pipelines import arm, data
from collective_pipeline.pipelines.tiny_imagenet.nodes import make_arms, set_recipes

ARMS = tuple(f"tiny_imagenet_{technique}" for technique in TECHNIQUES)


def create_pipeline() -> Pipeline:
    """From raw images to the results of all arms."""
    images = data.create_pipeline("tiny_imagenet")
    arms = (arm.create_pipeline(name, num_arms=len(ARMS), settings=f"{name}.settings") for name in ARMS)
    recipes = Node(set_recipes, inputs="settings", outputs=[f"{name}.settings" for name in ARMS], name="set_recipes")
    preparation = Pipeline([recipes]) + arm.create_preparation(ARMS, make_arms, own_settings=True)
    return sum(arms, start=images + preparation)
