"""From an experiment's parameters to a rate for it."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.evaluation.rates import plot_rates
from collective_pipeline.pipelines.lr_finder.nodes import find, load_splits, make_arm, read_settings, report


def create_pipeline(namespace: str) -> Pipeline:
    """The search in its namespace. A parameter says of what, and so images come from the folder of all data sets."""
    return Pipeline(
        [Node(read_settings, inputs="parameters", outputs=["settings", "device"], name="read_settings")]
    ) + Pipeline(
        [
            Node(load_splits, inputs=["raw_folder", "settings"], outputs="splits", name="load_splits"),
            Node(make_arm, inputs=["settings", "splits"], outputs="arm", name="make_arm"),
            Node(find, inputs=["arm", "splits", "settings", "device"], outputs=["rates", "summary"], name="find_rates"),
            Node(plot_rates, inputs=["rates", "summary"], outputs="rates_figure", name="plot_rates"),
            Node(report, inputs=["settings", "splits", "device", "rates", "summary"], outputs="report", name="report"),
        ],
        namespace=namespace,
        inputs={"settings", "device"},
        outputs={"splits"},
    )
