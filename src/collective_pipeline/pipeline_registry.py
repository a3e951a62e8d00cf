"""The pipelines that `kedro run --pipeline` knows."""

from collections.abc import Mapping

from kedro.pipeline import Pipeline

from collective_pipeline.config import MODEL_TYPES, ModelType
from collective_pipeline.pipelines import arm, comparison, data, predict, sweep


def make_experiment(name: str, arms: Mapping[str, ModelType | None]) -> Pipeline:
    """Shared data, one namespaced copy of the arm's pipeline for each of `arms`, and their comparison."""
    return sum(
        (arm.create_pipeline(namespace, num_arms=len(arms)) for namespace in arms),
        start=data.create_pipeline() + arm.create_preparation(arms) + comparison.create_pipeline(name, arms=list(arms)),
    )


def register_pipelines() -> dict[str, Pipeline]:
    """`single` runs the arm that the parameter `model_type` names, `phase1` all seven, `sweep` all at many sizes.

    `predict` only uses what they trained.
    """
    single = make_experiment("single", {"single": None})
    phase1 = make_experiment("phase1", {model_type: model_type for model_type in MODEL_TYPES})
    return {
        "__default__": single,
        "single": single,
        "phase1": phase1,
        "sweep": data.create_pipeline() + sweep.create_pipeline("sweep"),
        "predict": predict.create_pipeline(),
    }
