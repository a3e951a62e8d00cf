"""Compare, plot, report."""

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from collective_pipeline.evaluation.figures import plot_accuracy, plot_accuracy_against_params, plot_differences
from collective_pipeline.pipelines.comparison.nodes import compare, measure, plot_curves, report


def create_pipeline(namespace: str, *, arms: Sequence[str]) -> Pipeline:
    """The comparison of these arms, each named by the namespace of its own pipeline."""
    # Names without dots inside the pipeline; each is mapped to the arm's own dataset.
    models = {f"{arm}_arm": f"{arm}.arm" for arm in arms}
    results = {f"{arm}_results": f"{arm}.results" for arm in arms}
    histories = {f"{arm}_history": f"{arm}.history" for arm in arms}
    shared = {"settings": "settings", "splits": "splits", "device": "device"}
    tables = ["runs", "comparison"]
    nodes = [
        Node(measure, inputs=["device", *models, *results], outputs="latency", name="measure_latency"),
        Node(compare, inputs=["settings", "latency", *results], outputs=[*tables, "summary"], name="compare"),
        Node(plot_accuracy, inputs="comparison", outputs="accuracy_figure", name="plot_accuracy"),
        Node(plot_accuracy_against_params, inputs=tables, outputs="params_figure", name="plot_params"),
        Node(plot_curves, inputs=[*histories], outputs="curves_figure", name="plot_curves"),
        Node(
            report,
            inputs=["settings", "splits", "device", *tables, "summary", *histories],
            outputs="report",
            name="report",
        ),
    ]
    if len(arms) > 1:
        nodes.append(Node(plot_differences, inputs="comparison", outputs="differences_figure", name="plot_differences"))
    return Pipeline(nodes, namespace=namespace, inputs=shared | models | results | histories)
