"""Loss terms: functions of `(logits, parts, labels)`, one value for each seed. An objective is a weighted sum.

Suffixes: S seeds, B batch, N members, E member features, K classes, G gates of all layers side by side, C gates of one.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.config import (
    Architecture,
    CollectiveConfig,
    DiversityConfig,
    ImageArchitecture,
    MixtureArchitecture,
)
from collective_pipeline.training.routing_losses import weighted_routing

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


def gate_l1(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """Mean over the batch of the sum of an image's gates `parts["gates"]`, `(S, B, G)`, whatever the batch's size."""
    return parts["gates"].abs().sum(dim=2).mean(dim=1)


def legacy_matrix1(channels: Sequence[int]) -> Term:
    """Sum over layers of the matrix norm max_c sum_b |g_bc|, what the original has for the entrywise one.

    It grows with the batch, and of each layer's `channels` only the most open one has a gradient.
    """

    def term(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
        sum_SG = parts["gates"].abs().sum(dim=1)
        return torch.stack([sum_SC.amax(dim=1) for sum_SC in sum_SG.split(list(channels), dim=1)]).sum(dim=0)

    return term


def embedding_cross_entropy(label_smoothing: float = 0.0) -> Term:
    """Mean cross-entropy of what the embedding alone says, `parts["embedding_logits"]`, `(S, B, K)`."""
    single = cross_entropy(label_smoothing)

    def term(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
        return single(parts["embedding_logits"], {}, labels_SB)

    return term


def open_gates(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> Tensor:
    """Percent of the gates of the batch's images that are not shut; only to be logged, it has no gradient."""
    return 100 * (parts["gates"] > 0).float().mean(dim=(1, 2))


def weighted_sum(terms: Mapping[str, tuple[float, Term]]) -> Objective:
    """The weighted sum of named terms, as `{"loss": sum, **terms}` so that each is logged.

    Terms of weight 0 are only logged; one at least has another.
    """
    weighed = {name: weight for name, (weight, _) in terms.items() if weight}

    def evaluate(logits_SBK: Tensor, parts: Parts, labels_SB: Tensor) -> dict[str, Tensor]:
        values = {name: term(logits_SBK, parts, labels_SB) for name, (_, term) in terms.items()}
        # Without those of weight 0: where one is infinite, 0 times it would be NaN.
        loss = torch.stack([weight * values[name] for name, weight in weighed.items()]).sum(dim=0)
        return {"loss": loss, **values}

    return evaluate


def make_objective(architecture: Architecture, label_smoothing: float, *, gates_learn: bool = True) -> Objective:
    """Cross-entropy, and what the architecture's configuration adds to it.

    For a collective the diversity terms; for a mixture those on its routing; for a network with gates on its channels
    their sparsity and the embedding's cross-entropy, which without `gates_learn` are only logged.
    """
    terms = {"cross_entropy": (1.0, cross_entropy(label_smoothing))}
    if isinstance(architecture, CollectiveConfig):
        terms |= weighted_diversity("experts", architecture.expert_diversity)
        terms |= weighted_diversity("analysts", architecture.analyst_diversity)
    if isinstance(architecture, ImageArchitecture) and architecture.gates is not None:
        gates, on = architecture.gates, float(gates_learn)
        sparsity = gate_l1 if gates.sparsity == "l1" else legacy_matrix1(architecture.gated_channels)
        terms |= {
            "gate_sparsity": (on * gates.lambda_val, sparsity),
            "embedding_cross_entropy": (on * gates.mu, embedding_cross_entropy(label_smoothing)),
            "open_gates": (0.0, open_gates),
        }
    if isinstance(architecture, MixtureArchitecture):
        terms |= weighted_routing(architecture.losses)
    return weighted_sum(terms)


def weighted_diversity(part: str, config: DiversityConfig) -> dict[str, tuple[float, Term]]:
    """The diversity term of these members with its weight, or nothing where the weight is 0."""
    return {f"{part}_diversity": (config.weight, diversity(part, config.temperature))} if config.weight else {}
