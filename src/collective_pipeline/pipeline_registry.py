"""The pipelines that `kedro run --pipeline` knows."""

from collections.abc import Callable, Sequence

from kedro.pipeline import Pipeline

from collective_pipeline.config import MODEL_TYPES, Arm
from collective_pipeline.pipelines import arm, comparison, data, deepmoe, merged_moe, predict, sweep


def make_experiment(
    name: str, images: Pipeline, arms: Sequence[str], make: Callable[..., list[Arm]], *, analysed: Sequence[str]
) -> Pipeline:
    """Shared data, one namespaced copy of the arm's pipeline for each of `arms`, and their comparison.

    Args:
        name: Of the experiment.
        images: What gives settings, device and splits.
        arms: The namespaces.
        make: The node that makes their arms.
        analysed: The arms whose experts, members or gates are looked into.
    """
    return sum(
        (arm.create_pipeline(namespace, num_arms=len(arms)) for namespace in arms),
        start=images
        + arm.create_preparation(arms, make)
        + comparison.create_pipeline(name, arms=arms, analysed=analysed),
    )


def register_pipelines() -> dict[str, Pipeline]:
    """`single` runs the arm that the parameter `model_type` names, `phase1` all seven, `sweep` all at many sizes.

    `deepmoe` compares a network with gated channels to the one without, `merged_moe` a mixture of experts to two
    networks of its size. `predict` only uses what was trained.
    """
    images = data.create_pipeline()
    single = make_experiment("single", images, ["single"], arm.matched([None]), analysed=["single"])
    phase1 = make_experiment("phase1", images, MODEL_TYPES, arm.matched(MODEL_TYPES), analysed=["collective"])
    gated = make_experiment(
        "deepmoe",
        data.create_pipeline(deepmoe.read_settings, raw_images="deepmoe.raw_images"),
        ["deepmoe_gated", "deepmoe_dense"],
        deepmoe.make_arms,
        analysed=["deepmoe_gated"],
    )
    merged = comparison.create_pipeline("merged_moe", arms=merged_moe.ARMS, analysed=[merged_moe.MIXTURE])
    return {
        "__default__": single,
        "single": single,
        "phase1": phase1,
        "deepmoe": gated,
        "merged_moe": merged_moe.create_pipeline() + merged,
        "sweep": images + sweep.create_pipeline("sweep"),
        "predict": predict.create_pipeline(),
    }
