from pathlib import Path

from kedro.config import OmegaConfigLoader
from kedro.io import DataCatalog
from kedro_viz.data_access.managers import DataAccessManager

from collective_pipeline.config import MODEL_TYPES
from collective_pipeline.pipeline_registry import register_pipelines

CONF = Path(__file__).parents[1] / "conf"


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


def test_no_graph_in_kedro_viz_loses_its_layers_to_a_cycle():
    """As its server makes them: a box leads from all it takes in to all it gives, also where no node in it does."""
    pipelines = register_pipelines()
    config = OmegaConfigLoader(str(CONF), base_env="base", default_run_env="base")
    graphs = DataAccessManager()
    graphs.add_catalog(DataCatalog.from_config(config["catalog"]), pipelines)
    graphs.add_pipelines(pipelines)
    layers = {}
    for name in pipelines:
        graphs.create_modular_pipelines_tree_for_registered_pipeline(name)  # adds the boxes to the graph
        layers[name] = graphs.get_sorted_layers_for_registered_pipeline(name)

    assert [name for name in layers if not layers[name]] == []
