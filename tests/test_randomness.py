"""Every draw belongs to one seed and one purpose."""

import pytest
import torch

from collective_pipeline.randomness import make_generator


def draws(seed, purpose):
    """The first numbers of a generator."""
    return torch.rand(20, generator=make_generator(seed, purpose)).tolist()


def test_the_same_seed_and_purpose_draw_the_same():
    """However many other generators there are in between."""
    first = draws(7, "order")
    draws(8, "order")

    assert draws(7, "order") == first


def test_every_seed_and_purpose_draws_differently():
    """No two of them share a stream, also where their names would run together."""
    pairs = [(seed, purpose) for seed in (0, 1, 11, 42, 43, 2**32 - 1) for purpose in ("order", "weights", "1", "11")]
    streams = {tuple(draws(*pair)) for pair in pairs}

    assert len(streams) == len(pairs)


def test_neighbouring_seeds_are_unrelated():
    """Not shifted copies of one stream: their draws are uncorrelated."""
    streams = torch.stack([torch.rand(2000, generator=make_generator(seed, "order")) for seed in range(10)])
    correlation = torch.corrcoef(streams) - torch.eye(10)

    assert correlation.abs().max().item() < 0.15


@pytest.mark.parametrize("seed", [0, 42])
def test_the_global_generator_is_left_alone(seed):
    """Neither read nor moved."""
    torch.manual_seed(seed)
    expected = torch.rand(3)
    torch.manual_seed(seed)
    draws(7, "order")

    assert torch.equal(torch.rand(3), expected)
    assert draws(7, "order") == draws(7, "order")
