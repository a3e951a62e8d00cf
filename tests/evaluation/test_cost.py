"""What an answer costs."""

import pytest
import torch

from collective_pipeline.config import Arm, MlpArchitecture
from collective_pipeline.evaluation.cost import count_macs, measure_latency

ARM = Arm(
    model_type="shallow",
    in_dim=784,
    num_classes=10,
    params=1,
    target_params=1,
    architecture=MlpArchitecture(hidden_dims=(512, 512)),
)


def test_macs_are_those_of_the_matrices():
    """Every weight is used once for an image."""
    assert count_macs(ARM) == 784 * 512 + 512 * 512 + 512 * 10


@pytest.mark.parametrize("batch_size", [1, 7])
def test_latency_is_of_batches_of_that_size(batch_size, monkeypatch):
    """The network sees as many images as were asked for, and the time is one of that many."""
    seen = set()
    forward = torch.nn.Module.__call__

    def watched(module, x):
        seen.add(x.shape[-2])
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Module, "__call__", watched)

    assert measure_latency(ARM, torch.device("cpu"), batch_size=batch_size) > 0
    assert seen == {batch_size}
