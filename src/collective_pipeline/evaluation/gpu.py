"""What a GPU did while the arms trained, and what that cost: the tables' columns, and what could be done better."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

# Of the history, where they are those since training began, and of the tables.
USAGE_COLUMNS = (
    "gpu_utilization_mean",
    "gpu_utilization_peak",
    "gpu_memory_mb_mean",
    "gpu_memory_mb_peak",
    "gpu_memory_mb_total",
    "gpu_power_watts_mean",
    "gpu_power_watts_peak",
    "gpu_power_watts_limit",
    "gpu_temperature_celsius_mean",
    "gpu_temperature_celsius_peak",
    "joules",
)
GPU_COLUMNS = (*USAGE_COLUMNS, "images_per_joule")
# Behind all others.
COST_COLUMNS = ("gpu_hours", "energy_kwh", "cost")
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class _Rule:
    """When a figure is worth a sentence.

    Attributes:
        percent: The figure, of all arms.
        holds: For which percentages.
        sentence: With the percentages where the braces are.
    """

    percent: Callable[[pd.DataFrame], pd.Series]
    holds: Callable[[Any], Any]
    sentence: str


def _utilisation(arms: pd.DataFrame) -> pd.Series:
    return arms["gpu_utilization_mean"]


def _memory(arms: pd.DataFrame) -> pd.Series:
    return 100 * arms["gpu_memory_mb_peak"] / arms["gpu_memory_mb_total"]


def _power(arms: pd.DataFrame) -> pd.Series:
    return 100 * arms["gpu_power_watts_mean"] / arms["gpu_power_watts_limit"]


RULES = (
    _Rule(
        _utilisation,
        lambda percent: percent < 50,
        "the GPU was at work {} of the time, under half of it. If one CPU core is fully busy meanwhile, the CPU is the "
        "bottleneck; otherwise more seeds or more arms at once fill the gaps and change no result. A larger "
        "training.batch_size does too, but it changes the training.",
    ),
    _Rule(_utilisation, lambda percent: percent > 90, "the GPU was at work {} of the time, which is good."),
    _Rule(
        _memory,
        lambda percent: percent < 70,
        "at most {} of the GPU's memory was in use: there is room for more seeds or arms at once, which changes no "
        "result, for a larger network, or for a larger training.batch_size, which changes the training.",
    ),
    _Rule(
        _memory,
        lambda percent: percent > 95,
        "up to {} of the GPU's memory was in use, and little is left: train fewer arms or seeds at once, or a smaller "
        "training.batch_size with more training.accumulation_steps, which keeps the images of an update but not those "
        "of a batch normalisation.",
    ),
    _Rule(
        _power,
        lambda percent: percent < 70,
        "the GPU drew {} of the power that it may: it is under-used, because it waits or because its kernels are too "
        "small to fill it. More seeds or arms at once, or a larger network, use more of it.",
    ),
)


def add_costs(results: pd.DataFrame, gpu_hours: pd.Series | float, price_per_gpu_hour: float | None) -> pd.DataFrame:
    """`results` with `COST_COLUMNS`: empty where there was no GPU, or where its price is not known.

    Args:
        results: With `joules`, a row for each training.
        gpu_hours: Of each, NaN without a GPU.
        price_per_gpu_hour: In any currency; None: not known.
    """
    price = math.nan if price_per_gpu_hour is None else price_per_gpu_hour
    results = results.assign(gpu_hours=gpu_hours, energy_kwh=results["joules"] / JOULES_PER_KWH)
    return results.assign(cost=results["gpu_hours"] * price)


def describe_costs(runs: pd.DataFrame) -> str:
    """What trainings cost together, in a sentence that leaves out what is not known of all; nothing without a GPU.

    Args:
        runs: With `COST_COLUMNS`, a row for each training.
    """
    if runs.empty or runs["gpu_hours"].isna().any():
        return ""
    hours, kwh, cost = (runs[name].sum(skipna=False) for name in COST_COLUMNS)
    trainings = "training that was" if len(runs) == 1 else f"{len(runs):,} trainings that were"
    energy = "" if math.isnan(kwh) else f" and {amount(kwh)} kWh"
    money = "" if math.isnan(cost) else f", which cost {amount(cost)} at {amount(cost / hours)} per GPU-hour"
    return f"The {trainings} tested took {amount(hours)} GPU-hours{energy}{money}."


def amount(value: float) -> str:
    """Hundredths as of money, of less than one three digits; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def hints(comparison: pd.DataFrame) -> list[str]:
    """One sentence for each rule that holds for some arms; none where there was no GPU, or where nothing stands out.

    Args:
        comparison: A row per arm, as `compare_arms` returns it.
    """
    told = []
    for rule in RULES:
        percent = rule.percent(comparison)
        which = rule.holds(percent)
        if which.any():
            names = ", ".join(dict.fromkeys(comparison["model_type"][which]))
            arms = "While any arm trained" if which.all() and len(which) > 1 else f"While {names} trained"
            told.append(f"{arms}, {rule.sentence.format(_range(percent[which]))}")
    return told


def _range(percent: pd.Series) -> str:
    low, high = f"{percent.min():.0f}", f"{percent.max():.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"
