"""Compare, plot, report."""

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper

from kedro.pipeline import Node, Pipeline
from plotly.graph_objects import Figure

from collective_pipeline.evaluation.figures import (
    plot_accuracy,
    plot_accuracy_against_params,
    plot_differences,
    plot_gates,
)
from collective_pipeline.pipelines.comparison.nodes import (
    analyse_gates,
    compare,
    measure,
    plot_curves,
    report,
    with_reference,
)


def draw(plot: Callable[..., Figure], name: str, tables: Sequence[str] = ("comparison",)) -> Node:
    """The node that plots these tables, with the arm that the others are compared to, as the figure of this name."""
    return Node(with_reference(plot), inputs=["settings", *tables], outputs=f"{name}_figure", name=f"plot_{name}")


def create_pipeline(namespace: str, *, arms: Sequence[str], gated: str | None = None) -> Pipeline:
    """The comparison of these arms, each named by the namespace of its own pipeline.

    Args:
        namespace: Of the comparison.
        arms: In their order in tables.
        gated: The one whose gates are looked into.
    """
    # Names without dots inside the pipeline; each is mapped to the arm's own dataset.
    models = {f"{arm}_arm": f"{arm}.arm" for arm in arms}
    results = {f"{arm}_results": f"{arm}.results" for arm in arms}
    histories = {f"{arm}_history": f"{arm}.history" for arm in arms}
    shared = {"settings": "settings", "splits": "splits", "device": "device"}
    tables = ["runs", "comparison"]
    gates = ["gates", "gates_by_class"] if gated is not None else []
    nodes = [
        Node(measure, inputs=["device", *models, *results], outputs="latency", name="measure_latency"),
        Node(compare, inputs=["settings", "latency", *results], outputs=[*tables, "summary"], name="compare"),
        draw(plot_accuracy, "accuracy"),
        draw(plot_accuracy_against_params, "params", tables),
        Node(plot_curves, inputs=[*histories], outputs="curves_figure", name="plot_curves"),
        Node(
            update_wrapper(partial(report, num_gates=len(gates)), report),
            inputs=["settings", "splits", "device", *tables, "summary", *gates, *histories],
            outputs="report",
            name="report",
        ),
    ]
    if len(arms) > 1:
        nodes.append(draw(plot_differences, "differences"))
    trained = {}
    if gated is not None:
        trained = {"checkpoint": f"{gated}.checkpoint"}
        nodes += [
            Node(analyse_gates, inputs=["checkpoint", "splits", "device"], outputs=gates, name="analyse_gates"),
            Node(plot_gates, inputs="gates_by_class", outputs="gates_figure", name="plot_gates"),
        ]
    return Pipeline(nodes, namespace=namespace, inputs=shared | models | results | histories | trained)
