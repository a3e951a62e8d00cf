"""Losses on the gates of a mixture of experts, each one value for each seed.

Those called legacy are what the original's code computed, where it was not what its documents say.

Suffixes: S seeds, B batch, N experts. The gates g are `(S, B, N)` and sum to 1 over the experts; the usage of an expert
is the mean of its gates over the batch.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from collective_pipeline.config import RoutingLossConfig

Term = Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]

LEAST_USAGE = 0.3  # of the usage that all experts would have if they were used alike: 0.1 for three, as the original
LEGACY_LEAST_GATE = 0.1
LEGACY_EPSILON = 1e-6


def diversity(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Mean over images of the sum over pairs j != k of g_j g_k: 0 where one expert has all the weight.

    As in the original's documents, but for the mean: a sum over images would weigh it by the batch size.
    """
    g_SBN = parts["gates"]
    return (g_SBN.sum(dim=-1).square() - g_SBN.square().sum(dim=-1)).mean(dim=1)


def balance(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Sum over experts of (1/N - usage)^2, as in the original's documents; the size of the batch does not scale it."""
    usage_SN = parts["gates"].mean(dim=1)
    return (1 / usage_SN.shape[-1] - usage_SN).square().sum(dim=-1)


def min_usage(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Sum over experts of what their usage lacks of 0.3/N. An image may still have all of its weight on one expert."""
    usage_SN = parts["gates"].mean(dim=1)
    return (LEAST_USAGE / usage_SN.shape[-1] - usage_SN).relu().sum(dim=-1)


def decorrelation(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Half the sum of the squared covariances of different experts' gates over the batch (Cogswell et al. 2016).

    An image's gates sum to 1, and so a row of covariances to 0: with two experts this shrinks their variance alone.
    """
    g_SBN = parts["gates"]
    centred_SBN = g_SBN - g_SBN.mean(dim=1, keepdim=True)
    covariance_SNN = centred_SBN.mT @ centred_SBN / g_SBN.shape[1]
    variances_SNN = covariance_SNN.diagonal(dim1=1, dim2=2).diag_embed()
    return (covariance_SNN - variances_SNN).square().sum(dim=(1, 2)) / 2


def legacy_diversity(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The original's code: mean entropy of an image's gates."""
    g_SBN = parts["gates"]
    return -(g_SBN * (g_SBN + LEGACY_EPSILON).log()).sum(dim=-1).mean(dim=1)


def legacy_balance(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The original's code: KL(uniform | softmax(u)) / N with u the sums of the gates over the batch.

    A softmax of sums: the larger the batch, the steeper.
    """
    log_shares_SN = parts["gates"].sum(dim=1).log_softmax(dim=-1)
    num_experts = log_shares_SN.shape[-1]
    return (-math.log(num_experts) - log_shares_SN.mean(dim=-1)) / num_experts


def legacy_min_usage(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The original's code: mean over images of what their smallest gate lacks of 0.1, whoever is used elsewhere."""
    return (LEGACY_LEAST_GATE - parts["gates"].amin(dim=-1)).relu().mean(dim=1)


def legacy_correlation(logits: Tensor, parts: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The original's code: mean of the N x N matrix G^T G. Its sum is that of (sum_n g_n)^2: constant, B / N^2."""
    g_SBN = parts["gates"]
    return (g_SBN.mT @ g_SBN).mean(dim=(1, 2))


# By their names in `config.RoutingLossConfig`.
TERMS: dict[str, Term] = {
    "diversity": diversity,
    "balance": balance,
    "min_usage": min_usage,
    "decorrelation": decorrelation,
    "legacy_diversity": legacy_diversity,
    "legacy_balance": legacy_balance,
    "legacy_min_usage": legacy_min_usage,
    "legacy_correlation": legacy_correlation,
}


def weighted_routing(config: RoutingLossConfig) -> dict[str, tuple[float, Term]]:
    """The terms that have a weight, with it, under the names by which they are logged."""
    return {f"routing_{name}": (weight, TERMS[name]) for name, weight in config if weight}
