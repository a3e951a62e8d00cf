"""Groups of classes, one for each sub-model of a mixture, and a data set of the grouped classes alone.

Suffixes: G groups, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from collective_pipeline.config import ClassGroupsConfig, DatasetName, UserError, suggest
from collective_pipeline.data.splits import Images, Splits, moments

# By what is hard to tell apart. CIFAR-100: the original's Task A, trees, flowers, and fruit and vegetables. ImageNet:
# its Task B, mammals, animals of Africa, and canids, where every two groups share a class.
GROUPS: dict[DatasetName, tuple[tuple[str, ...], ...]] = {
    "mnist": (("0", "2", "3", "6"), ("1", "4", "7"), ("5", "8", "9")),
    "fashion_mnist": (
        ("T-shirt/top", "Pullover", "Coat", "Shirt"),
        ("Trouser", "Dress", "Bag"),
        ("Sandal", "Sneaker", "Ankle boot"),
    ),
    "cifar10": (("airplane", "automobile", "ship", "truck"), ("cat", "dog", "frog"), ("bird", "deer", "horse")),
    "cifar100": (
        ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
        ("orchid", "poppy", "rose", "sunflower", "tulip"),
        ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    ),
    "imagenet64": (
        ("Chihuahua", "baboon", "hyena", "Arctic_fox", "lynx"),
        ("hyena", "African_hunting_dog", "zebra", "patas", "African_elephant"),
        ("Chihuahua", "African_hunting_dog", "boxer", "collie", "golden_retriever"),
    ),
}


@dataclass(frozen=True)
class ClassGroups:
    """Which classes of a data set are told apart, and which group knows which.

    Attributes:
        labels: The classes' labels in the whole data set, ascending; their places here are their new labels.
        groups: The new labels of each group, ascending. A class may be in several.
    """

    labels: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @cached_property
    def membership_GK(self) -> Tensor:
        """Whether a group has a class, `(G, K)`."""
        return torch.tensor([[label in group for label in range(len(self.labels))] for group in self.groups])


def resolve_groups(config: ClassGroupsConfig, splits: Splits) -> ClassGroups:
    """The configured groups, or the data set's own, with every name and number looked up.

    Raises:
        UserError: If a group names an unknown class or has only one, or if a class is in none of them and the
            configuration does not leave such classes out.
    """
    names = splits.class_names
    configured = config.groups
    if configured is None and splits.name not in GROUPS:
        raise UserError(f"{splits.name} has no groups of its own: give merged_moe.class_groups.groups")
    if configured is None and (unknown := {name for group in GROUPS[splits.name] for name in group} - {*names}):
        raise UserError(
            f"{splits.name} has no class {sorted(unknown)[0]} here: give merged_moe.class_groups.groups of your own"
        )
    groups = [
        sorted({_label(name, names, splits.name, number) for name in group})
        for number, group in enumerate(configured or GROUPS[splits.name], start=1)
    ]
    for number, group in enumerate(groups, start=1):
        if len(group) == 1:
            raise UserError(
                f"merged_moe.class_groups.groups: group {number} has the one class '{names[group[0]]}', and a "
                "sub-model needs two to tell apart: add classes to it, which may be in other groups as well"
            )
    labels = sorted({label for group in groups for label in group})
    absent = [name for label, name in enumerate(names) if label not in labels]
    if absent and configured is not None and not config.leave_out_others:
        raise UserError(
            f"merged_moe.class_groups.groups: no group has {', '.join(absent)}: add them to a group, or leave those "
            "classes out of the data set with merged_moe.class_groups.leave_out_others=true"
        )
    return ClassGroups(tuple(labels), tuple(tuple(map(labels.index, group)) for group in groups))


def restrict(splits: Splits, labels: Sequence[int], *, remeasure: bool) -> Splits:
    """The images of these classes alone; the class `labels[i]` has label i from then on.

    Args:
        splits: Of more classes.
        labels: Of the classes to keep.
        remeasure: Whether mean and standard deviation become those of the training images that are left. For the groups
            of one mixture they must stay the same: its sub-models are merged, and have to read pixels alike.
    """
    train, val, test = (_restrict(part, labels) for part in (splits.train, splits.val, splits.test))
    mean, std = moments(train.images) if remeasure else (splits.mean, splits.std)
    names = tuple(splits.class_names[label] for label in labels)
    return Splits(splits.name, train, val, test, names, mean, std)


def _restrict(images: Images, labels: Sequence[int]) -> Images:
    chosen = torch.tensor(labels, device=images.labels.device)
    matches_nK = images.labels[:, None] == chosen
    kept = matches_nK.any(dim=1)
    return Images(images.images[kept], matches_nK[kept].long().argmax(dim=1))


def _label(name: str | int, names: Sequence[str], dataset: DatasetName, number: int) -> int:
    """The label of a class that is given by its name, or by that label."""
    if isinstance(name, int):
        if not 0 <= name < len(names):
            raise UserError(
                f"merged_moe.class_groups.groups: group {number} has class {name}: those of {dataset} are 0 to "
                f"{len(names) - 1}"
            )
        return name
    if name not in names:
        raise UserError(
            f"merged_moe.class_groups.groups: group {number} has '{name}', which is no class of "
            f"{dataset}{suggest(name, names)}"
        )
    return names.index(name)
