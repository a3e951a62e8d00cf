"""Comparison over sizes: what is paired, corrected and told."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from collective_pipeline.config import MODEL_TYPES, ComparisonConfig
from collective_pipeline.evaluation.comparison import (
    COSTS,
    OVERALL_COLUMNS,
    RUN_COLUMNS,
    SIZE_COLUMNS,
    compare_arms,
    compare_overall,
    compare_sizes,
    holm,
    pareto_front,
    probability_of_improvement,
)
from collective_pipeline.evaluation.gpu import GPU_COLUMNS
from collective_pipeline.evaluation.sweep_report import write_sweep_report
from collective_pipeline.evaluation.verdict import answer_search, answer_sizes
from collective_pipeline.tuning.outcome import IMPORTANCE_COLUMNS, TRIAL_COLUMNS

CONFIG = ComparisonConfig(resamples=500)
SIZES = (1_000_000, 2_000_000, 4_000_000)


def grid(num_seeds=5, *, lead=0.0, arms=MODEL_TYPES, sizes=SIZES):
    """Accuracies that grow with size, the collective ahead by `lead` points."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            **dict.fromkeys((*RUN_COLUMNS, *GPU_COLUMNS), 1.0),
            "model_type": arm,
            "seed": seed,
            "params": size + 10 * place,
            "target_params": size,
            "test_accuracy": round(95 + size / 1e6 + lead * (arm == "collective") + rng.normal(0, 0.1), 2),
            "test_loss": rng.uniform(0.1, 0.2),
            "macs": size,
            "train_seconds": size / 1e6,
            "latency_ms": 1 + place,
            "diverged": False,
        }
        for size in sizes
        for place, arm in enumerate(arms)
        for seed in range(num_seeds)
    )


def test_every_size_is_compared_as_if_alone_but_for_the_correction():
    """Means, intervals and differences are those of `compare_arms`; Holm's family is all arms and sizes."""
    runs = grid()
    comparison = compare_sizes(runs, CONFIG)

    assert tuple(comparison) == SIZE_COLUMNS
    raw = []
    for size, at_size in runs.groupby("target_params"):
        alone = compare_arms(at_size, CONFIG)
        own = comparison[comparison["target_params"] == size].reset_index(drop=True)
        same = [name for name in alone if name != "p_value_holm"]
        pd.testing.assert_frame_equal(own[same], alone[same])
        pair = at_size.pivot(index="seed", columns="model_type", values="test_accuracy")
        raw += [sign_flip(pair[arm] - pair["collective"]) for arm in MODEL_TYPES[1:]]
    assert comparison["p_value_holm"].dropna().tolist() == pytest.approx(holm(raw))


def sign_flip(differences):
    observed = abs(round(differences.mean(), 9))
    flips = itertools.product((1, -1), repeat=len(differences))
    return float(np.mean([abs(round((differences * np.array(signs)).mean(), 9)) >= observed for signs in flips]))


def test_over_all_sizes_a_seed_is_its_mean_over_sizes():
    runs = grid()
    overall = compare_overall(runs, CONFIG).set_index("model_type")

    assert ("model_type", *overall.columns) == OVERALL_COLUMNS
    assert (overall["num_seeds"] == 5).all()
    means = runs.groupby(["seed", "model_type"])["test_accuracy"].mean().unstack()
    raw = [sign_flip(means[arm] - means["collective"]) for arm in MODEL_TYPES[1:]]
    assert overall["p_value_holm"].dropna().tolist() == pytest.approx(holm(raw))
    for arm in MODEL_TYPES[1:]:
        assert overall.loc[arm, "difference_to_reference"] == pytest.approx((means[arm] - means["collective"]).mean())


def test_what_seeds_have_in_common_at_all_sizes_is_no_evidence():
    """The null check over sizes: no arm is better, but a seed has its luck at every size.

    5 % of 200 are 10; 16 leave room for chance. Pairs of size and seed would be called different in over 40.
    """
    rng = np.random.default_rng(0)
    runs = grid(10, arms=["collective", "shallow"])
    called = 0
    for _ in range(200):
        luck = rng.normal(0, 0.1, (2, 10))
        own = [luck[int(arm == "shallow"), seed] for arm, seed in zip(runs["model_type"], runs["seed"], strict=True)]
        runs["test_accuracy"] = np.round(99 + np.array(own) + rng.normal(0, 0.05, len(runs)), 2)
        called += compare_overall(runs, ComparisonConfig(resamples=100)).loc[1, "p_value_holm"] <= 0.05

    assert called <= 16


def test_a_lead_at_all_sizes_is_found_over_them():
    runs = grid(8, lead=0.3)

    assert (compare_overall(runs, CONFIG)["p_value_holm"].dropna() < 0.05).all()


def test_an_arm_that_failed_at_one_size_is_told_and_hides_no_other():
    """Its seeds have no mean over all sizes; the verdict on the other arms stays."""
    runs = grid(8, lead=0.5)
    failed = (runs["model_type"] == "deep") & (runs["target_params"] == SIZES[1])
    runs.loc[failed, ["test_accuracy", "test_loss"]] = np.nan
    runs.loc[failed, "diverged"] = True
    overall, comparison = compare_overall(runs, CONFIG), compare_sizes(runs, CONFIG)
    told = answer_sizes(overall, comparison, CONFIG, near=0)

    assert overall.set_index("model_type").loc["deep", "num_seeds"] == 0
    assert told.startswith("Yes: the collective is better than each of the 5 single networks over 3 sizes")
    assert "There is no result of deep at one of the sizes." in told and "8 of deep's" in told


def test_one_arm_under_two_names_is_rarely_called_different():
    """The null check: 200 times two samples of ten trainings of the same arm; at most 5 % are called different."""
    rng = np.random.default_rng(0)
    pool = np.round(rng.normal(99.1, 0.06, 1000), 2)
    called = 0
    for _ in range(200):
        runs = grid(10, arms=["collective", "shallow"], sizes=SIZES[:1])
        runs["test_accuracy"] = rng.choice(pool, len(runs))
        called += compare_arms(runs, ComparisonConfig(resamples=100)).loc[1, "p_value_holm"] <= 0.05

    assert called <= 0.05 * 200


def test_the_front_is_what_nothing_beats_in_both():
    rng = np.random.default_rng(0)
    accuracy, cost = pd.Series(rng.integers(0, 10, 40)), pd.Series(rng.integers(0, 10, 40))
    front = pareto_front(accuracy.astype(float), cost)

    for i in range(40):
        beaten = any(
            accuracy[j] >= accuracy[i] and cost[j] <= cost[i] and (accuracy[j] > accuracy[i] or cost[j] < cost[i])
            for j in range(40)
        )
        assert front[i] != beaten


def test_how_well_sizes_are_matched_puts_no_arm_on_the_front():
    """Three arms of one target: the best of them is on the front of parameters, whichever came out smallest."""
    runs = grid(arms=["collective", "shallow", "deep"], sizes=SIZES[:2])
    place = runs["model_type"].map({"collective": 0, "shallow": 1, "deep": 2})
    runs["test_accuracy"] = 95 + runs["target_params"] / 1e6 + 0.1 * place
    runs["params"] = runs["macs"] = (runs["target_params"] * (0.999 + 0.001 * place)).astype(int)
    comparison = compare_sizes(runs, CONFIG)

    for cost in ("params", "macs"):
        assert comparison.loc[comparison[f"on_front_{cost}"], "model_type"].tolist() == ["deep", "deep"]


def test_what_has_no_accuracy_is_on_no_front():
    assert pareto_front(pd.Series([np.nan, 90.0]), pd.Series([1, 2])).tolist() == [False, True]


def test_the_probability_of_improvement_counts_pairs():
    arm, reference = pd.Series([1.0, 2.0, 3.0]), pd.Series([2.0, 0.0])
    wins = sum((a > r) + 0.5 * (a == r) for a in arm for r in reference)

    assert probability_of_improvement(arm, reference) == pytest.approx(wins / 6)
    assert probability_of_improvement(arm, arm) == 0.5
    assert np.isnan(probability_of_improvement(arm, pd.Series([np.nan])))


@pytest.mark.parametrize(
    ("lead", "verdict"),
    [(0.5, "Yes: the collective is better"), (-0.5, "No: the collective is worse"), (0.0, "no difference was found")],
)
def test_the_answer_is_over_all_sizes_and_shows_the_nearest_one(lead, verdict):
    runs = grid(8, lead=lead)
    told = answer_sizes(compare_overall(runs, CONFIG), compare_sizes(runs, CONFIG), CONFIG, near=2_100_000)

    assert verdict in told
    assert "over 3 sizes from 1.00 to 4.00 million parameters" in told
    assert "8 seeds" in told
    assert re.search(r"; at 2\.00 million parameters its test accuracy of 9[67]\.\d\d % (is|equals)", told)


def test_too_few_seeds_are_no_verdict_however_many_sizes():
    runs = grid(5)
    told = answer_sizes(compare_overall(runs, CONFIG), compare_sizes(runs, CONFIG), CONFIG, near=0)

    assert "With 5 seeds it cannot be told" in told and "at least 8 seeds are needed" in told


def trials(num_trials):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "model_type": MODEL_TYPES[i % 7],
            "unit": i // 7,
            "state": "pruned" if i % 3 else "complete",
            "val_accuracy": rng.uniform(90, 99),
            "params": int(rng.uniform(1e6, 8e6)),
            "epochs": 20 if i % 3 else 60,
            "max_epochs": 60,
            "seconds": 10.0,
            "values": '{"training.learning_rate": 0.001, "collective.n_total": 8, "training.optimizer": "adamw"}',
            "failure": None,
        }
        for i in range(num_trials)
    )[list(TRIAL_COLUMNS)]


def write(num_trials=0):
    runs = grid()
    overall, comparison = compare_overall(runs, CONFIG), compare_sizes(runs, CONFIG)
    importance = pd.DataFrame(
        [(arm, f"training.p{i}", 0.2) for arm in MODEL_TYPES for i in range(5)] if num_trials else [],
        columns=list(IMPORTANCE_COLUMNS),
    )
    return write_sweep_report(
        title="Sizes",
        answer=answer_sizes(overall, comparison, CONFIG, near=2_000_000),
        runs=runs,
        comparison=comparison,
        overall=overall,
        trials=trials(num_trials) if num_trials else pd.DataFrame(columns=list(TRIAL_COLUMNS)),
        importance=importance,
        facts={"Run": {"command": "kedro run --pipeline sweep"}},
    )


def test_every_figure_has_a_table_behind_it():
    page = write(50)
    figures = page.split("<figure>")[1:]

    assert len(figures) == 8
    assert all('href="data:text/csv' in figure.split("</figure>")[0] for figure in figures)


def test_a_grid_shows_nothing_of_a_search():
    page = write()

    assert "pruning" not in page.split("<script>")[0].lower()
    for cost in COSTS:
        assert f"on_front_{cost}" in page


def test_a_search_says_that_its_arms_are_not_matched_in_size():
    """In the answer and in how to read it: what looks like a better arm may be a larger one."""
    runs = grid(8, arms=["collective", "shallow", "deep"], sizes=SIZES[:1])
    runs.loc[runs["model_type"] == "deep", "params"] = 3_200_000
    told = answer_search(compare_sizes(runs, CONFIG), CONFIG)
    differ = "not matched in size: each has the size that its search found best, and these differ by up to 3.2 times"

    assert differ in told
    assert "not matched in size" in write(50) and "not matched" not in write()


def test_a_search_of_one_arm_has_nothing_to_match():
    assert "not matched" not in answer_search(compare_sizes(grid(arms=["deep"], sizes=SIZES[:1]), CONFIG), CONFIG)


def test_a_report_of_two_thousand_trials_stays_small():
    assert len(write(2000).encode()) < 15e6
