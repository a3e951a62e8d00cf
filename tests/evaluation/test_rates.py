"""The suggestion is where the loss falls fastest, whatever the noise and however it ends."""

import math

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


@pytest.mark.parametrize("losses", [np.linspace(1, 4, 30), np.full(30, math.nan)])
def test_without_a_fall_nothing_is_suggested(losses):
    table = tabulate_rates(RATES[:30], losses, planned=30)
    found = suggest_rate(table)

    assert set(found.values()) == {None}
    told = answer_rates(found, table, name="plain", planned=30)
    assert "does not fall at any rate" in told
    assert told in write_rate_report(title="t", table=table, found=found | {"answer": told}, facts={})


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


def test_a_table_that_was_read_from_its_file_may_have_other_last_digits():
    table = tabulate_rates(RATES, curve(), planned=300)
    read = table.assign(rate=np.nextafter(table["rate"], 1))  # as pandas 2 reads some numbers
    found = {"answer": "This one.", **suggest_rate(table)}
    page = write_rate_report(title="Which?", table=read, found=found, facts={"Run": {}})

    assert page.count(f"{found['suggested_rate']:.2e}") == 1
