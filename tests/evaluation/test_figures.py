"""What the figures promise: every arm once and in its own colour, plain lists, and no crash on the smallest run."""

import itertools

import numpy as np
import pandas as pd
import pytest

from collective_pipeline.config import MODEL_TYPES, ComparisonConfig
from collective_pipeline.evaluation.comparison import RUN_COLUMNS, compare_arms
from collective_pipeline.evaluation.figures import (
    plot_accuracy,
    plot_accuracy_against_params,
    plot_differences,
    plot_training_curves,
)
from collective_pipeline.evaluation.gpu import GPU_COLUMNS

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


def test_one_epoch_is_drawn_as_points():
    _, _, history = make_run(("collective",), 3, 1)
    assert {trace.mode for trace in plot_training_curves(history).data[1::2]} == {"markers"}
