"""The pipelines that `kedro run --pipeline` knows."""

from collections.abc import Callable, Sequence
from typing import Any

from kedro.pipeline import Pipeline

from collective_pipeline.config import MODEL_TYPES, Arm
from collective_pipeline.pipelines import (
    arm,
    comparison,
    data,
    deepmoe,
    demo,
    imagenet,
    lr_finder,
    merged_moe,
    predict,
    sweep,
    tiny_imagenet,
)
from collective_pipeline.pipelines.experiments import DEFAULT


def make_experiment(
    name: str, images: Pipeline, arms: Sequence[str], make: Callable[..., list[Arm]], **looked_into: Any
) -> Pipeline:
    """Shared data, one namespaced copy of the arm's pipeline for each of `arms`, and their comparison.

    Args:
        name: Of the experiment.
        images: What gives settings, device and splits.
        arms: The namespaces.
        make: The node that makes their arms.
        looked_into: What else `comparison.create_pipeline` is told.
    """
    return sum(
        (arm.create_pipeline(namespace, num_arms=len(arms)) for namespace in arms),
        start=images + arm.create_preparation(arms, make) + comparison.create_pipeline(name, arms=arms, **looked_into),
    )


def register_pipelines() -> dict[str, Pipeline]:
    """`single` runs the arm that the parameter `model_type` names, `phase1` all seven, `sweep` all at many sizes.

    `deepmoe` compares a network with gated channels to the one without and to a narrower one, `merged_moe` a mixture
    of experts to three networks of its size, one of them a collective on images, `tiny_imagenet` a plain
    residual network to the same with each of some techniques. `imagenet` trains one on files of any size, on one GPU
    or several. `lr_finder` looks for the learning rate of one of these, `predict` and `demo` only use what was trained.
    """
    images = data.create_pipeline()
    phase1 = make_experiment("phase1", images, MODEL_TYPES, arm.matched(MODEL_TYPES), analysed=["collective"])
    gated = make_experiment(
        "deepmoe",
        data.create_pipeline("deepmoe"),
        ["deepmoe_gated", "deepmoe_dense", "deepmoe_narrow"],
        deepmoe.make_arms,
        analysed=["deepmoe_gated"],
        gated_and_dense=("deepmoe_gated", "deepmoe_dense"),
    )
    merged = comparison.create_pipeline(
        "merged_moe",
        arms=merged_moe.ARMS,
        analysed=[merged_moe.MIXTURE, merged_moe.COLLECTIVE],
        has_facts=True,
        is_merged=True,
    )
    pipelines = {
        "single": make_experiment("single", images, ["single"], arm.matched([None]), analysed=["single"]),
        "phase1": phase1,
        "deepmoe": gated,
        "merged_moe": merged_moe.create_pipeline() + merged,
        "tiny_imagenet": tiny_imagenet.create_pipeline()
        + comparison.create_pipeline("tiny_imagenet", arms=tiny_imagenet.ARMS, analysed=tiny_imagenet.ARMS[:1]),
        "imagenet": imagenet.create_pipeline()
        + comparison.create_pipeline("imagenet", arms=[imagenet.ARM], analysed=[imagenet.ARM], has_facts=True),
        "sweep": images + sweep.create_pipeline("sweep"),
        "lr_finder": lr_finder.create_pipeline("lr_finder"),
        "predict": predict.create_pipeline(),
        "demo": demo.create_pipeline(),
    }
    return {"__default__": pipelines[DEFAULT], **pipelines}
