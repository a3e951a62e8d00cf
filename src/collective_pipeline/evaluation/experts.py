"""What gates do: how far they open for which classes, and what each expert of a mixture is worth.

Of a network with gated channels a unit is a layer, whose gates are its channels' and open or shut; of a mixture it is
an expert with one gate, whose weights sum to one over the experts.

Suffixes: S seeds, B images, G gates, K classes, L units, N experts.
"""

import math
from collections.abc import Callable, Iterator

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.data.batches import Normalise
from collective_pipeline.data.splits import Images
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.image_classifier import ImageClassifier
from collective_pipeline.models.mixture import Mixture

BATCH_SIZE = 512
UNIT_COLUMNS = (
    "model_type",
    "seed",
    "unit",
    "num_gates",
    "gate_pct",
    "information_bits",
    "accuracy",
    "accuracy_lost_without",
)
CLASS_COLUMNS = ("model_type", "seed", "unit", "class", "gate_pct", "accuracy")
MIXTURE_COLUMNS = ("model_type", "seed", "usage_entropy_bits", "accuracy", "oracle_accuracy")


def describe_gates(
    checkpoint: Checkpoint, images: Images, device: torch.device
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Three tables, empty but for their columns where the network has no gates.

    `UNIT_COLUMNS`, a row for each seed and unit: how far it opens (percent of its gates, or the mean weight), the
    mutual information between its gate and the class (for a layer the mean over its channels), and for an expert its
    accuracy when every image is left to it alone, and the points of accuracy that are lost when it is left out.
    `CLASS_COLUMNS`, the same for each class. `MIXTURE_COLUMNS`, for each seed: the entropy of the mean weights, at most
    log2 N, and how many images at least one expert alone gets right, which no routing can exceed.

    Args:
        checkpoint: What was trained.
        images: With labels.
        device: Where to compute.
    """
    model = checkpoint.build().to(device).requires_grad_(False)
    if isinstance(model, ImageClassifier) and model.gating is not None:
        return _describe_layers(model, checkpoint, images, device)
    if isinstance(model, Mixture):
        return _describe_experts(model, checkpoint, images, device)
    units, classes, mixtures = (pd.DataFrame(columns=list(n)) for n in (UNIT_COLUMNS, CLASS_COLUMNS, MIXTURE_COLUMNS))
    return units, classes, mixtures


def mutual_information(joint_AK: Tensor) -> Tensor:
    """In bits between the two last dimensions, `(...)`.

    Args:
        joint_AK: `(..., A, K)`: how often, or with how much weight in all, each pair was seen.
    """
    p_AK = joint_AK / joint_AK.sum(dim=(-2, -1), keepdim=True)
    rows, columns = p_AK.sum(dim=-1), p_AK.sum(dim=-2)
    information: Tensor = entropy(rows) + entropy(columns) - entropy(p_AK.flatten(-2))
    return information


def entropy(p_A: Tensor) -> Tensor:
    """In bits, over the last dimension."""
    bits: Tensor = torch.special.entr(p_A).sum(dim=-1) / math.log(2)
    return bits


def _describe_layers(
    model: ImageClassifier, checkpoint: Checkpoint, images: Images, device: torch.device
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    count_K, open_SKG = _sum_by_class(checkpoint, images, device, lambda x: (model(x)[1]["gates"] > 0).double())
    shut_SKG = count_K[:, None] - open_SKG
    joint_SGAK = torch.stack([open_SKG, shut_SKG], dim=-1).permute(0, 2, 3, 1)
    information_SG = mutual_information(joint_SGAK)
    share_SKG = 100 * open_SKG / count_K[:, None]
    units, classes = [], []
    layers = zip(
        information_SG.split(model.gated_channels, dim=1),
        share_SKG.split(model.gated_channels, dim=2),
        (100 * open_SKG.sum(dim=1) / count_K.sum()).split(model.gated_channels, dim=1),
        strict=True,
    )
    for layer, (information_SC, by_class_SKC, share_SC) in enumerate(layers, start=1):
        for s, seed in enumerate(checkpoint.seeds):
            about = {"model_type": checkpoint.arm.model_type, "seed": seed, "unit": f"layer {layer}"}
            units.append(
                about
                | {"num_gates": share_SC.shape[1], "gate_pct": share_SC[s].mean().item()}
                | {"information_bits": information_SC[s].mean().item()}
            )
            means = by_class_SKC[s].mean(dim=1).tolist()
            classes += [
                about | {"class": name, "gate_pct": mean}
                for name, mean in zip(checkpoint.images.class_names, means, strict=True)
            ]
    return (
        pd.DataFrame(units, columns=list(UNIT_COLUMNS)),
        pd.DataFrame(classes, columns=list(CLASS_COLUMNS)),
        pd.DataFrame(columns=list(MIXTURE_COLUMNS)),
    )


def _describe_experts(
    model: Mixture, checkpoint: Checkpoint, images: Images, device: torch.device
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    labels_B = images.labels.to(device)
    count_K, weight_SKN = _sum_by_class(checkpoint, images, device, lambda x: model(x)[1]["gates"].double())
    mean_SN = weight_SKN.sum(dim=1) / count_K.sum()
    right_SNB = _right(checkpoint, images, device, model.expert_logits)
    without_SN = 100 * _right(checkpoint, images, device, model.logits_without).double().mean(dim=2)
    accuracy_S = 100 * _right(checkpoint, images, device, lambda x: model(x)[0].unsqueeze(1)).double().mean(dim=(1, 2))
    information_SN = mutual_information(
        torch.stack([weight_SKN, count_K[:, None] - weight_SKN], dim=-1).permute(0, 2, 3, 1)
    )
    units, classes, mixtures = [], [], []
    for s, seed in enumerate(checkpoint.seeds):
        arm = {"model_type": checkpoint.arm.model_type, "seed": seed}
        mixtures.append(
            arm
            | {"usage_entropy_bits": entropy(mean_SN[s]).item(), "accuracy": accuracy_S[s].item()}
            | {"oracle_accuracy": 100 * right_SNB[s].any(dim=0).double().mean().item()}
        )
        for n in range(mean_SN.shape[1]):
            about = arm | {"unit": f"expert {n + 1}"}
            units.append(
                about
                | {"num_gates": 1, "gate_pct": 100 * mean_SN[s, n].item()}
                | {"information_bits": information_SN[s, n].item()}
                | {"accuracy": 100 * right_SNB[s, n].double().mean().item()}
                | {"accuracy_lost_without": (accuracy_S[s] - without_SN[s, n]).item()}
            )
            for k, name in enumerate(checkpoint.images.class_names):
                classes.append(
                    about
                    | {"class": name, "gate_pct": 100 * (weight_SKN[s, k, n] / count_K[k]).item()}
                    | {"accuracy": 100 * right_SNB[s, n, labels_B == k].double().mean().item()}
                )
    return (
        pd.DataFrame(units, columns=list(UNIT_COLUMNS)),
        pd.DataFrame(classes, columns=list(CLASS_COLUMNS)),
        pd.DataFrame(mixtures, columns=list(MIXTURE_COLUMNS)),
    )


def _sum_by_class(
    checkpoint: Checkpoint, images: Images, device: torch.device, gates_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """How many images there are of each class, `(K,)`, and the sums over them of their gates, `(S, K, G)`."""
    count_K = torch.bincount(images.labels, minlength=len(checkpoint.images.class_names)).double().to(device)
    sums: list[Tensor] = []
    for x, labels_B in _batches(checkpoint, images, device):
        gates_SBG = gates_of(x)
        is_class_BK = F.one_hot(labels_B, len(count_K)).double()
        sums.append(torch.einsum("bk,sbg->skg", is_class_BK, gates_SBG))
    return count_K, torch.stack(sums).sum(dim=0)


def _right(
    checkpoint: Checkpoint, images: Images, device: torch.device, logits_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Whether logits `(S, N, B, K)` name the class, for all images, `(S, N, B)`."""
    chunks = [logits_of(x).argmax(dim=-1) == labels_B for x, labels_B in _batches(checkpoint, images, device)]
    return torch.cat(chunks, dim=2)


def _batches(checkpoint: Checkpoint, images: Images, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    normalise = Normalise(checkpoint.images, device)
    chunks = zip(images.images.split(BATCH_SIZE), images.labels.split(BATCH_SIZE), strict=True)
    for pixels, labels in chunks:
        yield normalise(pixels.to(device)).unsqueeze(0), labels.to(device)
