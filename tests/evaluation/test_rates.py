"""The suggestion is where the loss falls fastest, whatever the noise and however it ends."""

import math
import re

import numpy as np
import pytest

from collective_pipeline.evaluation.rates import (
    RATE_COLUMNS,
    answer_rates,
    plot_rates,
    suggest_rate,
    tabulate_rates,
    write_rate_report,
)

RATES = np.geomspace(1e-7, 1.0, 300)


def curve(rates=RATES, *, noise=0.0, steepest=1e-3, lowest=1e-2):
    """Falls from 2.3 like a logistic around `steepest`, and rises steeply beyond `lowest`."""
    fall = 2.3 - 1.5 / (1 + (steepest / rates) ** 2)
    rise = (rates / (3 * lowest)) ** 2
    return fall + rise + noise * np.random.default_rng(0).normal(size=len(rates))


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("steepest", [1e-4, 1e-3])
def test_the_steepest_descent_is_suggested(noise, steepest):
    found = suggest_rate(tabulate_rates(RATES, curve(noise=noise, steepest=steepest), planned=300))

    assert found["suggested_rate"] == pytest.approx(steepest, rel=0.6)
    assert found["suggested_rate"] < found["rate_of_lowest_loss"] < 3e-2


def test_smoothing_is_a_mean_of_neighbours_and_keeps_straight_lines():
    """Without delay; at the ends of those that there are."""
    line = np.linspace(3, 1, 100)
    smoothed = tabulate_rates(RATES[:100], line, planned=100)["smoothed"].to_numpy()

    np.testing.assert_allclose(smoothed[5:-5], line[5:-5])
    assert smoothed.min() >= 1 and smoothed.max() <= 3 and (np.diff(smoothed) < 0).all()


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_part_of_it(end):
    losses = [*curve()[:200].tolist(), end]
    table = tabulate_rates(RATES[:201], losses, planned=300)
    found = suggest_rate(table)

    assert math.isnan(table["smoothed"].iloc[-1]) and table["smoothed"].iloc[:-1].notna().all()
    assert found["suggested_rate"] == pytest.approx(1e-3, rel=0.6)
    plot_rates(table, found)


def noise(number, *, seed=0):
    return 4.2 + 0.12 * np.random.default_rng(seed).normal(size=number)


@pytest.mark.parametrize(
    ("losses", "planned", "advice"),
    [
        (np.linspace(1, 4, 30), 30, "lowest at the first rates, so give a lower lr_finder.lowest than 1.0e-07"),
        (np.full(30, math.nan), 30, "give a lower lr_finder.lowest than 1.0e-07"),
        (np.full(30, 2.3), 30, "more updates, lr_finder.updates above 30"),
        (noise(60), 60, "give it more updates, lr_finder.updates above 60"),
        (np.append(noise(25), [9.0, 20.0, 50.0]), 60, "give a lower lr_finder.lowest than 1.0e-07"),
        (
            curve(np.geomspace(1e-7, 2e-4, 300), noise=0.03),
            300,
            "lowest at the last rates, so give a higher lr_finder.highest than",
        ),
    ],
    ids=["rises", "unknown", "level", "noise", "noise that explodes", "begins to fall at the end"],
)
def test_without_a_clear_fall_nothing_is_suggested_but_what_to_do(losses, planned, advice):
    """Nor does the page have a rate to try, or say that there is one."""
    table = tabulate_rates(np.geomspace(1e-7, 1, planned)[: len(losses)], losses, planned=planned)
    found = suggest_rate(table)
    told = answer_rates(found, table, name="plain", planned=planned)
    page = write_rate_report(title="t", table=table, found=found | {"answer": told}, facts={})

    assert set(found.values()) == {None}
    assert "does not fall clearly at any rate" in told and advice in told
    assert told in page and "Smoothed" in page
    assert "alls fastest" not in page.replace("where it falls fastest would be a matter of chance", "")
    assert 'class="value"' not in page


@pytest.mark.parametrize("number", [20, 60, 300])
def test_noise_alone_is_hardly_ever_taken_for_a_fall(number):
    rates = np.geomspace(1e-7, 1, number)
    tables = [tabulate_rates(rates, noise(number, seed=seed), planned=number) for seed in range(200)]

    assert sum(suggest_rate(table)["suggested_rate"] is not None for table in tables) <= 0.02 * len(tables)


def test_the_fastest_fall_is_not_looked_for_in_the_noise_before_it():
    """Where that is steeper, because the loss falls evenly over three powers of ten."""
    rates = np.geomspace(1e-7, 1, 60)
    fall = np.clip((np.log10(rates) + 4) / 3, 0, 1)
    tables = [tabulate_rates(rates, noise(60, seed=seed) - 1.2 * fall, planned=60) for seed in range(50)]

    assert min(suggest_rate(table)["suggested_rate"] for table in tables) > 2e-5


def test_the_answer_says_how_it_ends():
    whole = tabulate_rates(RATES, curve(), planned=300)
    falling = tabulate_rates(RATES, curve(lowest=1e9), planned=300)
    exploded = whole.head(280)

    assert "falls fastest at a learning rate of" in answer_rates(suggest_rate(whole), whole, name="x", planned=300)
    assert answer_rates(suggest_rate(exploded), exploded, name="x", planned=300).endswith("it had exploded.")
    assert "may be higher" in answer_rates(suggest_rate(falling), falling, name="x", planned=300)


def test_the_page_has_the_answer_the_figure_and_every_update():
    table = tabulate_rates(RATES, curve(noise=0.02), planned=300)
    found = suggest_rate(table)
    page = write_rate_report(title="Which?", table=table, found={"answer": "This one.", **found}, facts={"Run": {}})

    assert tuple(table.columns) == RATE_COLUMNS
    assert "This one." in page and "Falls fastest" in page and "Every update (300)" in page
    assert set(re.findall(r'download="([^"]*)"', page)) == {"lr_finder.csv"}


def test_a_table_that_was_read_from_its_file_may_have_other_last_digits():
    table = tabulate_rates(RATES, curve(), planned=300)
    read = table.assign(rate=np.nextafter(table["rate"], 1))  # as pandas 2 reads some numbers
    found = {"answer": "This one.", **suggest_rate(table)}
    page = write_rate_report(title="Which?", table=read, found=found, facts={"Run": {}})

    assert page.count(f"{found['suggested_rate']:.2e}") == 1
