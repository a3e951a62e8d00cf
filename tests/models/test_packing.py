"""Skipping closed channels changes nothing but the time."""

import pytest
import torch
from tests.models.test_gating import ARCHITECTURES, GATED, images, network

from collective_pipeline.config import UserError
from collective_pipeline.models.packing import PackedClassifier

SKIPPABLE = {name: architecture for name, architecture in GATED.items() if architecture.gates.position == "post_norm"}


def half_shut(architecture, *, offset=0.0):
    """A network in evaluation mode with norms of its own, and gates of which `offset` opens more or fewer."""
    model = network(architecture)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    model.gating.heads.offset = offset
    model.gating.heads.weight.data *= 20
    return model.eval()


@pytest.mark.parametrize("group_size", [1, 2, 100])
@pytest.mark.parametrize("architecture", SKIPPABLE.values(), ids=SKIPPABLE)
def test_the_answers_are_those_of_the_whole_network(architecture, group_size):
    """Whichever images are computed together, in their order."""
    model = half_shut(architecture)
    logits, parts = model(images())
    shut = (parts["gates"] == 0).double().mean()

    assert 0.1 < shut < 0.9
    torch.testing.assert_close(PackedClassifier(model, group_size=group_size)(images()), logits)


@pytest.mark.parametrize("architecture", SKIPPABLE.values(), ids=SKIPPABLE)
def test_also_where_all_gates_are_shut(architecture):
    model = half_shut(architecture, offset=-1e6)
    logits, parts = model(images())

    assert not parts["gates"].any()
    torch.testing.assert_close(PackedClassifier(model)(images()), logits)


@pytest.mark.parametrize("name", ["basic", "basic_legacy"])
def test_what_has_nothing_to_skip_is_refused(name):
    """A network without gates, or with the original's, whose closed channels are constants and no zeros."""
    with pytest.raises(UserError, match="only closed gates after a norm can be skipped"):
        PackedClassifier(network(ARCHITECTURES[name]).eval())


def test_it_goes_where_it_is_sent():
    packed = PackedClassifier(half_shut(GATED["basic_gated"]))
    exact = packed(images())

    assert packed.float()(images().float()).dtype == torch.float32
    torch.testing.assert_close(packed(images().float()).double(), exact, rtol=1e-3, atol=1e-4)


def test_several_seeds_are_refused():
    with pytest.raises(UserError, match="of one seed in evaluation mode"):
        PackedClassifier(network(ARCHITECTURES["basic_gated"], (0, 1)).eval())
