"""What the figures promise: every arm once and in its own colour, plain lists, and no crash on the smallest run."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from tests.evaluation.test_sizes import grid

from collective_pipeline.config import MODEL_TYPES, ComparisonConfig
from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation.comparison import RUN_COLUMNS, compare_arms, compare_sizes
from collective_pipeline.evaluation.experts import ExpertAnalysis
from collective_pipeline.evaluation.figures import (
    COLORS,
    plot_accuracy,
    plot_accuracy_against_params,
    plot_differences,
    plot_experts,
    plot_samples,
    plot_training_curves,
    size_changes,
)
from collective_pipeline.evaluation.gpu import GPU_COLUMNS
from collective_pipeline.evaluation.sweep_figures import plot_differences_by_size

SIZES = [(MODEL_TYPES, 3, 5), (MODEL_TYPES, 1, 1), (("very_deep_resnet",), 1, 1), (("collective",), 2, 1)]


def make_run(arms, num_seeds, num_epochs):
    """Results, comparison and history of a run of this size."""
    rng = np.random.default_rng(0)
    seeds = range(42, 42 + num_seeds)
    results = pd.DataFrame(
        [
            {
                **dict.fromkeys((*RUN_COLUMNS, *GPU_COLUMNS), 1.0),
                "model_type": arm,
                "seed": seed,
                "params": 560_000 + position,
                "test_accuracy": 97 + rng.random(),
                "latency_ms": 0.5,
            }
            for position, arm in enumerate(arms)
            for seed in seeds
        ]
    )
    history = pd.DataFrame(
        [
            {"model_type": arm, "seed": seed, "epoch": epoch, "phase": "train"}
            | {
                column: value + rng.random()
                for column, value in {"val_accuracy": 96, "val_loss": 0.1, "train_loss": 0.05}.items()
            }
            for arm, seed, epoch in itertools.product(arms, seeds, range(1, num_epochs + 1))
        ]
    )
    return results, compare_arms(results, ComparisonConfig(resamples=200)), history


def all_figures(results, comparison, history):
    return [
        plot_accuracy(comparison),
        plot_differences(comparison),
        plot_accuracy_against_params(results, comparison),
        plot_training_curves(history),
    ]


def colors_by_arm(figure):
    """The colour of every arm's full marker or line."""
    named = [(trace.name or trace.y[0], trace.marker.color) for trace in figure.data if trace.marker.size != 7]
    return {name.removeprefix("<b>").removesuffix("</b>"): color for name, color in named if color and name}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_of_run_is_drawn(size):
    for figure in all_figures(*make_run(*size)):
        assert "NaN" not in figure.to_json()
        assert figure.layout.title.text


def test_values_are_plain_lists():
    # Arrays would be encoded in a way that older plotly.js cannot read.
    for figure in all_figures(*make_run(*SIZES[0])):
        for trace in figure.to_plotly_json()["data"]:
            assert isinstance(trace["x"], list | tuple)
            assert isinstance(trace["y"], list | tuple)
        assert "bdata" not in figure.to_json()


def test_an_arm_has_one_colour_in_all_figures_and_whatever_else_is_shown():
    results, comparison, history = make_run(*SIZES[0])
    accuracy, differences, size, curves = (
        colors_by_arm(figure) for figure in all_figures(results, comparison, history)
    )
    assert set(accuracy) == set(MODEL_TYPES)
    assert len(set(accuracy.values())) == len(MODEL_TYPES)
    assert accuracy == size == curves
    assert differences.items() <= accuracy.items()
    alone = comparison[comparison["model_type"] == "deep"]
    assert colors_by_arm(plot_accuracy(alone)).items() <= accuracy.items()


def test_twelve_arms_have_a_colour_each_and_the_lines_of_more_differ():
    """Tiny_imagenet has ten."""
    results, _, history = make_run([f"arm {i}" for i in range(12)], 2, 2)
    comparison = compare_arms(results, ComparisonConfig(resamples=200), reference="arm 0")
    for figure in all_figures(results, comparison, history):
        colors = colors_by_arm(figure)
        assert len(colors) >= 11 and len({*colors.values()}) == len(colors)

    one = history[history["model_type"] == "arm 0"]
    many = pd.concat([one.assign(model_type=f"arm {i}") for i in range(20)])
    lines = [trace.line for trace in plot_training_curves(many).data if trace.showlegend]
    assert len({(line.color, line.dash) for line in lines}) == len(lines) == 20


def test_the_colours_after_those_of_others_are_seen_on_white_and_on_the_dark_page():
    """By the contrast of WCAG, which is told of them."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for color in COLORS[7:]:
        for page in ("#FFFFFF", "#16181A"):
            dark, light = sorted((luminance(color), luminance(page)))
            assert (light + 0.05) / (dark + 0.05) >= 2.5


def test_accuracies_are_sorted_and_the_reference_stands_out():
    _, comparison, _ = make_run(*SIZES[0])
    traces = plot_accuracy(comparison).data
    means = [trace.x[0] for trace in traces]
    assert means == sorted(means)
    assert [trace.y[0] for trace in traces if trace.marker.symbol == "diamond"] == ["<b>collective</b>"]


def test_error_bars_reach_the_bounds():
    _, comparison, _ = make_run(*SIZES[0])
    arms = comparison.set_index("model_type")
    for trace in plot_differences(comparison).data:
        arm = arms.loc[trace.y[0]]
        assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(arm["difference_ci_low"])
        assert trace.x[0] + trace.error_x.array[0] == pytest.approx(arm["difference_ci_high"])


def test_differences_leave_out_the_reference_and_show_where_zero_is():
    _, comparison, _ = make_run(*SIZES[0])
    figure = plot_differences(comparison)
    assert {trace.y[0] for trace in figure.data} == set(MODEL_TYPES) - {"collective"}
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(0, 0)]


def test_every_seed_is_a_point():
    results, comparison, _ = make_run(*SIZES[0])
    figure = plot_accuracy_against_params(results, comparison)
    points = [y for trace in figure.data if not trace.error_y.array for y in trace.y]
    assert sorted(points) == sorted(results["test_accuracy"])


def test_curves_are_means_inside_the_band_of_the_seeds():
    _, _, history = make_run(("collective",), 3, 4)
    band, line = plot_training_curves(history).data[:2]
    expected = history.groupby("epoch")["val_accuracy"]
    assert line.y == pytest.approx(expected.mean())
    assert band.y[:4] == pytest.approx(expected.max())
    assert band.y[4:] == pytest.approx(expected.min()[::-1])


@pytest.mark.parametrize("others_epochs", [1, 3])
def test_one_epoch_is_drawn_as_points(others_epochs):
    """However long other arms train; ticks are whole epochs that there were."""
    _, _, history = make_run(("collective", "shallow"), 3, others_epochs)
    history = history[(history["model_type"] == "shallow") | (history["epoch"] == 1)]
    figure = plot_training_curves(history)

    assert {trace.mode for trace in figure.data[1:6:2]} == {"markers"}
    assert {trace.mode for trace in figure.data[7::2]} == {"markers" if others_epochs == 1 else "lines"}
    for axis in figure.select_xaxes():
        assert axis.dtick == 1 and axis.range == ((0.5, 1.5) if others_epochs == 1 else None)


@pytest.mark.parametrize("factor", [1, 1.02, 3, 5, 40])
def test_an_axis_of_losses_has_two_numbers_or_more(factor):
    """At 1, 2 and 5 of every decade or, where losses are too close for that, where Plotly itself puts them."""
    _, _, history = make_run(("collective",), 1, 2)
    history["val_loss"] = [0.21 * factor, 0.21]
    decades = [digit * 10.0**power for power in (-1, 0) for digit in (1, 2, 5)]
    dtick = plot_training_curves(history).layout.yaxis2.dtick

    assert dtick == ("D2" if factor >= 5 else None)
    assert dtick is None or sum(0.21 <= tick <= 0.21 * factor for tick in decades) >= 2


@pytest.mark.parametrize("sizes", [(560_000,), (300_000, 560_000)])
def test_ticks_of_a_sweep_tell_its_networks_apart(sizes):
    """Those of one size are a few parameters apart; a single arm has its name beside the figure."""
    comparison = compare_sizes(grid(1, arms=("collective", "shallow"), sizes=sizes), ComparisonConfig(resamples=100))
    figure = plot_differences_by_size(comparison)

    assert figure.layout.xaxis.tickformat == (",d" if len(sizes) == 1 else ".3s")
    assert figure.layout.showlegend


def test_curves_are_marked_where_an_arm_changes_the_size_of_its_images():
    """In every panel, before the first epoch of the other size; a stage that keeps the size has no mark."""
    _, _, history = make_run(("plain", "progressive_resizing"), 2, 4)
    sizes = {1: "160px", 2: "192px", 3: "192px", 4: "224px"}
    resized = history["model_type"] == "progressive_resizing"
    history.loc[resized, "phase"] = history.loc[resized, "epoch"].map(sizes)
    figure = plot_training_curves(history)

    assert size_changes(history) == {2: "192 px", 4: "224 px"}
    assert sorted((line.x0, line.yref) for line in figure.layout.shapes) == [
        (x, f"y{panel} domain") for x in (1.5, 3.5) for panel in ("", 2, 3)
    ]
    assert [(text.x, text.text) for text in figure.layout.annotations[3:]] == [(1.5, "192 px"), (3.5, "224 px")]
    assert not plot_training_curves(history[~resized]).layout.shapes


IMAGES = Images(torch.arange(7 * 3 * 4 * 5).view(7, 3, 4, 5).to(torch.uint8), torch.arange(7))


def make_analysis(num_seeds=2, num_classes=7):
    """Of a mixture with gates, and of a collective without."""
    arms = {"merged_moe": (["expert 1", "expert 2"], 40.0), "collective": (["expert 1", "analyst 1"], None)}
    classes = [
        {"model_type": arm, "seed": 42 + s, "unit": unit, "class": str(k), "gate_pct": gate, "accuracy": 10.0 * s + k}
        for arm, (units, gate) in arms.items()
        for s in range(num_seeds)
        for unit in units
        for k in range(num_classes)
    ]
    samples = [
        {"model_type": arm, "seed": 42, "image": k, "class": str(k), "prediction": "0", "unit": unit}
        | {"gate_pct": gate, "says": str(k), "confidence_pct": 90.0}
        for arm, (units, gate) in arms.items()
        for k in range(num_classes)
        for unit in units
    ]
    return ExpertAnalysis.of_rows(classes=classes, samples=samples)


def test_heat_maps_of_experts_are_of_the_first_seed_and_of_what_there_is():
    """A panel for gates and one for accuracy alone; a collective has no gates, so it has the second one only."""
    figure = plot_experts(make_analysis().classes)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]

    assert len(maps) == 3 and all(isinstance(trace.z, tuple) for trace in maps)
    assert list(maps[1].z[0]) == list(maps[2].z[1]) == [0, 1, 2, 3, 4, 5, 6]
    assert set(maps[0].z[0]) == {40.0}
    alone = make_analysis().classes
    alone = alone[alone["model_type"] == "collective"]
    assert len(plot_experts(alone).data) == 1


def test_samples_show_the_image_itself_and_what_every_unit_has_to_do_with_it():
    """Five in a row, so that seven of two arms are four rows; bars are gates, or how sure a member is."""
    figure = plot_samples(make_analysis().samples, IMAGES)
    shown = [trace for trace in figure.data if trace.type == "image"]
    bars = [trace for trace in figure.data if trace.type == "bar"]
    told = [trace for trace in figure.data if trace.type == "scatter"]

    assert len(shown) == len(bars) == len(told) == 14
    assert np.array_equal(np.array(shown[9].z), IMAGES.images[2].permute(1, 2, 0).numpy())
    assert bars[0].x == (40.0, 40.0) and bars[7].x == (90.0, 90.0)
    assert bars[7].y == ("expert 1", "analyst 1") and told[9].text == ("2", "2")
    titles = [annotation.text for annotation in figure.layout.annotations if annotation.text]
    assert titles[0] == "0<br>says 0" and "color" in titles[1] and len(titles) == 14


def test_grey_images_are_shown_too():
    grey = Images(IMAGES.images[:, :1], IMAGES.labels)
    figure = plot_samples(make_analysis().samples, grey)

    assert np.array_equal(np.array(figure.data[0].z)[..., 2], grey.images[0, 0].numpy())


def test_without_experts_figures_say_so():
    """Pipelines are static: the files exist whichever arm was chosen."""
    empty = ExpertAnalysis.of_rows()

    for figure in (plot_experts(empty.classes), plot_samples(empty.samples, IMAGES)):
        assert not figure.data and figure.layout.title.text.startswith("No experts")
