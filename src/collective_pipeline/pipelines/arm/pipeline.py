"""Match, train, evaluate: the same nodes for every arm."""

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper

from kedro.pipeline import Node, Pipeline

from collective_pipeline.config import Arm, ModelType
from collective_pipeline.pipelines.arm.nodes import clear_for_training, evaluate, match_sizes, train


def matched(model_types: Sequence[ModelType | None]) -> Callable[..., list[Arm]]:
    """The node that makes arms of these types at one size; None: of what the parameter `model_type` says."""
    return update_wrapper(partial(match_sizes, model_types=list(model_types)), match_sizes)


def create_preparation(arms: Sequence[str], make: Callable[..., list[Arm]]) -> Pipeline:
    """What all arms pass before any trains.

    It is in no arm's namespace: Kedro warns where a path leaves one and enters it again.

    Args:
        arms: Their namespaces.
        make: From settings and splits to the arm of each.
    """
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
                inputs=["splits", "settings", "device", *(f"{arm}.{part}" for part in ("arm", "last") for arm in arms)],
                outputs=[f"{arm}.snapshots" for arm in arms],
                name="clear_for_training",
            ),
        ]
    )


def create_pipeline(namespace: str, *, num_arms: int, settings: str = "settings") -> Pipeline:
    """One arm in its namespace; data, settings and device are shared with the others.

    Args:
        namespace: Of the arm's own datasets, and its box in Kedro-Viz.
        num_arms: Of the comparison, so that the first epoch can tell how long all of it takes.
        settings: The dataset of its settings.
    """
    return Pipeline(
        [
            Node(
                update_wrapper(partial(train, num_arms=num_arms), train),
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
