"""A study, however many work on it; its tables, figures and report."""

from kedro.pipeline import Node, Pipeline

from collective_pipeline.evaluation.sweep_figures import (
    plot_accuracy_by_size,
    plot_differences_by_size,
    plot_efficiency,
    plot_loss_by_size,
    plot_pareto,
)
from collective_pipeline.pipelines.comparison.pipeline import draw
from collective_pipeline.pipelines.sweep.nodes import (
    compare,
    join_study,
    measure,
    report,
    run_study,
    show_importance,
    show_pruning,
    show_trials,
)


def create_pipeline(namespace: str) -> Pipeline:
    """The sweep in its namespace; settings, splits and device come from the data pipeline."""
    tables = ["runs", "comparison", "overall", "trials", "importance"]
    return Pipeline(
        [
            Node(join_study, inputs=["settings", "splits", "study", "states"], outputs="task", name="join_study"),
            Node(
                run_study,
                inputs=["task", "device"],
                outputs=["results", "arms", "models", "trials", "importance"],
                name="run_study",
            ),
            Node(measure, inputs=["arms", "device"], outputs="latency", name="measure_latency"),
            Node(
                compare,
                inputs=["settings", "splits", "results", "latency", "models"],
                outputs=["runs", "comparison", "overall", "summary"],
                name="compare",
            ),
            draw(plot_accuracy_by_size, "accuracy"),
            draw(plot_loss_by_size, "loss"),
            draw(plot_differences_by_size, "differences"),
            draw(plot_efficiency, "efficiency"),
            draw(plot_pareto, "pareto"),
            Node(show_trials, inputs="trials", outputs="trials_figure", name="plot_trials"),
            Node(show_pruning, inputs="trials", outputs="pruning_figure", name="plot_pruning"),
            Node(show_importance, inputs="importance", outputs="importance_figure", name="plot_importance"),
            Node(
                report,
                inputs=["settings", "splits", "device", "summary", *tables],
                outputs="report",
                name="report",
            ),
        ],
        namespace=namespace,
        inputs={"settings", "splits", "device"},
    )
