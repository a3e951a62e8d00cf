from collective_pipeline.config import MODEL_TYPES
from collective_pipeline.pipeline_registry import register_pipelines


def test_building_the_pipelines_is_quiet_and_every_arm_is_one_whole_namespace():
    """Kedro warns, on every command, of a namespace that a path leaves and enters again; here warnings are errors."""
    phase1 = register_pipelines()["phase1"]

    for model_type in MODEL_TYPES:
        names = [node.name for node in phase1.only_nodes_with_namespaces([model_type]).nodes]
        assert names == [f"{model_type}.train", f"{model_type}.evaluate"]


def test_no_arm_trains_before_all_are_cleared_for_training():
    phase1 = register_pipelines()["phase1"]

    for model_type in MODEL_TYPES:
        assert "clear_for_training" in {node.name for node in phase1.to_nodes(f"{model_type}.train").nodes}
