"""Match, train, evaluate: the same nodes for every arm."""

from collections.abc import Iterable
from functools import partial, update_wrapper

from kedro.pipeline import Node, Pipeline

from collective_pipeline.config import ModelType
from collective_pipeline.pipelines.arm.nodes import clear_for_training, evaluate, find_saved, match_size, train


def create_pipeline(namespace: str, *, model_type: ModelType | None = None, num_arms: int = 1) -> Pipeline:
    """One arm in its namespace; data, settings and device are shared with the others.

    Args:
        namespace: Of the arm's own datasets, and its box in Kedro-Viz.
        model_type: What it is; None: what the parameter `model_type` says.
        num_arms: Of the comparison, so that the first epoch can tell how long all of it takes.
    """
    return Pipeline(
        [
            Node(
                update_wrapper(partial(match_size, model_type=model_type), match_size),
                inputs=["settings", "splits"],
                outputs="arm",
                name="match_size",
            ),
            Node(
                find_saved,
                inputs=["arm", "splits", "settings", "device", "last"],
                outputs="snapshots",
                name="find_saved",
            ),
            Node(
                update_wrapper(partial(train, num_arms=num_arms), train),
                inputs=["arm", "splits", "settings", "device", "snapshots", "is_clear"],
                outputs=["checkpoint", "history"],
                name="train",
                tags=["train"],
            ),
            Node(
                evaluate,
                inputs=["checkpoint", "history", "splits", "settings", "device"],
                outputs="results",
                name="evaluate",
                tags=["evaluate"],
            ),
        ],
        namespace=namespace,
        inputs={"settings", "splits", "device", "is_clear"},
    )


def create_gate(arms: Iterable[str]) -> Pipeline:
    """What stands between the checks of all arms and the training of any."""
    snapshots = [f"{arm}.snapshots" for arm in arms]
    return Pipeline([Node(clear_for_training, inputs=snapshots, outputs="is_clear", name="clear_for_training")])
