"""The figures of a sweep, in the colours of the others."""

import pandas as pd
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from collective_pipeline.evaluation.figures import (
    ACCURACY,
    DIFFERENCE,
    Columns,
    colors_of,
    error_bars,
    fade,
    finish,
    marker_of,
    set_axis_of_counts,
)

LOSS: Columns = ("test_loss_mean", "test_loss_ci_low", "test_loss_ci_high")
COST_NAMES = {
    "params": "Trainable parameters",
    "macs": "Multiply-adds per image",
    "latency_ms": "Latency (ms)",
    "train_seconds": "Training time per seed (s)",
}


def plot_accuracy_by_size(comparison: pd.DataFrame, *, reference: str = "collective") -> go.Figure:
    """Mean test accuracy against parameters, a line and a band for each arm, between the sizes that were run only."""
    return _plot_by_size(comparison, ACCURACY, "Test accuracy against size", "Test accuracy (%)", reference)


def plot_loss_by_size(comparison: pd.DataFrame, *, reference: str = "collective") -> go.Figure:
    """The same of the test loss."""
    return _plot_by_size(comparison, LOSS, "Test loss against size", "Test loss (cross-entropy)", reference)


def plot_differences_by_size(comparison: pd.DataFrame, *, reference: str = "collective") -> go.Figure:
    """Every other arm's paired difference to the reference at each size, with its interval."""
    others = comparison[(comparison["model_type"] != reference) & comparison["difference_to_reference"].notna()]
    title = f"Difference in test accuracy to the {reference}"
    figure = _plot_by_size(others, DIFFERENCE, title, f"Points; above 0 the arm is better than {reference}", reference)
    figure.add_hline(y=0, line={"color": colors_of([])[reference], "width": 2, "dash": "dot"})
    return figure


def plot_efficiency(comparison: pd.DataFrame, *, reference: str = "collective") -> go.Figure:
    """Accuracy per million parameters of each arm, one point for each size."""
    figure = go.Figure()
    colors = colors_of(comparison["model_type"])
    for name in reversed(comparison["model_type"].unique()):
        arm = comparison[comparison["model_type"] == name]
        figure.add_scatter(
            x=arm["accuracy_per_million_params"].tolist(),
            y=[f"<b>{name}</b>" if name == reference else name] * len(arm),
            customdata=arm[["params", "test_accuracy_mean"]].to_numpy().tolist(),
            mode="markers",
            marker=marker_of(name, colors[name], reference),
            showlegend=False,
            hovertemplate="%{y}: %{x:.2f}<br>%{customdata[0]:,} parameters, %{customdata[1]:.2f} %<extra></extra>",
        )
    figure.update_xaxes(type="log")
    return finish(
        figure,
        "Parameter efficiency by model type",
        "Test accuracy (%) per million parameters",
        None,
        height=140 + 40 * comparison["model_type"].nunique(),
    )


def plot_pareto(comparison: pd.DataFrame, *, reference: str = "collective") -> go.Figure:
    """Mean accuracy against four costs; the line is the front, which nothing beats in both."""
    figure = make_subplots(rows=2, cols=2, horizontal_spacing=0.12, vertical_spacing=0.16)
    colors = colors_of(comparison["model_type"])
    for place, (cost, title) in enumerate(COST_NAMES.items()):
        row, col = place // 2 + 1, place % 2 + 1
        front = comparison[comparison[f"on_front_{cost}"]].sort_values(cost)
        figure.add_scatter(
            x=front[cost].tolist(),
            y=front["test_accuracy_mean"].tolist(),
            mode="lines",
            line={"color": "#8C8C8C", "width": 2, "shape": "hv"},
            hoverinfo="skip",
            showlegend=False,
            row=row,
            col=col,
        )
        for name in comparison["model_type"].unique():
            arm = comparison[comparison["model_type"] == name]
            figure.add_scatter(
                x=arm[cost].tolist(),
                y=arm["test_accuracy_mean"].tolist(),
                mode="markers",
                marker=marker_of(name, colors[name], reference),
                name=name,
                legendgroup=name,
                showlegend=place == 0,
                hovertemplate=f"{name}<br>%{{x:,.4g}}<br>%{{y:.2f}} %<extra></extra>",
                row=row,
                col=col,
            )
        figure.update_xaxes(title_text=title, type="log", row=row, col=col)
        figure.update_yaxes(title_text="Test accuracy (%)" if col == 1 else None, row=row, col=col)
    return finish(figure, "Pareto fronts of accuracy and cost", None, None, height=760)


def plot_trials(trials: pd.DataFrame) -> go.Figure:
    """Validation accuracy of all trials of a search against their parameters; pruned ones are hollow."""
    figure = go.Figure()
    colors = colors_of(trials["model_type"])
    for name in trials["model_type"].unique():
        for state, symbol in (("complete", "circle"), ("pruned", "circle-open")):
            some = trials[(trials["model_type"] == name) & (trials["state"] == state)]
            figure.add_scatter(
                x=some["params"].tolist(),
                y=some["val_accuracy"].tolist(),
                customdata=some["unit"].tolist(),
                mode="markers",
                marker={"color": colors[name], "size": 9, "symbol": symbol},
                name=name,
                legendgroup=name,
                showlegend=state == "complete",
                hovertemplate=f"{name}, trial %{{customdata}}, {state}<br>%{{x:,}} parameters<br>%{{y:.2f}} %"
                "<extra></extra>",
            )
    figure.update_xaxes(type="log")
    return finish(
        figure, "All trials of the search", "Trainable parameters", "Best validation accuracy (%)", height=480
    )


def plot_pruning(trials: pd.DataFrame) -> go.Figure:
    """Epochs of each model type's trials: trained to the end, trained until pruned, and saved by pruning."""
    complete, pruned = trials["state"] == "complete", trials["state"] == "pruned"
    parts = {
        "of trials trained to the end": (trials["epochs"].where(complete, 0), 1.0),
        "of pruned trials": (trials["epochs"].where(pruned, 0), 0.5),
        "saved by pruning": ((trials["max_epochs"] - trials["epochs"]).where(pruned, 0), 0.15),
    }
    figure = go.Figure()
    colors = colors_of(trials["model_type"])
    names = list(reversed(trials["model_type"].unique()))
    for part, (epochs, opacity) in parts.items():
        totals = epochs.groupby(trials["model_type"]).sum()
        figure.add_bar(
            x=[int(totals[name]) for name in names],
            y=names,
            orientation="h",
            name=part,
            marker={"color": [fade(colors[name], opacity) for name in names], "line": {"color": "#8C8C8C", "width": 1}},
            hovertemplate=f"%{{y}}: %{{x:,}} epochs {part}<extra></extra>",
        )
    figure.update_layout(barmode="stack")
    return finish(figure, "What pruning saved", "Epochs", None, height=200 + 40 * len(names))


def plot_importance(importance: pd.DataFrame) -> go.Figure:
    """How much of the variance of a model type's validation accuracy each hyperparameter explains."""
    wide = importance.pivot(index="parameter", columns="model_type", values="importance")
    wide = wide.loc[wide.mean(axis=1).sort_values().index, importance["model_type"].unique().tolist()]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if pd.isna(value) else float(value) for value in row] for row in wide.to_numpy()],
            x=wide.columns.tolist(),
            y=wide.index.tolist(),
            colorscale=[[0, "#FFFFFF"], [1, "#0072B2"]],
            zmin=0,
            zmax=1,
            hovertemplate="%{x}, %{y}: %{z:.2f}<extra></extra>",
            colorbar={"title": {"text": "share"}},
        )
    )
    return finish(figure, "Importance of hyperparameters", None, None, height=200 + 30 * len(wide))


def no_figure(reason: str) -> go.Figure:
    """Instead of a figure that this run has nothing to show in."""
    figure = go.Figure()
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return finish(figure, reason, None, None, height=160)


def _plot_by_size(comparison: pd.DataFrame, columns: Columns, title: str, y_title: str, reference: str) -> go.Figure:
    figure = go.Figure()
    colors = colors_of(comparison["model_type"])
    mean, low, high = columns
    single = comparison["target_params"].nunique() == 1
    for name in comparison["model_type"].unique():
        arm = comparison[comparison["model_type"] == name].sort_values("params")
        x = arm["params"].tolist()
        if not single and arm[low].notna().all():
            figure.add_scatter(
                x=x + x[::-1],
                y=arm[high].tolist() + arm[low].tolist()[::-1],
                fill="toself",
                fillcolor=fade(colors[name], 0.12),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                legendgroup=name,
                showlegend=False,
            )
        figure.add_scatter(
            x=x,
            y=arm[mean].tolist(),
            error_y=error_bars(arm, columns, colors[name]) if single else None,
            mode="lines+markers",
            line={"color": colors[name], "width": 3 if name == reference else 2},
            marker=marker_of(name, colors[name], reference),
            name=name,
            legendgroup=name,
            hovertemplate=f"{name}<br>%{{x:,}} parameters<br>%{{y:.3f}}<extra></extra>",
        )
    if single:
        set_axis_of_counts(figure, comparison["params"])
    else:
        figure.update_xaxes(tickformat=".3s")
    figure.update_layout(showlegend=True)  # or nothing would say which arm it is, if it is one
    return finish(figure, title, "Trainable parameters", y_title, height=520)
