"""What a mixture is compared with is as large as it is, and keeps its proportions."""

import pytest
import torch

from collective_pipeline.config import ImageCollectiveConfig, MixtureArchitecture, SubModelArchitecture, UserError
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.mixture_arms import (
    conv_collective_arm,
    dense_arm,
    mixture_arm,
    single_expert_arm,
    sub_model_arm,
)


def make(**changes):
    return MixtureArchitecture.model_validate({"image_shape": (3, 32, 32)} | changes)


def count(arm):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_arm(arm).parameters())


MIXTURES = {
    "default": make(),
    "logits": make(combine="logits"),
    "eight experts": make(n_experts=8),
    "small": make(channels=(16, 32, 64, 128), gate_width=64),
}


def conv_collective(mixture, *, tolerance):
    """With the members that it has by default."""
    return conv_collective_arm(mixture, ImageCollectiveConfig(), tolerance=tolerance)


@pytest.mark.parametrize("match", [dense_arm, single_expert_arm, conv_collective])
@pytest.mark.parametrize("name", MIXTURES)
def test_baselines_are_as_large_as_the_mixture(name, match):
    mixture = mixture_arm(MIXTURES[name], num_classes=10)
    arm = match(mixture, tolerance=0.001)

    assert arm.params == count(arm)
    assert arm.target_params == mixture.params == count(mixture)
    assert abs(arm.param_error_pct) <= 0.1
    ratios = [new / old for new, old in zip(arm.architecture.channels, MIXTURES[name].channels, strict=True)]
    assert max(ratios) / min(ratios) < 1.25


def test_widths_are_round_where_the_tolerance_leaves_room():
    arm = dense_arm(mixture_arm(make(), num_classes=10), tolerance=0.01)

    assert all(width % 8 == 0 for width in arm.architecture.channels)


def test_a_sub_model_fits_into_the_mixture():
    arm = sub_model_arm(make(channels=(8, 8, 8, 16), expert_dropout=0.3), num_classes=5)

    assert arm.architecture == SubModelArchitecture(image_shape=(3, 32, 32), channels=(8, 8, 8, 16), dropout=0.3)
    assert arm.params == arm.target_params == count(arm)


COLLECTIVES = {
    "one of each": {"n_experts": 1, "n_analysts": 1},
    "many": {"n_experts": 8, "n_analysts": 16, "analyst_hidden": (64, 48, 32)},
    "wide analysts": {"analyst_hidden": (256, 128), "analyst_output": 64},
    "little encoded": {"c_expert": 0.01},
    "much encoded": {"c_expert": 1.0},
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_of_any_members_is_as_large_as_the_mixture(name):
    """Its members are what was asked for, and its channels take up the rest."""
    mixture, config = mixture_arm(make(), num_classes=10), ImageCollectiveConfig(**COLLECTIVES[name])
    arm = conv_collective_arm(mixture, config, tolerance=0.001)
    architecture = arm.architecture

    assert arm.params == count(arm) and abs(arm.param_error_pct) <= 0.1
    assert {name: getattr(architecture, name) for name, _ in config} == dict(config)
    assert architecture.image_shape == (3, 32, 32)
    ratios = [new / old for new, old in zip(architecture.channels, (64, 128, 256, 512), strict=True)]
    assert max(ratios) / min(ratios) < 1.25


def test_members_that_leave_no_channels_are_one_sentence():
    """They alone are larger than the mixture; the advice names them."""
    config = ImageCollectiveConfig(n_analysts=100, analyst_hidden=(1024, 512))

    with pytest.raises(UserError, match=r"no conv_collective network .* change merged_moe\.collective, the mixture's"):
        conv_collective_arm(mixture_arm(make(), num_classes=10), config, tolerance=0.001)


def test_a_size_that_no_network_has_is_one_sentence():
    mixture = mixture_arm(make(), num_classes=10)

    with pytest.raises(UserError, match=f"no dense network has the {mixture.params:,} parameters of the mixture"):
        dense_arm(mixture, tolerance=1e-9)
