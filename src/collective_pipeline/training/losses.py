"""Loss terms: functions of `(logits, parts, labels)`, one value for each seed. An objective is a weighted sum.

Suffixes: S seeds, B batch, N members, E member features, K classes.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.config import CollectiveConfig, DiversityConfig, MlpArchitecture

Parts = Mapping[str, Tensor]
Term = Callable[[Tensor, Parts, Tensor], Tensor]
Objective = Callable[[Tensor, Parts, Tensor], dict[str, Tensor]]


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


def weighted_sum(terms: Mapping[str, tuple[float, Term]]) -> Objective:
    """The weighted sum of named terms, as `{"loss": sum, **terms}` so that each is logged."""

    def evaluate(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> dict[str, Tensor]:
        values = {name: term(logits_SBK, parts, labels_SB) for name, (_, term) in terms.items()}
        loss = torch.stack([weight * values[name] for name, (weight, _) in terms.items()]).sum(dim=0)
        return {"loss": loss, **values}

    return evaluate


def make_objective(architecture: CollectiveConfig | MlpArchitecture, label_smoothing: float) -> Objective:
    """Cross-entropy, and for a collective the diversity terms that its configuration weighs."""
    terms = {"cross_entropy": (1.0, cross_entropy(label_smoothing))}
    if isinstance(architecture, CollectiveConfig):
        terms |= weighted_diversity("experts", architecture.expert_diversity)
        terms |= weighted_diversity("analysts", architecture.analyst_diversity)
    return weighted_sum(terms)


def weighted_diversity(part: str, config: DiversityConfig) -> dict[str, tuple[float, Term]]:
    """The diversity term of these members with its weight, or nothing where the weight is 0."""
    return {f"{part}_diversity": (config.weight, diversity(part, config.temperature))} if config.weight else {}
