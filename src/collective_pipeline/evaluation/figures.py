"""The figures of a comparison, one colour per arm in all of them.

Values are handed to Plotly as plain lists: the older plotly.js of Kedro-Viz draws nothing else.
"""

from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]
from plotly.subplots import make_subplots  # type: ignore[import-untyped,unused-ignore]

from collective_pipeline.config import MODEL_TYPES
from collective_pipeline.data.splits import Images

Columns = tuple[str, str, str]
"""A quantity, its lower and its upper bound."""

ACCURACY: Columns = ("test_accuracy_mean", "test_accuracy_ci_low", "test_accuracy_ci_high")
DIFFERENCE: Columns = ("difference_to_reference", "difference_ci_low", "difference_ci_high")

# Okabe and Ito's colours without the two that vanish on white or on black, and a grey. Then five with a contrast of
# 2.5:1 or more to white and to the report's dark page, and 11.6 or more by CIEDE2000 from every other colour, to the
# normal eye and to one without red or green cones (Machado et al. 2009); two of the first seven are 7.5 apart to these.
COLORS = (
    "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C8C8C",
    "#BB0000", "#5588FF", "#884444", "#227766", "#665577",
)  # fmt: skip
DASHES = ("solid", "dash", "dot")  # of lines, which are thin: the next one after so many arms
ARMS_A_DASH = 8
NAMES_IN_MARGIN = 8  # of a legend that has two rows, on a page as wide as a report
PANELS = {"val_accuracy": "Validation accuracy", "val_loss": "Validation loss", "train_loss": "Training loss"}
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
GRID = "#E3E3E3"
EXPERT_PANELS = {"gate_pct": "Open (%)", "accuracy": "Right alone (%)"}
# Pixels: a row of a heat map, between two of them for classes and a title, around all.
UNIT_HEIGHT, PANEL_GAP, MARGINS = 26, 76, 120
SAMPLES_IN_ROW = 5
IMAGE_HEIGHT, BAR_HEIGHT, GAP = 120, 18, 48  # pixels: of an image, of a bar, and between rows of either


def plot_accuracy(comparison: pd.DataFrame, *, reference: str = "collective") -> go.Figure:
    """Mean test accuracy of every arm with its interval, the best on top."""
    arms = comparison.sort_values("test_accuracy_mean", kind="stable")
    figure = _dot_plot(arms, ACCURACY, reference)
    return finish(
        figure, f"Test accuracy, {_mean_of_seeds(comparison)}", "Test accuracy (%)", None, height=_height(arms)
    )


def plot_differences(comparison: pd.DataFrame, *, reference: str = "collective") -> go.Figure:
    """Every other arm's paired difference to the reference with its interval, around a line of no difference."""
    arms = comparison[(comparison["model_type"] != reference) & comparison["difference_to_reference"].notna()]
    arms = arms.sort_values("difference_to_reference", kind="stable")
    figure = _dot_plot(arms, DIFFERENCE, reference)
    figure.add_vline(x=0, line={"color": COLORS[0], "width": 2, "dash": "dot"})
    return finish(
        figure,
        f"Difference in test accuracy to the {reference}, {_mean_of_seeds(comparison)}",
        f"Percentage points<br>← {reference} better · arm better →",
        None,
        height=_height(arms) + 24,
    )


def plot_accuracy_against_params(
    results: pd.DataFrame, comparison: pd.DataFrame, *, reference: str = "collective"
) -> go.Figure:
    """Test accuracy against parameters: every seed as a faint point, every arm's mean with its interval."""
    figure = _plot_against("params", "parameters", results, comparison, reference)
    return finish(figure, "Test accuracy against size", "Trainable parameters", "Test accuracy (%)", height=480)


def plot_accuracy_against_macs(
    results: pd.DataFrame, comparison: pd.DataFrame, *, reference: str = "collective"
) -> go.Figure:
    """The same against the multiply-adds that are executed for an image."""
    figure = _plot_against("executed_macs", "multiply-adds", results, comparison, reference)
    title = "Test accuracy against executed multiply-adds"
    return finish(figure, title, "Multiply-adds executed per image", "Test accuracy (%)", height=480)


def _plot_against(cost: str, unit: str, results: pd.DataFrame, comparison: pd.DataFrame, reference: str) -> go.Figure:
    figure = go.Figure()
    colors = colors_of(comparison["model_type"])
    for name in comparison["model_type"]:
        arm = comparison[comparison["model_type"] == name]
        runs = results[results["model_type"] == name]
        figure.add_scatter(
            x=runs[cost].tolist(),
            y=runs["test_accuracy"].tolist(),
            customdata=runs["seed"].tolist(),
            mode="markers",
            marker={"color": colors[name], "size": 7, "opacity": 0.35},
            legendgroup=name,
            showlegend=False,
            hovertemplate=f"{name}, seed %{{customdata}}<br>%{{y:.2f}} %<extra></extra>",
        )
        figure.add_scatter(
            x=arm[cost].tolist(),
            y=arm["test_accuracy_mean"].tolist(),
            error_y=error_bars(arm, ACCURACY, colors[name]),
            mode="markers",
            marker=marker_of(name, colors[name], reference),
            name=name,
            legendgroup=name,
            hovertemplate=f"{name}, mean<br>%{{x:,.0f}} {unit}<br>%{{y:.2f}} %<extra></extra>",
        )
    set_axis_of_counts(figure, results[cost])
    return figure


def set_axis_of_counts(figure: go.Figure, counts: pd.Series) -> None:
    """Whole numbers, in full: arms of one size would otherwise get an axis of half parameters."""
    fewest, most = int(counts.min()), int(counts.max())
    pad = max(0.06 * (most - fewest), 0.0005 * most)
    figure.update_xaxes(range=[fewest - pad, most + pad], tickformat=",d", nticks=6)


def plot_training_curves(history: pd.DataFrame) -> go.Figure:
    """Validation accuracy and both losses against the epoch: mean over seeds, and the band from lowest to highest.

    A line stands where the size of training images changes, in those arms in which it does.
    """
    figure = make_subplots(
        rows=len(PANELS),
        shared_xaxes=True,
        vertical_spacing=0.08,
        row_heights=[0.44, 0.28, 0.28],
        subplot_titles=list(PANELS.values()),
    )
    names = history["model_type"].unique()
    colors, dashes = colors_of(names), dashes_of(names)
    num_epochs = int(history["epoch"].max())
    for name in names:
        epochs = history[history["model_type"] == name].groupby("epoch")
        for row, column in enumerate(PANELS, start=1):
            curve = epochs[column].agg(["mean", "min", "max"])
            x = curve.index.tolist()
            figure.add_scatter(
                x=x + x[::-1],
                y=curve["max"].tolist() + curve["min"].tolist()[::-1],
                fill="toself",
                fillcolor=fade(colors[name], 0.15),
                line={"color": fade(colors[name], 0.2), "width": 1},
                mode="lines",
                hoverinfo="skip",
                legendgroup=name,
                showlegend=False,
                row=row,
                col=1,
            )
            figure.add_scatter(
                x=x,
                y=curve["mean"].tolist(),
                mode="lines" if len(x) > 1 else "markers",  # arms may differ in their epochs
                line={"color": colors[name], "width": 2, "dash": dashes[name]},
                marker={"color": colors[name], "size": 9},
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                hovertemplate=f"{name}: %{{y:.4~g}}<extra></extra>",
                row=row,
                col=1,
            )
    figure.update_annotations(x=0, xanchor="left", font_size=15)
    for epoch, size in size_changes(history).items():
        figure.add_vline(x=epoch - 0.5, line={"color": COLORS[6], "width": 1, "dash": "dot"}, row="all", col=1)
        figure.add_annotation(
            x=epoch - 0.5, y=0, xref="x", yref="y domain", text=size, xanchor="left", yanchor="bottom", showarrow=False
        )
    for row, column in enumerate(PANELS, start=1):
        if column == "val_accuracy":
            figure.update_yaxes(title_text="Accuracy (%)", range=_settled_range(history), row=row, col=1)
        else:
            dtick = _loss_ticks(history[column])
            figure.update_yaxes(title_text="Loss (log scale)", type="log", dtick=dtick, tickformat="~g", row=row, col=1)
    figure.update_xaxes(dtick=1 if num_epochs <= 10 else None, range=[0.5, 1.5] if num_epochs == 1 else None)
    figure.update_xaxes(title_text="Epoch", row=len(PANELS), col=1)
    return finish(figure, "Training curves", None, None, height=900)


def size_changes(history: pd.DataFrame) -> dict[int, str]:
    """The first epoch of every other size of training images, in their order, and the size: {9: "192 px"}.

    Where the plan of an arm has sizes, its phases are called by them; where arms differ, all of them are named.
    """
    changes: dict[int, set[str]] = {}
    for _, arm in history.groupby("model_type"):
        phases = arm.groupby("epoch")["phase"].first()
        sizes = phases[phases.str.fullmatch(r"\d+px")]
        changed = sizes[sizes != sizes.shift()].iloc[1:]
        for epoch, size in zip(changed.index.tolist(), changed, strict=True):
            changes.setdefault(epoch, set()).add(size.replace("px", " px"))
    return {epoch: ", ".join(sorted(changes[epoch])) for epoch in sorted(changes)}


def plot_experts(classes: pd.DataFrame) -> go.Figure:
    """What each unit is for, as heat maps of unit and class: how far it opens, and how often it is right alone.

    A panel for each arm and what is known of it, of its first seed: which of its members has which number means nothing
    across seeds.

    Args:
        classes: `experts.CLASS_COLUMNS`.
    """
    arms = [arm[arm["seed"] == arm["seed"].iloc[0]] for _, arm in classes.groupby("model_type", sort=False)]
    seeds = [int(arm["seed"].iloc[0]) for arm in arms]
    panels = [
        (
            f"{title}, {arm['model_type'].iloc[0]}{_of_seed(seed, seeds)}",
            arm.set_index(["unit", "class"])[column].unstack(sort=False),
        )
        for arm, seed in zip(arms, seeds, strict=True)
        for column, title in EXPERT_PANELS.items()
        if arm[column].notna().any()
    ]
    if not panels:
        return _blank("No experts, members or gates to look into")
    heights = [UNIT_HEIGHT * len(values) for _, values in panels]
    height = sum(heights) + PANEL_GAP * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=heights,
        vertical_spacing=PANEL_GAP / height if len(panels) > 1 else 0,
        subplot_titles=[title for title, _ in panels],
    )
    for row, (_, values) in enumerate(panels, start=1):
        low, high = figure.get_subplot(row, 1).yaxis.domain
        figure.add_heatmap(
            x=[str(name) for name in values.columns],
            y=values.index.tolist(),
            z=values.to_numpy().tolist(),
            colorscale="Viridis",
            colorbar={
                "title": {"text": "%"},
                "y": (low + high) / 2,
                "len": max(high - low, 100 / height),  # room for its numbers beside a mixture of two
                "thickness": 14,
                "nticks": 4,
            },
            hovertemplate="%{y}, %{x}: %{z:.1f} %<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(autorange="reversed", type="category")
    return finish(figure, f"Experts by class, {_all_of(seeds)}", None, None, height=height + MARGINS)


def _of_seed(seed: int, seeds: Iterable[int]) -> str:
    """For a title, where not all that is shown is of this seed: the first that has good weights is."""
    return f", seed {seed}" if {*seeds} != {seed} else ""


def _all_of(seeds: Iterable[int]) -> str:
    distinct = sorted({int(seed) for seed in seeds})
    return f"seed{'s' if len(distinct) > 1 else ''} {' and '.join(map(str, distinct))}"


def plot_samples(samples: pd.DataFrame, images: Images) -> go.Figure:
    """Images with their class and what the network says, and below each what its units have to do with that.

    A bar is how far a unit opens for the image, or, where it has no gate, how sure it is of the class that stands in
    it: the one that it says alone.

    Args:
        samples: `experts.SAMPLE_COLUMNS`.
        images: Those that the column `image` counts.
    """
    if samples.empty:
        return _blank("No experts, members or gates to show at work")
    shown = [
        [group for _, group in arm.groupby("image", sort=False)] for _, arm in samples.groupby("model_type", sort=False)
    ]
    strips = [arm[start : start + SAMPLES_IN_ROW] for arm in shown for start in range(0, len(arm), SAMPLES_IN_ROW)]
    heights = [height for strip in strips for height in (IMAGE_HEIGHT, BAR_HEIGHT * len(strip[0]))]
    height = sum(heights) + GAP * (len(heights) - 1)
    figure = make_subplots(
        rows=len(heights),
        cols=SAMPLES_IN_ROW,
        row_heights=heights,
        vertical_spacing=GAP / height,
        horizontal_spacing=0.03,
        # Above images alone; make_subplots counts all places, row by row.
        subplot_titles=[
            _title_of(strip[column]) if row == 0 and column < len(strip) else ""
            for strip in strips
            for row in range(2)
            for column in range(SAMPLES_IN_ROW)
        ],
    )
    for above, strip in zip(range(1, len(heights), 2), strips, strict=True):
        for column, sample in enumerate(strip, start=1):
            pixels = images.images[int(sample["image"].iloc[0])].cpu()
            figure.add_image(z=pixels.expand(3, -1, -1).permute(1, 2, 0).tolist(), row=above, col=column)
            figure.update_xaxes(visible=False, row=above, col=column)
            figure.update_yaxes(visible=False, row=above, col=column)
            if column == 1 and len(shown) > 1:
                name = str(sample["model_type"].iloc[0])
                figure.update_yaxes(
                    visible=True, showticklabels=False, showgrid=False, ticks="", title_text=name, row=above, col=1
                )
            for trace in _bars_of(sample):
                figure.add_trace(trace, row=above + 1, col=column)
            figure.update_xaxes(range=[0, 100], tickvals=[0, 50], row=above + 1, col=column)
            figure.update_yaxes(autorange="reversed", showticklabels=column == 1, row=above + 1, col=column)
            if above + 1 < len(heights):
                figure.update_xaxes(showticklabels=False, row=above + 1, col=column)
    figure.update_traces(hoverinfo="skip", selector={"type": "image"})
    figure.update_annotations(font_size=13)
    return finish(figure, f"Sample predictions, {_all_of(samples['seed'])}", None, None, height=height + 120)


def _bars_of(sample: pd.DataFrame) -> Iterable[go.Bar | go.Scatter]:
    """How far each unit opens or how sure it is, and on it the class that it says alone."""
    opens = sample["gate_pct"].notna().any()
    yield go.Bar(
        x=sample["gate_pct" if opens else "confidence_pct"].tolist(),
        y=sample["unit"].tolist(),
        orientation="h",
        marker={"color": fade(COLORS[1] if opens else COLORS[3], 0.6)},
        hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        showlegend=False,
    )
    # Not the bar's own text, which has no room in a short one.
    yield go.Scatter(
        x=[2] * len(sample),
        y=sample["unit"].tolist(),
        text=sample["says"].fillna("").astype(str).tolist(),
        mode="text",
        textposition="middle right",
        textfont={"size": 12},
        hoverinfo="skip",
        showlegend=False,
    )


def _title_of(sample: pd.DataFrame) -> str:
    """The image's class, and what the network says of it, coloured where that is wrong."""
    true, said = str(sample["class"].iloc[0]), str(sample["prediction"].iloc[0])
    return f"{true}<br>says {said}" if said == true else f'{true}<br><span style="color:{COLORS[0]}">says {said}</span>'


def _blank(title: str) -> go.Figure:
    figure = finish(go.Figure(), title, None, None, height=160)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def curve_points(history: pd.DataFrame) -> pd.DataFrame:
    """What the training curves show: mean, lowest and highest over seeds of each arm and epoch."""
    values = history.groupby(["model_type", "epoch"], sort=False)[list(PANELS)].agg(["mean", "min", "max"])
    values.columns = ["_".join(name) for name in values.columns]
    return values.reset_index()


def _dot_plot(arms: pd.DataFrame, columns: Columns, reference: str) -> go.Figure:
    """One row per arm, the first at the bottom."""
    figure = go.Figure()
    colors = colors_of([*arms["model_type"], reference])  # the same as in figures that show it
    for name in arms["model_type"]:
        arm = arms[arms["model_type"] == name]
        figure.add_scatter(
            x=arm[columns[0]].tolist(),
            y=[f"<b>{name}</b>" if name == reference else name],
            error_x=error_bars(arm, columns, colors[name]),
            mode="markers",
            marker=marker_of(name, colors[name], reference),
            showlegend=False,
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    return figure


def _height(arms: pd.DataFrame) -> int:
    return 140 + 44 * len(arms)


def error_bars(arm: pd.DataFrame, columns: Columns, color: str) -> dict[str, object]:
    """From the bounds to Plotly's lengths, 0 where there is no interval."""
    mean, low, high = (arm[column] for column in columns)
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - mean).fillna(0).tolist(),
        "arrayminus": (mean - low).fillna(0).tolist(),
        "color": color,
        "thickness": 2,
        "width": 5,
    }


def marker_of(name: str, color: str, reference: str) -> dict[str, object]:
    """A diamond for the reference, dots for the others."""
    is_reference = name == reference
    return {"color": color, "size": 15 if is_reference else 11, "symbol": "diamond" if is_reference else "circle"}


def colors_of(arms: Iterable[str]) -> dict[str, str]:
    """The arms' colours, in whichever order; those of phase 1 have theirs whichever others are shown."""
    return {name: COLORS[place % len(COLORS)] for name, place in _places_of(arms).items()}


def dashes_of(arms: Iterable[str]) -> dict[str, str]:
    """What tells lines of many arms apart where their colours alone would not."""
    return {name: DASHES[place // ARMS_A_DASH % len(DASHES)] for name, place in _places_of(arms).items()}


def _places_of(arms: Iterable[str]) -> dict[str, int]:
    arms = sorted(arms)
    names = dict.fromkeys([*(MODEL_TYPES if set(arms) & set(MODEL_TYPES) or not arms else ()), *arms])
    return {name: place for place, name in enumerate(names)}


def fade(color: str, opacity: float) -> str:
    """The colour, so that what is behind shows."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def is_settled(history: pd.DataFrame) -> "pd.Series[bool]":
    """Which epochs the axis of accuracy is made for, all but the first fifth: leaps would flatten what follows."""
    return history["epoch"].gt(0.2 * history["epoch"].max())


def _settled_range(history: pd.DataFrame) -> Sequence[float] | None:
    settled = history.loc[is_settled(history), "val_accuracy"]
    low, high = float(settled.min()), float(settled.max())
    pad = 0.05 * (high - low)
    return [low - pad, high + pad] if pad > 0 else None


def _loss_ticks(losses: pd.Series) -> str | None:
    """At 1, 2 and 5 of every decade, of which at least two are seen; where losses are too close, Plotly's own."""
    return "D2" if losses.max() >= 5 * losses.min() else None


def _mean_of_seeds(comparison: pd.DataFrame) -> str:
    num_seeds = int(comparison["num_seeds"].min())
    return "one seed" if num_seeds == 1 else f"mean and interval over {num_seeds} seeds"


def finish(figure: go.Figure, title: str, x_title: str | None, y_title: str | None, *, height: int) -> go.Figure:
    """Title, axes, font and margins as in all figures."""
    # An image has none.
    num_named = sum(getattr(trace, "showlegend", False) is not False for trace in figure.data)
    top = 64 if num_named == 0 else 130 + 26 * ((num_named - 1) // NAMES_IN_MARGIN)
    figure.update_layout(
        template="none",
        # At the top, or a legend of two rows would run into it.
        title={
            "text": title,
            "x": 0.02,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 18},
            "font": {"size": 20},
        },
        font={"family": FONT, "size": 14, "color": "#222222"},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=height,
        margin={"l": 60, "r": 24, "t": top, "b": 56},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8C8C8C", "activecolor": "#222222"},
        # Above the panels it may wrap on a narrow screen without running into an axis.
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.04, "yanchor": "bottom"},
    )
    figure.update_xaxes(automargin=True, gridcolor=GRID, zeroline=False, title_font_size=14)
    figure.update_yaxes(automargin=True, gridcolor=GRID, zeroline=False, title_font_size=14, title_standoff=10)
    if x_title:
        figure.update_xaxes(title_text=x_title)
    if y_title:
        figure.update_yaxes(title_text=y_title)
    return figure
