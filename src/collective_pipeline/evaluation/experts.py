"""What experts, members and gated layers are for: which classes they open for, what they know, what they are worth.

A network is looked into by its units. Of one with gated channels a unit is a layer, whose gates are its channels' and
open or shut. Of a mixture it is an expert with one gate, whose weights sum to one over the experts. Of a collective it
is a member, an expert or an analyst, without gates.

What a unit knows alone is, of an expert of a mixture, what the network says if every image is left to it; of a member,
whose features are no logits, what a linear probe reads in them (`members.probe_predictions`). A layer says nothing
alone.

Suffixes: S seeds, B images, G gates, K classes, N units.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypeGuard

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collective_pipeline.data.batches import Normalise
from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation.cost import open_shares
from collective_pipeline.evaluation.members import WithMembers, ablation_drops, member_outputs, probe_predictions
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.image_classifier import ImageClassifier
from collective_pipeline.models.mixture import Mixture, SoftmaxGate
from collective_pipeline.randomness import make_generator

BATCH_SIZE = 512
# What probes are fitted on: for the debug collective 2,000 images and 24 probes take about a second.
PROBE_IMAGES = 2000
MAX_SAMPLES = 10
NOTHING = -1  # in the place of a class that nothing was said of

UNIT_COLUMNS = (
    "model_type",
    "seed",
    "unit",
    "num_gates",
    "gate_pct",
    "information_bits",
    "accuracy",
    "accuracy_lost_without",
    "sub_model_classes",
)
CLASS_COLUMNS = ("model_type", "seed", "unit", "class", "gate_pct", "accuracy")
SEED_COLUMNS = ("model_type", "seed", "usage_entropy_bits", "accuracy", "oracle_accuracy")
SAMPLE_COLUMNS = (
    "model_type",
    "seed",
    "image",
    "class",
    "prediction",
    "unit",
    "gate_pct",
    "says",
    "confidence_pct",
)


@dataclass(frozen=True)
class ExpertAnalysis:
    """Four tables about units; all of them empty but for their columns where a network has none.

    Attributes:
        units: `UNIT_COLUMNS`, a row for each seed and unit: how far it opens (percent of its gates, or the mean weight
            of its one gate), the mutual information of gate and class (of a layer the mean over its channels), its
            accuracy alone, and the points of accuracy that are lost without it: without an expert the other gates
            are raised to sum to 1, of a member the mean output stands for the output; the classes that the sub-model
            told apart from which an expert was made, empty for others.
        classes: `CLASS_COLUMNS`, the first and the third of these for the images of each class.
        seeds: `SEED_COLUMNS`, for each seed: the entropy of a mixture's mean weights, at most log2 N; the accuracy; and
            how many images at least one unit alone gets right, which no way of choosing among them can exceed.
        samples: `SAMPLE_COLUMNS`, for one image of each of at most ten classes, of one seed: what the network says, and
            of each unit how far it opens, which class it says alone, and how probable that is to it.
    """

    units: pd.DataFrame
    classes: pd.DataFrame
    seeds: pd.DataFrame
    samples: pd.DataFrame

    @classmethod
    def of_rows(cls, units: Any = (), classes: Any = (), seeds: Any = (), samples: Any = ()) -> Self:
        """From dictionaries."""
        tables = zip(
            (units, classes, seeds, samples), (UNIT_COLUMNS, CLASS_COLUMNS, SEED_COLUMNS, SAMPLE_COLUMNS), strict=True
        )
        return cls(*(pd.DataFrame(list(rows), columns=list(columns)) for rows, columns in tables))

    @classmethod
    def join(cls, analyses: Sequence[Self]) -> Self:
        """Of several networks, one below the other."""
        # To pandas an empty table's columns are of no type, and would take that of the others away.
        found = [analysis for analysis in analyses if not analysis.units.empty] or analyses[:1]
        return cls(*(pd.concat([getattr(one, f.name) for one in found], ignore_index=True) for f in fields(cls)))

    def with_sub_models(self, model_type: str, classes: Mapping[str, str]) -> Self:
        """The same, told which classes the sub-models of this network's units told apart, by the units' names."""
        pairs = zip(self.units["model_type"], self.units["unit"], strict=True)
        told = [classes.get(unit, "") if arm == model_type else "" for arm, unit in pairs]
        return replace(self, units=self.units.assign(sub_model_classes=told))


def describe_experts(checkpoint: Checkpoint, *, train: Images, images: Images, device: torch.device) -> ExpertAnalysis:
    """What each unit does on `images`, and what the network would be without it.

    Seeds that diverged before they had good weights are left out.

    Args:
        checkpoint: What was trained.
        train: Images that it was trained on, for probes; at most `PROBE_IMAGES` of them are read.
        images: Others, with labels.
        device: Where to compute.
    """
    seen = _look_into(checkpoint, train, images, device)
    if seen is None:
        return ExpertAnalysis.of_rows()
    subject, findings = seen
    return ExpertAnalysis.of_rows(
        _unit_rows(subject, findings, _points_lost(subject, findings)),
        _class_rows(subject, findings),
        _seed_rows(subject, findings),
        _sample_rows(subject, findings),
    )


def describe_at_work(
    checkpoint: Checkpoint, *, train: Images, images: Images, device: torch.device
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`ExpertAnalysis.classes` and `.samples` alone, which costs less: nothing is left out in turn."""
    seen = _look_into(checkpoint, train, images, device)
    classes, samples = ((), ()) if seen is None else (_class_rows(*seen), _sample_rows(*seen))
    found = ExpertAnalysis.of_rows(classes=classes, samples=samples)
    return found.classes, found.samples


class GateReader:
    """How far each gated layer or expert of a network opens for an image, of one seed: for a look at single images.

    Args:
        checkpoint: What was trained.
        seed: One with good weights.
        device: Where to compute.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int, device: torch.device) -> None:
        self.normalise = Normalise(checkpoint.images, device)
        self.device = device
        self.model = checkpoint.of_seeds([seed]).build().to(device)

    @property
    def kind(self) -> Literal["layer", "expert"] | None:
        """What opens; None where nothing does, and nothing is to be read."""
        return "layer" if _is_gated(self.model) else "expert" if _is_mixture(self.model) else None

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> dict[str, float]:
        """By the units' names, the percent of its gates that a layer opens, or an expert's weight in percent.

        Args:
            image: uint8 `(C, H, W)`, of the shape that the network reads.
        """
        _, parts = self.model(self.normalise(image[None].to(self.device)).unsqueeze(0))
        gates_N = 100 * _gates_of(self.model, parts)[0, :, 0]
        return dict(zip(_name_units(self.model, len(gates_N)), gates_N.tolist(), strict=True))


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


@dataclass(frozen=True)
class _Subject:
    """A network with good weights, the images that it is shown, on its device, and those that it was trained on."""

    model: nn.Module
    arm: str
    seeds: tuple[int, ...]
    class_names: tuple[str, ...]
    normalise: Normalise
    train: Images
    images: Images

    @classmethod
    def of(cls, checkpoint: Checkpoint, train: Images, images: Images, device: torch.device) -> Self | None:
        """None if no seed has good weights."""
        good = [
            seed
            for seed in checkpoint.good_seeds
            if all(tensor.isfinite().all() for tensor in checkpoint.of_seeds([seed]).weights.values())
        ]
        if not good:
            return None
        return cls(
            checkpoint.of_seeds(good).build().to(device).requires_grad_(False),
            checkpoint.arm.model_type,
            tuple(good),
            checkpoint.images.class_names,
            Normalise(checkpoint.images, device),
            train,
            images.to(device),
        )

    @property
    def count_K(self) -> Tensor:
        """How many images there are of each class."""
        return torch.bincount(self.images.labels, minlength=len(self.class_names)).double()

    def show(self, images: Images) -> Tensor:
        """All of them as the network reads them, `(1, B, I)`."""
        return self.normalise(images.images).unsqueeze(0)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images, a few at a time, `(1, B, I)`, and their labels."""
        for rows in torch.arange(len(self.images), device=self.images.labels.device).split(BATCH_SIZE):
            chosen = self.images[rows]
            yield self.show(chosen), chosen.labels


@dataclass(frozen=True)
class _Findings:
    """What S seeds of a network with N units make of B images; NaN or `NOTHING` where there is no such thing.

    Attributes:
        units: Their names.
        num_gates: Of each unit.
        answers_SB: The class that the whole network says.
        gates_SNB: Which part of its gates the unit opens, or the weight of its one gate.
        information_SN: Between gate and class, in bits.
        said_SNB: The class that the unit says alone.
        confidence_SNB: How probable that class is to it.
    """

    units: tuple[str, ...]
    num_gates: tuple[int, ...]
    answers_SB: Tensor
    gates_SNB: Tensor
    information_SN: Tensor
    said_SNB: Tensor
    confidence_SNB: Tensor


def _look_into(
    checkpoint: Checkpoint, train: Images, images: Images, device: torch.device
) -> tuple[_Subject, _Findings] | None:
    """None where a network has no units, or no seed good weights."""
    subject = _Subject.of(checkpoint, train, images, device)
    if subject is None:
        return None
    model = subject.model
    if _is_gated(model):
        return subject, _observe_layers(model, subject)
    if _is_mixture(model):
        return subject, _observe_experts(model, subject)
    if isinstance(model, WithMembers):
        return subject, _observe_members(model, subject)
    return None


def _is_gated(model: nn.Module) -> TypeGuard[ImageClassifier]:
    return isinstance(model, ImageClassifier) and model.gating is not None


def _is_mixture(model: nn.Module) -> TypeGuard[Mixture]:
    return isinstance(model, Mixture) and isinstance(model.gate, SoftmaxGate)


def _gates_of(model: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
    """Which part of its gates each layer opens, or the weight of each expert, `(S, N, B)`."""
    shares_SBN = open_shares(parts["gates"], model.gated_channels) if _is_gated(model) else parts["gates"]
    return shares_SBN.transpose(1, 2)


def _name_units(model: nn.Module, number: int) -> tuple[str, ...]:
    return tuple(f"{'layer' if _is_gated(model) else 'expert'} {n}" for n in range(1, number + 1))


def _observe_layers(model: ImageClassifier, subject: _Subject) -> _Findings:
    answers, shares, sums = [], [], []
    for x, labels_B in subject.batches():
        logits_SBK, parts = model(x)
        answers.append(logits_SBK.argmax(dim=-1))
        shares.append(_gates_of(model, parts))
        sums.append(_sum_by_class((parts["gates"] > 0).double(), labels_B, len(subject.class_names)))
    information_SG = _gate_information(torch.stack(sums).sum(dim=0), subject.count_K)
    layers = information_SG.split(model.gated_channels, dim=1)
    gates_SNB = torch.cat(shares, dim=2)
    return _Findings(
        units=_name_units(model, len(layers)),
        num_gates=model.gated_channels,
        answers_SB=torch.cat(answers, dim=1),
        gates_SNB=gates_SNB,
        information_SN=torch.stack([of_layer_SC.mean(dim=1) for of_layer_SC in layers], dim=1),
        said_SNB=torch.full_like(gates_SNB, NOTHING, dtype=torch.int64),
        confidence_SNB=torch.full_like(gates_SNB, math.nan),
    )


def _observe_experts(model: Mixture, subject: _Subject) -> _Findings:
    answers, gates, alone, sums = [], [], [], []
    for x, labels_B in subject.batches():
        logits_SBK, parts = model(x)
        answers.append(logits_SBK.argmax(dim=-1))
        gates.append(_gates_of(model, parts))
        alone.append(model.expert_logits(x).softmax(dim=-1).max(dim=-1))
        sums.append(_sum_by_class(parts["gates"].double(), labels_B, len(subject.class_names)))
    gates_SNB = torch.cat(gates, dim=2)
    return _Findings(
        units=_name_units(model, gates_SNB.shape[1]),
        num_gates=(1,) * gates_SNB.shape[1],
        answers_SB=torch.cat(answers, dim=1),
        gates_SNB=gates_SNB,
        information_SN=_gate_information(torch.stack(sums).sum(dim=0), subject.count_K),
        said_SNB=torch.cat([highest.indices for highest in alone], dim=2),
        confidence_SNB=torch.cat([highest.values for highest in alone], dim=2),
    )


def _observe_members(model: WithMembers, subject: _Subject) -> _Findings:
    rows = torch.randperm(len(subject.train), generator=make_generator(0, "probes"))[:PROBE_IMAGES]
    known = subject.train[rows].to(subject.images.labels.device)
    logits_SBK, parts = member_outputs(model, subject.show(subject.images))
    _, known_parts = member_outputs(model, subject.show(known))
    probes = [probe_predictions(known_parts[name], known.labels, parts[name]) for name in parts]
    said_SNB = torch.cat([said for said, _ in probes], dim=1)
    confidence_SNB = torch.cat([confidence for _, confidence in probes], dim=1)
    return _Findings(
        units=tuple(
            f"{name.removesuffix('s')} {number}"
            for name, part in parts.items()
            for number in range(1, part.shape[1] + 1)
        ),
        num_gates=(0,) * said_SNB.shape[1],
        answers_SB=logits_SBK.argmax(dim=-1),
        gates_SNB=torch.full_like(confidence_SNB, math.nan),
        information_SN=torch.full_like(confidence_SNB[..., 0], math.nan),
        said_SNB=said_SNB,
        confidence_SNB=confidence_SNB,
    )


def _points_lost(subject: _Subject, findings: _Findings) -> Tensor:
    """Points of accuracy that are lost without each unit, `(S, N)`; NaN for layers."""
    model, labels_B = subject.model, subject.images.labels
    if isinstance(model, WithMembers):
        drops = ablation_drops(model, subject.show(subject.images), labels_B)
        return torch.cat(list(drops.values()), dim=1)
    if isinstance(model, Mixture):
        without_SNB = torch.cat([model.logits_without(x).argmax(dim=-1) for x, _ in subject.batches()], dim=2)
        return _percent(findings.answers_SB == labels_B).unsqueeze(1) - _percent(without_SNB == labels_B)
    return torch.full_like(findings.information_SN, math.nan)


def _sum_by_class(gates_SBG: Tensor, labels_B: Tensor, num_classes: int) -> Tensor:
    """Over the images of each class, `(S, K, G)`."""
    return torch.einsum("bk,sbg->skg", F.one_hot(labels_B, num_classes).to(gates_SBG.dtype), gates_SBG)


def _gate_information(open_SKG: Tensor, count_K: Tensor) -> Tensor:
    """Of gates and class, `(S, G)`, from sums of the gates over the images of each class; a weight is a part of one."""
    shut_SKG = count_K[:, None] - open_SKG
    return mutual_information(torch.stack([open_SKG, shut_SKG], dim=-1).permute(0, 2, 3, 1))


def _percent(is_so_B: Tensor) -> Tensor:
    """Of the last dimension."""
    return 100 * is_so_B.double().mean(dim=-1)


def _accuracy(said_SNB: Tensor, labels_B: Tensor) -> Tensor:
    """Of each unit alone in percent, `(S, N)`; NaN where it says nothing."""
    return _percent(said_SNB == labels_B).masked_fill((said_SNB == NOTHING).all(dim=-1), math.nan)


def _unit_rows(subject: _Subject, findings: _Findings, lost_SN: Tensor) -> Iterator[dict[str, Any]]:
    gate_SN = 100 * findings.gates_SNB.double().mean(dim=-1)
    accuracy_SN = _accuracy(findings.said_SNB, subject.images.labels)
    columns = torch.stack([gate_SN, findings.information_SN.double(), accuracy_SN, lost_SN.double()], dim=-1).tolist()
    for s, seed in enumerate(subject.seeds):
        for n, (unit, num_gates) in enumerate(zip(findings.units, findings.num_gates, strict=True)):
            about = (subject.arm, seed, unit, num_gates)
            yield dict(zip(UNIT_COLUMNS, (*about, *columns[s][n], ""), strict=True))


def _class_rows(subject: _Subject, findings: _Findings) -> Iterator[dict[str, Any]]:
    labels_B = subject.images.labels
    of_class = [labels_B == k for k in range(len(subject.class_names))]
    gate_KSN = torch.stack([100 * findings.gates_SNB[..., rows].double().mean(dim=-1) for rows in of_class])
    accuracy_KSN = torch.stack([_accuracy(findings.said_SNB[..., rows], labels_B[rows]) for rows in of_class])
    columns = torch.stack([gate_KSN, accuracy_KSN], dim=-1).tolist()
    for s, seed in enumerate(subject.seeds):
        for n, unit in enumerate(findings.units):
            for k, name in enumerate(subject.class_names):
                yield dict(zip(CLASS_COLUMNS, (subject.arm, seed, unit, name, *columns[k][s][n]), strict=True))


def _seed_rows(subject: _Subject, findings: _Findings) -> Iterator[dict[str, Any]]:
    labels_B = subject.images.labels
    weighs = isinstance(subject.model, Mixture)  # only then do the gates of an image sum to one
    speaks = not (findings.said_SNB == NOTHING).all()
    entropy_S = entropy(findings.gates_SNB.double().mean(dim=-1))
    oracle_S = _percent((findings.said_SNB == labels_B).any(dim=1))
    accuracy_S = _percent(findings.answers_SB == labels_B)
    for s, seed in enumerate(subject.seeds):
        yield {
            "model_type": subject.arm,
            "seed": seed,
            "usage_entropy_bits": entropy_S[s].item() if weighs else math.nan,
            "accuracy": accuracy_S[s].item(),
            "oracle_accuracy": oracle_S[s].item() if speaks else math.nan,
        }


def _sample_rows(subject: _Subject, findings: _Findings) -> Iterator[dict[str, Any]]:
    """Of the first seed, since a figure has room for one."""
    labels, names = subject.images.labels.tolist(), subject.class_names
    for row in _choose_samples(labels):
        answer = findings.answers_SB[0, row].item()
        for n, unit in enumerate(findings.units):
            said = int(findings.said_SNB[0, n, row])
            yield {
                "model_type": subject.arm,
                "seed": subject.seeds[0],
                "image": row,
                "class": names[labels[row]],
                "prediction": names[int(answer)],
                "unit": unit,
                "gate_pct": 100 * findings.gates_SNB[0, n, row].item(),
                "says": None if said == NOTHING else names[said],
                "confidence_pct": 100 * findings.confidence_SNB[0, n, row].item(),
            }


def _choose_samples(labels: Sequence[int]) -> list[int]:
    """A random image of each of at most `MAX_SAMPLES` random classes, the same ones for every network."""
    chosen: dict[int, int] = {}
    for row in torch.randperm(len(labels), generator=make_generator(0, "sample_predictions")).tolist():
        chosen.setdefault(labels[row], row)
    return [row for _, row in sorted(list(chosen.items())[:MAX_SAMPLES])]
