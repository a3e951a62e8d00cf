"""What the hints promise: they follow from the figures, name the arms, and say nothing of what is not known."""

import numpy as np
import pandas as pd
import pytest

from collective_pipeline.evaluation.gpu import COST_COLUMNS, GPU_COLUMNS, add_costs, describe_costs, hints


def arms(**figures) -> pd.DataFrame:
    """Two arms with these figures, each a pair, and nothing known besides."""
    table = pd.DataFrame({"model_type": ["collective", "shallow"]} | {name: [np.nan] * 2 for name in GPU_COLUMNS})
    return table.assign(**figures, gpu_memory_mb_total=1000.0, gpu_power_watts_limit=100.0)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"gpu_utilization_mean": [12.0, 49.0]}, ["at work 12 to 49 % of the time, under half"]),
        ({"gpu_utilization_mean": [91.0, 91.0]}, ["at work 91 % of the time, which is good"]),
        ({"gpu_memory_mb_peak": [20.0, 600.0]}, ["at most 2 to 60 % of the GPU's memory was in use: there is room"]),
        ({"gpu_memory_mb_peak": [960.0, 990.0]}, ["up to 96 to 99 % of the GPU's memory was in use, and little"]),
        ({"gpu_power_watts_mean": [10.0, 69.0]}, ["the GPU drew 10 to 69 % of the power that it may"]),
        (
            {"gpu_utilization_mean": [95.0] * 2, "gpu_power_watts_mean": [30.0] * 2},
            ["at work 95 % of the time", "the GPU drew 30 % of the power"],
        ),
    ],
)
def test_each_rule_is_one_sentence_with_its_figure(figures, expected):
    told = hints(arms(**figures))
    assert len(told) == len(expected)
    for sentence, part in zip(told, expected, strict=True):
        assert part in sentence and sentence.startswith("While any arm trained,")


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"gpu_utilization_mean": [50.0, 90.0]},
        {"gpu_memory_mb_peak": [700.0, 950.0]},
        {"gpu_power_watts_mean": [70.0, 100.0]},
    ],
)
def test_what_is_unknown_or_usual_gives_no_hint(figures):
    assert hints(arms(**figures)) == []


def test_a_hint_that_holds_for_some_arms_names_them():
    (told,) = hints(arms(gpu_utilization_mean=[80.0, 20.0]))
    assert told.startswith("While shallow trained, the GPU was at work 20 % of the time")


def test_advice_says_what_changes_the_training():
    """More seeds or arms at once do not; a larger batch does."""
    for told in hints(arms(gpu_utilization_mean=[10.0] * 2, gpu_memory_mb_peak=[10.0] * 2)):
        assert "change no result" in told or "changes no result" in told
        assert "training.batch_size" in told and "changes the training" in told


def trainings(gpu_hours: list[float], price: float | None = None, joules: float = np.nan) -> pd.DataFrame:
    return add_costs(pd.DataFrame({"joules": [joules] * len(gpu_hours)}), pd.Series(gpu_hours), price)


def test_what_it_cost_is_told_as_far_as_it_is_known_of_all():
    told = describe_costs(trainings([1.5, 0.5], price=2.5, joules=1.8e6))
    assert (
        told
        == "The 2 trainings that were tested took 2.00 GPU-hours and 1.00 kWh, which cost 5.00 at 2.50 per GPU-hour."
    )
    assert describe_costs(trainings([0.01234])) == "The training that was tested took 0.0123 GPU-hours."
    assert describe_costs(trainings([1.5, np.nan], price=2.5)) == ""


def test_without_a_price_or_a_gpu_the_columns_are_empty():
    assert trainings([1.5])[["gpu_hours"]].notna().all(axis=None) and trainings([1.5])["cost"].isna().all()
    assert trainings([np.nan], price=2.0)[list(COST_COLUMNS)].isna().all(axis=None)
