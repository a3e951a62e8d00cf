"""Compare, plot, report."""

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper

from kedro.pipeline import Node, Pipeline
from plotly.graph_objects import Figure

from collective_pipeline.evaluation.figures import (
    plot_accuracy,
    plot_accuracy_against_params,
    plot_differences,
    plot_experts,
    plot_training_curves,
)
from collective_pipeline.pipelines.comparison.nodes import (
    analyse_experts,
    compare,
    join_histories,
    measure,
    measure_shut_gates,
    plot_sample_predictions,
    report,
    summarise,
    with_reference,
)


def draw(plot: Callable[..., Figure], name: str, tables: Sequence[str] = ("comparison",)) -> Node:
    """The node that plots these tables, with the arm that the others are compared to, as the figure of this name."""
    return Node(with_reference(plot), inputs=["settings", *tables], outputs=f"{name}_figure", name=f"plot_{name}")


def create_pipeline(
    namespace: str,
    *,
    arms: Sequence[str],
    analysed: Sequence[str],
    gated_and_dense: tuple[str, str] | None = None,
    has_facts: bool = False,
    is_merged: bool = False,
) -> Pipeline:
    """The comparison of these arms, each named by the namespace of its own pipeline.

    Args:
        namespace: Of the comparison, which is the name of the experiment.
        arms: In their order in tables.
        analysed: Those whose experts, members or gates are looked into, where they turn out to have any.
        gated_and_dense: One of these and the same one without gates, to measure what skipping shut gates saves.
        has_facts: Whether its dataset `facts` tells more of how it was run, by section and name.
        is_merged: Whether its dataset `sub_model_classes` tells what the reference was made of.
    """
    # Names without dots inside the pipeline; each is mapped to the arm's own dataset.
    models = {f"{arm}_arm": f"{arm}.arm" for arm in arms}
    results = {f"{arm}_results": f"{arm}.results" for arm in arms}
    histories = {f"{arm}_history": f"{arm}.history" for arm in arms}
    trained = dict.fromkeys([*analysed, *(gated_and_dense or ())])
    checkpoints = {f"{arm}_checkpoint": f"{arm}.checkpoint" for arm in trained}
    analysed_checkpoints = [f"{arm}_checkpoint" for arm in analysed]
    shared = {"settings": "settings", "splits": "splits", "device": "device"}
    tables = ["runs", "comparison"]
    experts = ["expert_analysis", "expert_analysis_by_class", "expert_analysis_by_seed", "sample_predictions"]
    more = ["skipping"] if gated_and_dense is not None else ["facts"] if has_facts else []
    sub_models = ["sub_model_classes"] if is_merged else []
    nodes = [
        Node(measure, inputs=["device", *models, *results], outputs="latency", name="measure_latency"),
        Node(compare, inputs=["settings", "latency", *results], outputs=[*tables, "summary"], name="compare"),
        Node(summarise, inputs=[*results], outputs="evaluation", name="summarise"),
        Node(
            analyse_experts,
            inputs=["settings", "splits", "device", *analysed_checkpoints, *sub_models],
            outputs=experts,
            name="analyse_experts",
        ),
        Node(join_histories, inputs=[*histories], outputs="histories", name="join_histories"),
        Node(plot_training_curves, inputs="histories", outputs="curves_figure", name="plot_curves"),
        Node(
            plot_experts,
            inputs="expert_analysis_by_class",
            outputs="expert_analysis_figure",
            name="plot_experts",
        ),
        Node(
            plot_sample_predictions,
            inputs=["sample_predictions", "splits"],
            outputs="sample_predictions_figure",
            name="plot_sample_predictions",
        ),
        Node(
            update_wrapper(partial(report, experiment=namespace), report),
            inputs=["settings", "splits", "device", *tables, "summary", *experts, "histories", *more],
            outputs="report",
            name="report",
        ),
    ]
    if gated_and_dense is not None:
        gated, dense = gated_and_dense
        inputs = ["latency", f"{gated}_checkpoint", f"{dense}_checkpoint", "splits", "device"]
        nodes.append(Node(measure_shut_gates, inputs=inputs, outputs="skipping", name="measure_shut_gates"))
    if len(arms) > 1:
        nodes += [
            draw(plot_accuracy, "accuracy"),
            draw(plot_differences, "differences"),
            draw(plot_accuracy_against_params, "params", tables),
        ]
    return Pipeline(nodes, namespace=namespace, inputs=shared | models | results | histories | checkpoints)
