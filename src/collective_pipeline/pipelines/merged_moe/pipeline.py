"""Group, train sub-models, merge, train; then compare as every experiment does."""

from functools import partial, update_wrapper

from kedro.pipeline import Node, Pipeline

from collective_pipeline.pipelines import arm, data
from collective_pipeline.pipelines.merged_moe.nodes import (
    clear_for_training,
    describe_merging,
    evaluate_mixture,
    group_classes,
    make_arms,
    set_baseline_epochs,
    train_mixture,
    train_sub_models,
)

MIXTURE, COLLECTIVE = "merged_moe_mixture", "merged_moe_conv_collective"
BASELINES = ("merged_moe_dense", "merged_moe_single_expert", COLLECTIVE)
ARMS = (MIXTURE, *BASELINES)


def create_pipeline() -> Pipeline:
    """From raw images to the results of all arms."""
    images = data.create_pipeline("merged_moe", splits="merged_moe.all_classes")
    baselines = (
        arm.create_pipeline(name, num_arms=len(ARMS), settings="merged_moe.baseline_settings") for name in BASELINES
    )
    return sum(baselines, start=images + _create_preparation() + _create_sub_models() + _create_mixture())


def _create_preparation() -> Pipeline:
    """What comes before any training: all that can be refused is refused here."""
    return Pipeline(
        [
            Node(
                group_classes,
                inputs=["settings", "merged_moe.all_classes"],
                outputs=["splits", "merged_moe.groups"],
                name="group_classes",
            ),
            Node(
                set_baseline_epochs,
                inputs=["settings", "splits", "merged_moe.groups"],
                outputs="merged_moe.baseline_settings",
                name="set_baseline_epochs",
            ),
            Node(
                describe_merging,
                inputs=["settings", "merged_moe.baseline_settings", "splits", "merged_moe.groups"],
                outputs=["merged_moe.sub_model_classes", "merged_moe.facts"],
                name="describe_merging",
            ),
            Node(make_arms, inputs=["settings", "splits"], outputs=[f"{name}.arm" for name in ARMS], name="make_arms"),
            Node(
                clear_for_training,
                inputs=[
                    "splits",
                    "settings",
                    "merged_moe.baseline_settings",
                    "device",
                    "merged_moe.groups",
                    "sub_models.last",
                    *(f"{name}.{part}" for part in ("arm", "last") for name in ARMS),
                ],
                outputs=["sub_models.snapshots", *(f"{name}.snapshots" for name in ARMS)],
                name="clear_for_training",
            ),
        ]
    )


def _create_sub_models() -> Pipeline:
    return Pipeline(
        [
            Node(
                update_wrapper(partial(train_sub_models, num_arms=len(ARMS)), train_sub_models),
                inputs=["splits", "settings", "device", "merged_moe.groups", "sub_models.snapshots"],
                outputs=["sub_models.checkpoints", "sub_models.history"],
                # In turn, nodes that could run at the same time run in the order of their names, and sub-models that
                # cannot be merged are to be refused before any arm trains.
                name="fit_sub_models",
            )
        ]
    )


def _create_mixture() -> Pipeline:
    """In its namespace, like the arms beside it."""
    shared = {name: name for name in ("splits", "settings", "device")}
    merged = {
        "groups": "merged_moe.groups",
        "sub_models": "sub_models.checkpoints",
        "sub_model_history": "sub_models.history",
    }
    return Pipeline(
        [
            Node(
                update_wrapper(partial(train_mixture, num_arms=len(ARMS)), train_mixture),
                inputs=["arm", "splits", "settings", "device", "snapshots", "groups", "sub_models"],
                outputs=["checkpoint", "history"],
                name="train",
                tags=["train"],
            ),
            Node(
                evaluate_mixture,
                inputs=["checkpoint", "history", "splits", "settings", "device", "sub_model_history"],
                outputs="results",
                name="evaluate",
                tags=["evaluate"],
            ),
        ],
        namespace=MIXTURE,
        inputs=shared | merged,
    )
