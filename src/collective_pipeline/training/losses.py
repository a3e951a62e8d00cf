"""Loss terms: functions of `(logits, parts, labels)`, one value for each seed. An objective is a weighted sum.

Suffixes: S seeds, B batch, N members, E member features, K classes. The gates of a mixture, g, are `(S, B, N)`; the
usage of an expert is the mean of its gates over the batch.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.config import Architecture, CollectiveConfig, DiversityConfig, MixtureArchitecture

Parts = Mapping[str, Tensor]
Term = Callable[[Tensor, Parts, Tensor], Tensor]
Objective = Callable[[Tensor, Parts, Tensor], dict[str, Tensor]]

LEAST_USAGE = 0.3  # of the usage that all experts would have if they were used alike: 0.1 for three, as the original
LEGACY_LEAST_GATE = 0.1
LEGACY_EPSILON = 1e-6


def cross_entropy(label_smoothing: float = 0.0) -> Term:
    """Mean cross-entropy of the logits."""

    def term(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
        loss_B = F.cross_entropy(
            logits_SBK.flatten(0, 1), labels_SB.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        return loss_B.view(labels_SB.shape).mean(dim=1)

    return term


def member_cross_entropy(part: str, label_smoothing: float = 0.0) -> Term:
    """Mean cross-entropy of each member's own logits, `parts[part]` of shape `(S, N, B, K)`."""
    single = cross_entropy(label_smoothing)

    def term(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
        member_SNBK = parts[part]
        labels_SNB = labels_SB.unsqueeze(1).expand(member_SNBK.shape[:3])
        return single(member_SNBK.flatten(1, 2), {}, labels_SNB.flatten(1, 2))

    return term


def diversity(part: str, temperature: float = 1.0) -> Term:
    """Mean over pairs of members of |mean over the batch of their cosine| / temperature.

    0 where all pairs are orthogonal or there is one member, 1 / temperature where all are identical.
    """

    def term(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
        m_SBNE = F.normalize(parts[part].float(), dim=-1).transpose(1, 2)
        cos_SNN = (m_SBNE @ m_SBNE.mT).mean(dim=1)
        num_members = cos_SNN.shape[-1]
        if num_members == 1:
            return cos_SNN.new_zeros(len(cos_SNN))
        i, j = torch.triu_indices(num_members, num_members, offset=1, device=cos_SNN.device)
        return cos_SNN[:, i, j].abs().mean(dim=1) / temperature

    return term


def reconstruction(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """Mean squared error between `parts["reconstruction"]` and `parts["original"]`, both `(S, N, B, E)`."""
    return (parts["reconstruction"] - parts["original"]).square().mean(dim=(1, 2, 3))


def gate_diversity(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """Mean over images of the sum over pairs j != k of g_j g_k: 0 where one expert has all the weight.

    As in the original's documents, but for the mean: a sum over images would weigh it by the batch size.
    """
    g_SBN = parts["gates"]
    return (g_SBN.sum(dim=-1).square() - g_SBN.square().sum(dim=-1)).mean(dim=1)


def gate_balance(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """Sum over experts of (1/N - usage)^2, as in the original's documents; the size of the batch does not scale it."""
    usage_SN = parts["gates"].mean(dim=1)
    return (1 / usage_SN.shape[-1] - usage_SN).square().sum(dim=-1)


def gate_min_usage(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """Sum over experts of what their usage lacks of 0.3/N. An image may still have all of its weight on one expert."""
    usage_SN = parts["gates"].mean(dim=1)
    return (LEAST_USAGE / usage_SN.shape[-1] - usage_SN).relu().sum(dim=-1)


def gate_decorrelation(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """Half the sum of the squared covariances of different experts' gates over the batch (Cogswell et al. 2016).

    An image's gates sum to 1, and so a row of covariances to 0: with two experts this shrinks their variance alone.
    """
    g_SBN = parts["gates"]
    centred_SBN = g_SBN - g_SBN.mean(dim=1, keepdim=True)
    covariance_SNN = centred_SBN.mT @ centred_SBN / g_SBN.shape[1]
    of_pairs = covariance_SNN.square().sum(dim=(1, 2))
    return (of_pairs - covariance_SNN.diagonal(dim1=1, dim2=2).square().sum(dim=1)) / 2


def legacy_gate_diversity(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """The original's code: mean entropy of an image's gates."""
    g_SBN = parts["gates"]
    return -(g_SBN * (g_SBN + LEGACY_EPSILON).log()).sum(dim=-1).mean(dim=1)


def legacy_gate_balance(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """The original's code: KL(uniform | softmax(u)) / N with u the sums of the gates over the batch.

    A softmax of sums: the larger the batch, the steeper.
    """
    log_shares_SN = parts["gates"].sum(dim=1).log_softmax(dim=-1)
    num_experts = log_shares_SN.shape[-1]
    return (-math.log(num_experts) - log_shares_SN.mean(dim=-1)) / num_experts


def legacy_gate_min_usage(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """The original's code: mean over images of what their smallest gate lacks of 0.1, whoever is used elsewhere."""
    return (LEGACY_LEAST_GATE - parts["gates"].amin(dim=-1)).relu().mean(dim=1)


def legacy_gate_correlation(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """The original's code: mean of the N x N matrix G^T G. Its sum is that of (sum_n g_n)^2: constant, B / N^2."""
    g_SBN = parts["gates"]
    return (g_SBN.mT @ g_SBN).mean(dim=(1, 2))


# By their names in `config.GateLossConfig`.
GATE_TERMS: dict[str, Term] = {
    "diversity": gate_diversity,
    "balance": gate_balance,
    "min_usage": gate_min_usage,
    "decorrelation": gate_decorrelation,
    "legacy_diversity": legacy_gate_diversity,
    "legacy_balance": legacy_gate_balance,
    "legacy_min_usage": legacy_gate_min_usage,
    "legacy_correlation": legacy_gate_correlation,
}


def weighted_sum(terms: Mapping[str, tuple[float, Term]]) -> Objective:
    """The weighted sum of named terms, as `{"loss": sum, **terms}` so that each is logged."""

    def evaluate(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> dict[str, Tensor]:
        values = {name: term(logits_SBK, parts, labels_SB) for name, (_, term) in terms.items()}
        loss = torch.stack([weight * values[name] for name, (weight, _) in terms.items()]).sum(dim=0)
        return {"loss": loss, **values}

    return evaluate


def make_objective(architecture: Architecture, label_smoothing: float) -> Objective:
    """Cross-entropy, and the terms that the configuration of a collective or a mixture weighs."""
    terms = {"cross_entropy": (1.0, cross_entropy(label_smoothing))}
    if isinstance(architecture, CollectiveConfig):
        terms |= weighted_diversity("experts", architecture.expert_diversity)
        terms |= weighted_diversity("analysts", architecture.analyst_diversity)
    if isinstance(architecture, MixtureArchitecture):
        terms |= {f"gate_{name}": (weight, GATE_TERMS[name]) for name, weight in architecture.losses if weight}
    return weighted_sum(terms)


def weighted_diversity(part: str, config: DiversityConfig) -> dict[str, tuple[float, Term]]:
    """The diversity term of these members with its weight, or nothing where the weight is 0."""
    return {f"{part}_diversity": (config.weight, diversity(part, config.temperature))} if config.weight else {}
