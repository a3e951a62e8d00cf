"""The pipelines that `kedro run --pipeline` knows."""

from collections.abc import Callable, Sequence

from kedro.pipeline import Pipeline

from collective_pipeline.config import MODEL_TYPES, Arm
from collective_pipeline.pipelines import arm, comparison, data, deepmoe, merged_moe, predict, sweep
from collective_pipeline.pipelines.experiments import DEFAULT


def make_experiment(
    name: str, images: Pipeline, arms: Sequence[str], make: Callable[..., list[Arm]], *, gated: str | None = None
) -> Pipeline:
    """Shared data, one namespaced copy of the arm's pipeline for each of `arms`, and their comparison.

    Args:
        name: Of the experiment.
        images: What gives settings, device and splits.
        arms: The namespaces.
        make: The node that makes their arms.
        gated: The arm whose gates are looked into.
    """
    return sum(
        (arm.create_pipeline(namespace, num_arms=len(arms)) for namespace in arms),
        start=images + arm.create_preparation(arms, make) + comparison.create_pipeline(name, arms=arms, gated=gated),
    )


def register_pipelines() -> dict[str, Pipeline]:
    """`single` runs the arm that the parameter `model_type` names, `phase1` all seven, `sweep` all at many sizes.

    `deepmoe` compares a network with gated channels to the one without and to a narrower one, `merged_moe` a mixture
    of experts to three networks of its size, one of them a collective on images. `predict` only uses what was trained.
    """
    images = data.create_pipeline()
    phase1 = make_experiment("phase1", images, MODEL_TYPES, arm.matched(MODEL_TYPES))
    gated = make_experiment(
        "deepmoe",
        data.create_pipeline(deepmoe.read_settings, raw_images="deepmoe.raw_images"),
        ["deepmoe_gated", "deepmoe_dense", "deepmoe_narrow"],
        deepmoe.make_arms,
        gated="deepmoe_gated",
    )
    pipelines = {
        "single": make_experiment("single", images, ["single"], arm.matched([None])),
        "phase1": phase1,
        "deepmoe": gated,
        "merged_moe": merged_moe.create_pipeline() + comparison.create_pipeline("merged_moe", arms=merged_moe.ARMS),
        "sweep": images + sweep.create_pipeline("sweep"),
        "predict": predict.create_pipeline(),
    }
    return {"__default__": pipelines[DEFAULT], **pipelines}
