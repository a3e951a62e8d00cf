"""A mixture's first weights from sub-models that were trained each on a group of classes.

Suffixes as in `mixture`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from collective_pipeline.config import ImageSpec, MixtureArchitecture, SubModelArchitecture, UserError
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.layers import Linear
from collective_pipeline.models.mixture import LogitHead, Mixture

# What the original adds to an expert's logits at first: it knows its own classes, and should not decide on others.
OWN_BIAS, OTHER_BIAS = 2.0, -3.0
OTHER_STD = 0.01  # of the weights of other classes' logits


def check_submodels(
    submodels: Sequence[Checkpoint],
    architecture: MixtureArchitecture,
    *,
    groups: Sequence[Sequence[int]],
    images: ImageSpec,
    seeds: Sequence[int],
) -> None:
    """Refuse sub-models that cannot be merged into this mixture.

    Args:
        submodels: One for each group, in their order.
        architecture: Of the mixture.
        groups: The labels of each group.
        images: What the mixture reads and tells apart.
        seeds: Of the mixture; each needs a sub-model of its own.

    Raises:
        UserError: Naming the group and what does not fit.
    """
    if len(submodels) != len(groups):
        raise UserError(f"{len(groups)} groups of classes need as many sub-models, and there are {len(submodels)}")
    if architecture.initialise == "copy" and architecture.copy_of > len(submodels):
        raise UserError(f"copy_of={architecture.copy_of} is no group: choose from 1 to {len(submodels)}")
    for number, (submodel, group) in enumerate(zip(submodels, groups, strict=True), start=1):
        found = submodel.arm.architecture
        if not isinstance(found, SubModelArchitecture):
            raise _unfit(number, f"is a network of kind {found.kind}")
        names = tuple(images.class_names[label] for label in group)
        for what, there, here in (
            ("channels", found.channels, architecture.channels),
            ("images of shape", submodel.images.shape, images.shape),
            ("classes", submodel.images.class_names, names),
            ("images with mean", submodel.images.mean, images.mean),
            ("images with standard deviation", submodel.images.std, images.std),
        ):
            if there != here:
                raise _unfit(number, f"has {what} {_told(there)} where the mixture has {_told(here)}")
        if missing := [seed for seed in seeds if seed not in submodel.seeds]:
            raise _unfit(number, f"lacks the seeds {_told(missing)}")
        trained = dict(zip(submodel.seeds, submodel.best_epochs, strict=True))
        if diverged := [seed for seed in seeds if not trained[seed]]:
            raise _unfit(number, f"diverged with the seeds {_told(diverged)}, before its first good epoch")


def _unfit(number: int, problem: str) -> UserError:
    return UserError(f"the sub-model of group {number} {problem}: train the sub-models again with these parameters")


def _told(values: Sequence[object]) -> str:
    return ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)


@torch.no_grad()
def merge(
    model: Mixture,
    submodels: Sequence[Checkpoint],
    architecture: MixtureArchitecture,
    *,
    groups: Sequence[Sequence[int]],
    seeds: Sequence[int],
) -> None:
    """Give a mixture whose weights are drawn those of its sub-models, seed by seed; they passed `check_submodels`.

    The extractor becomes their mean, statistics of norms included, or one of them. Expert n becomes that of sub-model
    n; experts beyond the sub-models stay as drawn. Where logits are mixed, an expert's own classes are copied as well,
    and it starts reluctant to name others. `fresh` changes nothing.
    """
    if architecture.initialise == "fresh":
        return
    states = [submodel.of_seeds(seeds).weights for submodel in submodels]
    sources = [states[architecture.copy_of - 1]] if architecture.initialise == "copy" else states
    for name, tensor in model.extractor.state_dict().items():
        tensor.copy_(torch.stack([state[f"extractor.{name}"] for state in sources]).mean(dim=0))
    for name, tensor in model.experts.state_dict().items():
        for n, state in enumerate(states[: architecture.n_experts]):
            tensor[:, n] = state[f"experts.{name}"][:, 0]
    if isinstance(model.head, LogitHead):
        for n, (state, group) in enumerate(zip(states[: architecture.n_experts], groups, strict=False)):
            _copy_classifier(model.head.classifiers, n, state, list(group))


def _copy_classifier(classifiers: Linear, n: int, state: dict[str, Tensor], group: list[int]) -> None:
    weight_SFK, bias_S1K = classifiers.weight[:, n], classifiers.bias[:, n]
    drawn_std = math.sqrt(2 / weight_SFK.shape[1])
    weight_SFK *= OTHER_STD / drawn_std
    bias_S1K += OTHER_BIAS
    weight_SFK[..., group] = state["classifier.weight"][:, 0]
    bias_S1K[..., group] = state["classifier.bias"][:, 0] + OWN_BIAS
