"""What the comparison promises: paired by seed, exact where it can be, and never more said than was measured."""

import itertools

import numpy as np
import pandas as pd
import pytest

from collective_pipeline.config import MODEL_TYPES, ComparisonConfig
from collective_pipeline.evaluation.comparison import (
    COMPARISON_COLUMNS,
    RUN_COLUMNS,
    compare_arms,
    holm,
)
from collective_pipeline.evaluation.gpu import GPU_COLUMNS
from collective_pipeline.evaluation.verdict import answer, answer_worth, seeds_needed

CONFIG = ComparisonConfig(resamples=1000)
DIFFERENCES = ["difference_to_reference", "difference_ci_low", "difference_ci_high", "p_value_holm"]


def runs(accuracies: dict[str, list[float]]) -> pd.DataFrame:
    """Results with these test accuracies, one seed per value."""
    rows = [
        {
            **dict.fromkeys((*RUN_COLUMNS, *GPU_COLUMNS), 1.0),
            "model_type": arm,
            "seed": seed,
            "params": 1_000_000,
            "test_accuracy": accuracy,
            "latency_ms": 0.5,
            "diverged": False,
        }
        for arm, values in accuracies.items()
        for seed, accuracy in enumerate(values, start=42)
    ]
    return pd.DataFrame(rows)


def noisy(num_seeds: int, *, lead: float = 0.0, arms=MODEL_TYPES) -> pd.DataFrame:
    """Every arm around 97 %, the collective ahead by `lead` points."""
    rng = np.random.default_rng(0)
    return runs(
        {arm: np.round(97 + lead * (arm == "collective") + rng.normal(0, 0.1, num_seeds), 2).tolist() for arm in arms}
    )


def by_arm(results: pd.DataFrame) -> pd.DataFrame:
    return compare_arms(results, CONFIG).set_index("model_type")


def sign_flip_by_enumeration(differences: np.ndarray) -> float:
    observed = abs(differences.mean())
    flips = itertools.product((1, -1), repeat=len(differences))
    return float(np.mean([abs((differences * signs).mean()) >= observed - 1e-9 for signs in flips]))


def holm_by_definition(p_values: list[float]) -> list[float]:
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    for rank, i in enumerate(order):
        adjusted[i] = min(1, max((len(p_values) - j) * p_values[order[j]] for j in range(rank + 1)))
    return adjusted.tolist()


def test_columns_and_order_are_as_promised():
    comparison = compare_arms(noisy(3, arms=["deep", "collective", "shallow"]), CONFIG)
    assert tuple(comparison) == COMPARISON_COLUMNS
    assert comparison["model_type"].tolist() == ["deep", "collective", "shallow"]


def test_everything_but_what_would_compare_the_reference_with_itself_is_a_number():
    comparison = by_arm(noisy(3))
    missing = comparison.isna()
    assert missing.loc["collective", ["p_value_holm", "probability_of_improvement"]].all()
    assert missing.to_numpy().sum() == 2
    assert comparison.loc["collective", DIFFERENCES[:3]].tolist() == [0, 0, 0]


def test_efficiencies_are_accuracy_over_parameters():
    arm = by_arm(runs({"deep": [90.0, 92.0]})).loc["deep"]
    assert arm["param_efficiency"] == pytest.approx(9.1)
    assert arm["accuracy_per_million_params"] == pytest.approx(91)
    assert arm["accuracy_per_log10_params"] == pytest.approx(91 / np.log10(1_000_001))


def test_equal_arms_differ_by_nothing():
    values = [97.1, 97.3, 96.9]
    deep = by_arm(runs({"collective": values, "deep": values})).loc["deep"]
    assert deep[DIFFERENCES].tolist() == [0, 0, 0, 1]


def test_identical_seeds_have_an_interval_of_no_width():
    deep = by_arm(runs({"collective": [97.1] * 4, "deep": [97.4] * 4})).loc["deep"]
    assert deep["test_accuracy_ci_low"] == deep["test_accuracy_ci_high"] == 97.4
    assert deep["difference_ci_low"] == deep["difference_ci_high"] == pytest.approx(0.3)


def test_differences_are_arm_minus_reference_paired_by_seed():
    # Seeds differ by whole points, the arms by a constant: only pairing finds it without any spread.
    deep = by_arm(runs({"collective": [90.0, 95.0, 99.0], "deep": [89.5, 94.5, 98.5]})).loc["deep"]
    assert deep[DIFFERENCES[:3]].tolist() == [-0.5, -0.5, -0.5]


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 7, 10])
def test_p_value_counts_all_sign_patterns(num_seeds):
    results = noisy(num_seeds, lead=0.05, arms=["collective", "deep"])
    accuracy = results.pivot(index="seed", columns="model_type", values="test_accuracy")
    expected = sign_flip_by_enumeration((accuracy["deep"] - accuracy["collective"]).to_numpy())
    assert by_arm(results).loc["deep", "p_value_holm"] == pytest.approx(expected)


def test_p_value_counts_ties_as_ties():
    # 0.1 + 0.2 - 0.3 is not 0 in binary; patterns that tie with what was observed must count all the same.
    differences = np.array([0.1, 0.2, -0.3, 0.4])
    deep = by_arm(runs({"collective": [97.0] * 4, "deep": (97 + differences).tolist()})).loc["deep"]
    assert deep["p_value_holm"] == sign_flip_by_enumeration(differences)


def test_p_values_are_corrected_over_all_arms_but_the_reference():
    results = noisy(8, lead=0.1)
    alone = [
        by_arm(results[results["model_type"].isin(["collective", arm])]).loc[arm, "p_value_holm"]
        for arm in MODEL_TYPES[1:]
    ]
    assert by_arm(results).loc[list(MODEL_TYPES[1:]), "p_value_holm"].tolist() == pytest.approx(holm(alone))


@pytest.mark.parametrize("seed", range(20))
def test_holm_equals_its_definition_and_keeps_the_order(seed):
    p_values = np.random.default_rng(seed).choice([0.001, 0.01, 0.02, 0.3, 1.0], size=6).tolist()
    adjusted = holm(p_values)
    assert adjusted == pytest.approx(holm_by_definition(p_values))
    assert np.all(np.diff(np.array(adjusted)[np.argsort(p_values, kind="stable")]) >= 0)
    assert all(p <= corrected <= 1 for p, corrected in zip(p_values, adjusted, strict=True))


@pytest.mark.parametrize("num_seeds", range(2, 11))
def test_intervals_contain_their_means(num_seeds):
    comparison = by_arm(noisy(num_seeds, lead=0.2))
    for value in ("test_accuracy_mean", "difference_to_reference"):
        prefix = value.removesuffix("_mean").removesuffix("_to_reference")
        assert (comparison[f"{prefix}_ci_low"] <= comparison[value]).all()
        assert (comparison[value] <= comparison[f"{prefix}_ci_high"]).all()


def test_order_of_rows_changes_nothing():
    results = noisy(5, lead=0.1)
    shuffled = results.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(by_arm(results), by_arm(shuffled).loc[list(MODEL_TYPES)])


def test_more_seeds_than_can_be_enumerated_still_have_a_p_value():
    p_value = by_arm(noisy(18, lead=0.5, arms=["collective", "deep"])).loc["deep", "p_value_holm"]
    assert 0 < p_value < 0.001


def test_one_seed_has_differences_but_no_intervals():
    deep = by_arm(noisy(1)).loc["deep"]
    assert not np.isnan(deep["difference_to_reference"])
    assert deep[["test_accuracy_ci_low", "difference_ci_low"]].isna().all()
    assert deep["p_value_holm"] == 1


def test_without_the_reference_there_is_no_difference():
    comparison = by_arm(noisy(3, arms=["deep", "shallow"]))
    assert comparison[DIFFERENCES].isna().to_numpy().all()
    assert comparison["test_accuracy_mean"].notna().all()


def test_unpaired_and_repeated_seeds_are_refused():
    results = noisy(3)
    with pytest.raises(ValueError, match="very_deep_resnet has no row for seed 44"):
        compare_arms(results.iloc[:-1], CONFIG)
    with pytest.raises(ValueError, match="collective has seed 42 twice"):
        compare_arms(pd.concat([results, results.iloc[:1]]), CONFIG)


@pytest.mark.parametrize(("num_comparisons", "alpha", "expected"), [(1, 0.05, 6), (6, 0.05, 8), (6, 0.01, 11)])
def test_seeds_needed_is_where_significance_becomes_possible(num_comparisons, alpha, expected):
    assert seeds_needed(num_comparisons, alpha) == expected
    arms = MODEL_TYPES[: num_comparisons + 1]
    for num_seeds in (expected - 1, expected):
        smallest = by_arm(noisy(num_seeds, lead=9, arms=arms))["p_value_holm"].min()
        assert (smallest <= alpha) == (num_seeds == expected)


def say(results: pd.DataFrame) -> str:
    sentence = answer(compare_arms(results, CONFIG), CONFIG)
    assert sentence.endswith(".")
    assert sentence.count(". ") == 0, "one sentence"
    assert "nan" not in sentence
    return sentence


def test_few_seeds_are_not_enough_to_tell():
    sentence = say(noisy(3, lead=1))
    assert "cannot be told whether the collective is better than the 6 single networks" in sentence
    assert "at least 8 seeds are needed" in sentence
    assert "no verdict" in sentence
    assert "percentage points above" in sentence
    assert not sentence.startswith("Yes")


def test_clear_gaps_are_answered():
    assert say(noisy(10, lead=1)).startswith("Yes: the collective is better than each of the 6 single networks")
    assert say(noisy(10, lead=-1)).startswith("No: the collective is worse than each of the 6 single networks")
    assert say(noisy(10, lead=1, arms=["collective", "deep"])).startswith(
        "Yes: the collective is better than the single network deep"
    )


def test_no_difference_found_is_not_called_equal():
    sentence = say(noisy(10))
    assert "no difference was found" in sentence
    assert "does not show that they are equal" in sentence


def test_mixed_findings_name_the_arms():
    base = noisy(10, arms=["collective"])["test_accuracy"]
    rng = np.random.default_rng(3)
    sentence = say(
        runs(
            {
                "collective": base.tolist(),
                "shallow": (base + 0.5).tolist(),
                "deep": (base - 0.5).tolist(),
                "very_deep": (base - 0.7).tolist(),
                "balanced": (base + rng.permutation([0.1, -0.1] * 5)).tolist(),
            }
        )
    )
    assert "better than deep and very_deep but worse than shallow" in sentence
    assert "no difference was found to balanced" in sentence
    assert "0.50 percentage points below" in sentence


def test_observed_difference_and_its_interval_are_seen_from_the_reference():
    sentence = say(runs({"collective": [97.0, 97.2, 97.4], "deep": [96.8, 97.1, 97.1]}))
    assert "97.20 % is 0.20 percentage points above the 97.00 % of deep" in sentence
    low, high = sentence.split("difference ")[-1].removesuffix(").").split(" to ")
    assert 0 < float(low) < 0.2 < float(high)


def test_ties_are_said_without_a_direction():
    sentence = say(runs({"collective": [97.0, 97.2], "deep": [97.0, 97.2]}))
    assert "equals, to two decimals, the 97.10 % of deep" in sentence
    assert "-0.00" not in sentence


def test_one_seed_gives_no_interval():
    assert "one seed gives no interval" in say(noisy(1))


def test_single_arms_are_described():
    assert say(runs({"very_deep_resnet": [97.8, 97.9]})).startswith(
        "very_deep_resnet with 1,000,000 parameters reaches 97.85 % test accuracy, mean of 2 seeds, 95 % interval"
    )
    assert say(noisy(1, arms=["collective"])).startswith("collective with 1,000,000 parameters reaches")
    assert "no collective to compare the 2 arms to" in say(noisy(2, arms=["deep", "shallow"]))


def diverge(results: pd.DataFrame, arm: str, seeds: list[int], *, had_good_weights: bool) -> pd.DataFrame:
    """The same results, with these seeds diverged."""
    results = results.copy()
    which = (results["model_type"] == arm) & results["seed"].isin(seeds)
    results.loc[which, "diverged"] = True
    if not had_good_weights:
        results.loc[which, "test_accuracy"] = np.nan
    return results


def test_diverged_seeds_are_counted_and_said():
    """With good weights from before they count like any other; the table and the answer tell how many there are."""
    results = noisy(10, lead=1.0)
    told = compare_arms(diverge(results, "deep", [42, 43], had_good_weights=True), CONFIG)

    pd.testing.assert_frame_equal(
        told.drop(columns="num_diverged"), compare_arms(results, CONFIG).drop(columns="num_diverged")
    )
    assert told.set_index("model_type").loc["deep", "num_diverged"] == 2
    assert answer(told, CONFIG).startswith("Yes: the collective is better than each of the 6 single networks")
    assert "The loss of 2 of deep's seeds diverged" in answer(told, CONFIG)


def test_a_seed_without_a_result_is_left_out_of_its_pairs():
    """The arm is compared on the seeds that it has; all other arms on all of theirs."""
    results = noisy(10, lead=1.0)
    arms = by_arm(diverge(results, "deep", [42], had_good_weights=False))
    without = by_arm(results[results["seed"] != 42])
    whole = by_arm(results)

    assert arms.loc["deep", "num_seeds"] == 9 and arms.loc["shallow", "num_seeds"] == 10
    for name in DIFFERENCES[:3]:
        assert arms.loc["deep", name] == pytest.approx(without.loc["deep", name])
        assert arms.loc["shallow", name] == pytest.approx(whole.loc["shallow", name])


@pytest.mark.parametrize("arm", ["deep", "collective"])
def test_an_arm_without_any_result_is_said(arm):
    """It fails nothing and hides nothing."""
    comparison = compare_arms(diverge(noisy(10), arm, list(range(42, 52)), had_good_weights=False), CONFIG)
    told = answer(comparison, CONFIG)

    assert comparison.set_index("model_type").loc[arm, "num_seeds"] == 0
    assert "There is no result of deep." in told if arm == "deep" else told.startswith("There is no result: collective")
    assert f"The loss of 10 of {arm}'s seeds diverged" in told


def worth(gains: dict[str, list[float]], *, num_seeds: int) -> str:
    """What is said of changes that gain these points, seed by seed in turn, on 50 %."""
    base = [50.0 + 0.1 * (s % 3) for s in range(num_seeds)]
    results = {"plain": base} | {
        arm: [own + points[s % len(points)] for s, own in enumerate(base)] for arm, points in gains.items()
    }
    return answer_worth(compare_arms(runs(results), CONFIG, reference="plain"), CONFIG, reference="plain")


def test_what_changes_are_worth_is_told_with_those_that_help_hurt_and_are_unclear():
    """The best first, seen from the change; the tests decide who is named where."""
    told = worth({"ema": [-2.0, -1.0], "blur": [4.0, 3.0], "mixup": [1.0, -1.0]}, num_seeds=8)

    assert told.startswith(
        "Of 3 changes to the plain network, blur is worth the most: +3.50 percentage points on 50.09 %"
    )
    assert "(95 % interval of this one difference +3." in told
    assert told.endswith(
        "By more than chance between 8 seeds explains, blur helps; ema hurts; for mixup no difference was found, which "
        "does not show that they are worth nothing."
    )


def test_with_few_seeds_what_changes_are_worth_is_no_verdict():
    """What was seen is told as what it is; one seed gives no interval either."""
    gains = {"ema": [-2.0], "blur": [4.0], "mixup": [0.0]}

    assert worth(gains, num_seeds=2).endswith(
        "With 2 seeds it cannot be told what is more than chance, which takes at least 7: blur seems to help; ema "
        "seems to hurt; mixup seems to change nothing."
    )
    assert "(one seed gives no interval)" in worth(gains, num_seeds=1)


def test_changes_that_make_no_difference_are_all_told_so():
    told = worth({"blur": [1.0, -1.0], "mixup": [1.0, -1.0]}, num_seeds=8)

    assert "With 8 seeds, for blur and mixup no difference was found, which does not show that they are" in told
