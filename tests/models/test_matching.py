"""The six single networks meet any parameter budget, by arithmetic alone, without leaving their type."""

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from collective_pipeline.config import BASELINES, DEBUG, PHASE1, BaselineConfig, UserError
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.matching import (
    count_collective,
    count_params,
    match_arm,
    match_baseline,
    match_baselines,
    match_collective,
)

BUDGETS = (
    559_738,
    567_044,
    2_884_042,
    2_969_887,
    1_800_000,
    2_850_000,
    3_950_000,
    5_000_000,
    6_100_000,
    7_150_000,
)
LAYERS = {
    "shallow": range(2, 4),
    "balanced": range(4, 6),
    "deep": range(8, 11),
    "very_deep": range(12, 16),
    "deep_resnet": range(8, 11),
    "very_deep_resnet": range(12, 16),
}
RESNETS = ("deep_resnet", "very_deep_resnet")


def match(model_type, target_params, *, in_dim=784, num_classes=10, **config):
    """A match with the usual tolerance of 0.1 %."""
    return match_baseline(model_type, target_params, BaselineConfig(**config), in_dim=in_dim, num_classes=num_classes)


def off_the_grid(arm):
    """How many layers have a width that is no multiple of 8, which is what makes matrix kernels slow."""
    return sum(dim % 8 != 0 for dim in arm.architecture.hidden_dims)


def really_built(arm):
    """Trainable parameters of the arm's network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_arm(arm).parameters())


@pytest.mark.parametrize("target_params", BUDGETS)
@pytest.mark.parametrize("model_type", BASELINES)
def test_every_budget_is_met_by_every_type(model_type, target_params):
    """Within 0.1 %, as many layers as the type has, all widths in multiples of 8, counted as it is built."""
    arm = match(model_type, target_params)
    dims = arm.architecture.hidden_dims

    assert arm.model_type == model_type
    assert arm.target_params == target_params
    assert abs(arm.params - target_params) <= 0.001 * target_params
    assert arm.params == really_built(arm)
    assert len(dims) in LAYERS[model_type]
    assert off_the_grid(arm) == 0
    assert arm.architecture.residual == (model_type in RESNETS)


@pytest.mark.parametrize("target_params", BUDGETS)
@pytest.mark.parametrize("model_type", [name for name in BASELINES if name != "balanced"])
def test_only_the_outer_layers_differ_in_width(model_type, target_params):
    """First and last meet the budget, the last alone in a residual network, and are off by a third at most."""
    dims = match(model_type, target_params).architecture.hidden_dims
    inner = set(dims[:-1] if model_type in RESNETS else dims[1:-1])
    usual = dims[len(dims) // 2]

    assert len(inner) <= 1
    assert all(abs(dim / usual - 1) <= 1 / 3 for dim in dims)


@pytest.mark.parametrize("target_params", BUDGETS)
def test_balanced_halves(target_params):
    """Every layer is about half of the one before."""
    dims = match("balanced", target_params).architecture.hidden_dims

    assert all(0.4 < after / before < 0.6 for before, after in pairwise(dims))


@pytest.mark.parametrize("model_type", BASELINES)
def test_nothing_is_built_while_searching(model_type, monkeypatch):
    """A network is its list of widths until it is wanted."""

    def refuse(*args, **kwargs):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)

    assert match(model_type, 2_969_887).params
    with pytest.raises(AssertionError, match="a module was built"):
        nn.ReLU()


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("target_params", BUDGETS[2:])
@pytest.mark.parametrize("model_type", BASELINES)
def test_other_inputs_and_classes_are_matched_too(model_type, target_params, num_classes):
    """CIFAR-10 and CIFAR-100: 3072 inputs."""
    arm = match(model_type, target_params, in_dim=3072, num_classes=num_classes)

    assert abs(arm.params - target_params) <= 0.001 * target_params
    assert arm.params == really_built(arm)
    assert len(arm.architecture.hidden_dims) in LAYERS[model_type]
    assert off_the_grid(arm) == 0


@pytest.mark.parametrize("target_params", [30_000, 120_000, 1_000_000_000])
@pytest.mark.parametrize("model_type", BASELINES)
def test_very_small_and_very_large_budgets_are_met(model_type, target_params):
    """There is no ceiling to run into, and below the grid of 8 there is the grid of 1."""
    arm = match(model_type, target_params, tolerance=0.02 if target_params < 100_000 else 0.001)

    assert abs(arm.param_error_pct) <= (2 if target_params < 100_000 else 0.1)
    assert arm.params == really_built(arm)


@pytest.mark.parametrize(
    ("model_type", "target_params", "layers_off"),
    [("deep", 60_000, 0), ("deep_resnet", 80_000, 1), ("very_deep", 30_000, 12)],
)
def test_widths_leave_the_grid_only_where_the_budget_demands_it(model_type, target_params, layers_off):
    """Multiples of 8 are too coarse for some very small budgets: one layer leaves them, and if need be all do."""
    assert off_the_grid(match(model_type, target_params)) == layers_off


@pytest.mark.parametrize("model_type", BASELINES)
def test_budgets_near_each_other_are_all_met(model_type):
    """No gaps between the anchors, where a width of 784 meets the input's among them."""
    for target_params in range(5_000_000, 6_000_000, 12_345):
        arm = match(model_type, target_params)

        assert abs(arm.param_error_pct) <= 0.1
        assert arm.params == count_params(
            arm.architecture.hidden_dims, in_dim=784, num_classes=10, residual=arm.architecture.residual
        )


@pytest.mark.parametrize("model_type", BASELINES)
def test_an_unreachable_budget_names_the_nearest(model_type):
    """Fewer parameters than the smallest network has: the message says how many that one has."""
    smallest = count_params([1] * LAYERS[model_type][0], in_dim=784, num_classes=10, residual=model_type in RESNETS)
    with pytest.raises(UserError) as caught:
        match(model_type, 100)

    message = str(caught.value)
    assert model_type in message
    assert f"{smallest:,}" in message
    assert "baselines.target_params" in message


def test_a_tolerance_too_fine_names_the_nearest():
    """The named network exists, and it has as many parameters as the message says."""
    with pytest.raises(UserError) as caught:
        match("deep_resnet", 100_003, tolerance=1e-9)

    found = re.search(r"nearest has ([\d,]+) \(hidden widths ([\d, ]+)\)", str(caught.value))
    dims = [int(width) for width in found[2].split(", ")]
    count = int(found[1].replace(",", ""))
    assert count_params(dims, in_dim=784, num_classes=10, residual=True) == count
    assert abs(count - 100_003) < 0.02 * 100_003


ANCHORS = {  # widths of regular networks near each budget, and how far off they are in percent
    567_044: ((453, 0.10), (505, -0.12), (232, -0.09), (192, -0.38), (192, -0.21), (165, -0.19)),
    2_969_887: ((1369, -0.02), (1609, 0.01), (596, 0.14), (483, -0.09), (547, 0.05), (451, -0.14)),
    1_800_000: ((1000, 0.00), (1160, 0.03), (452, -0.01), (369, 0.23), (405, -0.14), (338, 0.14)),
    2_850_000: ((1335, 0.01), (1567, -0.05), (582, -0.10), (473, 0.13), (534, 0.07), (441, 0.05)),
    3_950_000: ((1627, -0.03), (1924, 0.02), (695, -0.01), (563, 0.10), (645, -0.10), (530, -0.10)),
    5_000_000: ((1872, 0.04), (2223, -0.04), (789, 0.06), (638, 0.14), (738, -0.09), (605, 0.07)),
    6_100_000: ((2102, 0.00), (2506, 0.04), (877, 0.02), (708, 0.03), (826, 0.00), (675, 0.03)),
    7_150_000: ((2304, 0.02), (2753, -0.02), (954, 0.02), (769, -0.09), (903, 0.08), (736, -0.04)),
}


@pytest.mark.parametrize("target_params", ANCHORS)
@pytest.mark.parametrize("model_type", BASELINES)
def test_counts_agree_with_what_was_verified(model_type, target_params):
    """Regular networks whose distance from the budget is known."""
    width, percent = ANCHORS[target_params][BASELINES.index(model_type)]
    num_layers = LAYERS[model_type][0]
    dims = [width // 2**layer for layer in range(num_layers)] if model_type == "balanced" else [width] * num_layers
    count = count_params(dims, in_dim=784, num_classes=10, residual=model_type in RESNETS)

    assert 100 * (count / target_params - 1) == pytest.approx(percent, abs=0.0051)


@pytest.mark.parametrize(
    ("dims", "residual", "expected"),
    [
        ((460, 410), False, 555_960),
        ((500, 330), False, 562_800),
        ((1380, 1370), False, 2_994_480),
        ((516, 258, 129, 64), False, 582_761),
        ((1609, 804, 402, 201), False, 2_970_170),
        ((230,) * 8, False, 558_450),
        ((581,) * 8, False, 2_838_195),
        ((190,) * 12, False, 554_810),
        ((489,) * 12, False, 3_036_211),
        ((193,) * 8, True, 570_132),
        ((539,) * 8, True, 2_897_674),
        ((170,) * 12, True, 592_460),
        ((456,) * 12, True, 3_023_746),
    ],
)
def test_counts_agree_with_what_was_measured(dims, residual, expected):
    """To the last parameter, for networks that were really built."""
    assert count_params(dims, in_dim=784, num_classes=10, residual=residual) == expected


@pytest.mark.parametrize("residual", [True, False])
def test_a_width_that_meets_the_input_needs_no_skip(residual):
    """At a width of 784 the projection of the first layer falls away."""
    assert count_params([784], in_dim=784, num_classes=10, residual=residual) == 784 * 785 + 2 * 784 + 785 * 10


@pytest.mark.parametrize(
    ("collective", "in_dim", "num_classes", "params"),
    [
        (DEBUG.collective, 784, 10, 559_738),
        (DEBUG.collective, 3072, 10, 2_024_058),
        (DEBUG.collective, 3072, 100, 2_053_276),
        (PHASE1.collective, 784, 10, 2_884_042),
        (PHASE1.collective, 3072, 10, 8_741_322),
        (PHASE1.collective, 3072, 100, 8_775_972),
    ],
)
def test_match_baselines_gives_all_six(collective, in_dim, num_classes, params):
    """One import, one call: every type, as large as the collective, with no width that slows the matrix kernels."""
    arms = match_baselines(collective, in_dim=in_dim, num_classes=num_classes)

    assert list(arms) == list(BASELINES)
    for name, arm in arms.items():
        assert arm.model_type == name
        assert arm.target_params == params
        assert abs(arm.param_error_pct) <= 0.1
        assert off_the_grid(arm) == 0


def test_a_budget_of_ones_own_goes_before_the_collectives():
    """`target_params` replaces the collective's size; dropout goes to every network."""
    arms = match_baselines(PHASE1.collective, BaselineConfig(target_params=1_800_000, dropout=0.35))

    assert {arm.target_params for arm in arms.values()} == {1_800_000}
    assert {arm.architecture.dropout for arm in arms.values()} == {0.35}


@pytest.mark.parametrize("model_type", ["collective", *BASELINES])
def test_match_arm_gives_the_type_asked_for(model_type):
    """The collective as configured, or a single network of its size."""
    arm = match_arm(model_type, DEBUG.collective, BaselineConfig(), in_dim=3072, num_classes=10)

    assert arm.model_type == model_type
    assert arm.params == really_built(arm)
    assert arm.target_params == count_collective(DEBUG.collective, in_dim=3072, num_classes=10)
    assert (arm.architecture == DEBUG.collective) == (model_type == "collective")


def test_the_collective_keeps_its_size_whatever_the_budget_of_the_others():
    """`target_params` is the single networks' alone."""
    arm = match_arm("collective", DEBUG.collective, BaselineConfig(target_params=1_800_000), in_dim=784, num_classes=10)

    assert arm.params == 559_738


SIZES = (300_000, 1_800_000, 2_850_000, 3_950_000, 5_000_000, 6_100_000, 7_150_000)


@pytest.mark.parametrize("size", SIZES)
def test_a_collective_meets_any_size_and_keeps_its_proportions(size):
    """Within 0.1 %, really counted; experts and analysts scaled alike, the head within a factor of four."""
    arm = match_collective(size, PHASE1.collective, tolerance=0.001, in_dim=784, num_classes=10)
    scaled, own = arm.architecture, PHASE1.collective

    assert arm.target_params == size
    assert arm.params == really_built(arm)
    assert abs(arm.params - size) <= 0.001 * size
    factors = [
        new / old
        for name in ("expert_hidden", "analyst_hidden")
        for new, old in zip(getattr(scaled, name), getattr(own, name), strict=True)
    ]
    assert max(factors) <= 1.2 * min(factors)
    assert 0.25 <= scaled.collective_hidden_scale <= 4.01
    assert scaled.n_total == own.n_total and scaled.num_experts == own.num_experts


def test_a_collective_of_its_own_size_stays_as_it_is():
    arm = match_collective(2_884_042, PHASE1.collective, tolerance=0.001, in_dim=784, num_classes=10)

    assert arm.params == 2_884_042
    assert arm.architecture.expert_hidden == PHASE1.collective.expert_hidden


def test_a_size_out_of_a_collectives_reach_is_refused():
    with pytest.raises(UserError, match=r"has 1,000 parameters within 0\.1 %: the nearest has"):
        match_collective(1000, PHASE1.collective, tolerance=0.001, in_dim=784, num_classes=10)
