"""What a mixture is compared with is as large as it is, and keeps its proportions."""

import pytest
import torch

from collective_pipeline.config import MixtureArchitecture, SubModelArchitecture, UserError
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.mixture_arms import dense_arm, mixture_arm, single_expert_arm, sub_model_arm


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


@pytest.mark.parametrize("match", [dense_arm, single_expert_arm])
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


def test_a_size_that_no_network_has_is_one_sentence():
    mixture = mixture_arm(make(), num_classes=10)

    with pytest.raises(UserError, match=f"no dense network has the {mixture.params:,} parameters of the mixture"):
        dense_arm(mixture, tolerance=1e-9)
