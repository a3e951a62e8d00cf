"""Match, train, evaluate: the same nodes for every arm."""

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any

from kedro.pipeline import Node, Pipeline

from collective_pipeline.config import Arm, ModelType
from collective_pipeline.pipelines.arm.nodes import clear_for_training, evaluate, match_sizes
from collective_pipeline.pipelines.arm.nodes import train as train_here


def matched(model_types: Sequence[ModelType | None]) -> Callable[..., list[Arm]]:
    """The node that makes arms of these types at one size; None: of what the parameter `model_type` says."""
    return update_wrapper(partial(match_sizes, model_types=list(model_types)), match_sizes)


def create_preparation(arms: Sequence[str], make: Callable[..., list[Arm]], *, own_settings: bool = False) -> Pipeline:
    """What all arms pass before any trains.

    It is in no arm's namespace: Kedro warns where a path leaves one and enters it again.

    Args:
        arms: Their namespaces.
        make: From settings and splits to the arm of each.
        own_settings: Whether each arm has settings of its own in its namespace.
    """
    parts = ("arm", "last", "settings") if own_settings else ("arm", "last")
    return Pipeline(
        [
            Node(
                make,
                inputs=["settings", "splits"],
                outputs=[f"{arm}.arm" for arm in arms],
                name=getattr(make, "__name__", "make_arms"),
            ),
            Node(
                clear_for_training,
                inputs=["splits", "settings", "device", *(f"{arm}.{part}" for part in parts for arm in arms)],
                outputs=[f"{arm}.snapshots" for arm in arms],
                name="clear_for_training",
            ),
        ]
    )


def create_pipeline(
    namespace: str, *, num_arms: int, settings: str = "settings", train: Callable[..., Any] | None = None
) -> Pipeline:
    """One arm in its namespace; data, settings and device are shared with the others.

    Args:
        namespace: Of the arm's own datasets, and its box in Kedro-Viz.
        num_arms: Of the comparison, so that the first epoch can tell how long all of it takes.
        settings: The dataset of its settings.
        train: What trains it; None: this process.
    """
    train = train or update_wrapper(partial(train_here, num_arms=num_arms), train_here)
    return Pipeline(
        [
            Node(
                train,
                inputs=["arm", "splits", "settings", "device", "snapshots"],
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
        inputs={"settings": settings, "splits": "splits", "device": "device"},
    )
