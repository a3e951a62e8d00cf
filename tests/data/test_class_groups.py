"""Groups of classes are looked up, checked in one sentence, and cut out of a data set."""

import pytest
import torch
from pydantic import ValidationError

from collective_pipeline.config import ClassGroupsConfig, UserError
from collective_pipeline.data.class_groups import GROUPS, resolve_groups, restrict
from collective_pipeline.data.splits import Images, Splits, moments

# As CIFAR-100 numbers them.
TASK_A = (47, 52, 56, 59, 96, 54, 62, 70, 82, 92, 0, 51, 53, 57, 83)


def make_splits_of(*names, dataset="cifar10", num=4):
    """`num` images of each class in every part, as bright as their label."""
    labels = torch.arange(len(names)).repeat(num)
    images = Images(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous(), labels)
    return Splits(dataset, images, images, images, names, *moments(images.images))


@pytest.fixture
def splits():
    return make_splits_of("ant", "bee", "cat", "dog", "elk")


def groups_of(splits, *groups, leave_out_others=False):
    return resolve_groups(ClassGroupsConfig(groups=groups, leave_out_others=leave_out_others), splits)


def test_names_and_labels_are_the_same_and_shared_or_repeated_classes_count_once(splits):
    groups = groups_of(splits, ["bee", 0, "ant", "cat"], ["elk", "cat", 3])

    assert groups.labels == (0, 1, 2, 3, 4)
    assert groups.groups == ((0, 1, 2), (2, 3, 4))
    assert groups.membership_GK.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ([["ant", "bee"], ["cat", "dg"]], "group 2 has 'dg', which is no class of cifar10: did you mean 'dog'?"),
        ([["ant", 5], ["cat", "dog"]], "group 1 has class 5: those of cifar10 are 0 to 4"),
        ([["ant", "bee", "cat"], ["dog", 3]], "group 2 has the one class 'dog'"),
        ([["ant", "bee"], ["cat", "bee"]], "no group has dog, elk: add them to a group"),
    ],
)
def test_groups_that_do_not_fit_are_one_sentence(splits, groups, problem):
    with pytest.raises(UserError) as caught:
        groups_of(splits, *groups)

    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "problem"), [([["ant", "bee"]], "one group makes no mixture"), ([["ant"], []], "group 2 is empty")]
)
def test_groups_that_fit_no_data_set_are_refused_at_once(groups, problem):
    with pytest.raises(ValidationError, match=problem):
        ClassGroupsConfig(groups=groups)


def test_the_groups_of_cifar10_share_its_classes_among_them():
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    groups = resolve_groups(ClassGroupsConfig(), make_splits_of(*names))

    assert groups.membership_GK.sum(dim=0).tolist() == [1] * 10


def test_task_a_is_cut_out_of_cifar100_without_being_asked():
    """Its classes are in the order of their labels in CIFAR-100."""
    names = [f"class {label}" for label in range(100)]
    for label, name in zip(TASK_A, (name for group in GROUPS["cifar100"] for name in group), strict=True):
        names[label] = name
    groups = resolve_groups(ClassGroupsConfig(), make_splits_of(*names, dataset="cifar100", num=1))

    assert groups.labels == tuple(sorted(TASK_A))
    assert [tuple(groups.labels[new] for new in group) for group in groups.groups] == [
        tuple(sorted(TASK_A[start : start + 5])) for start in (0, 5, 10)
    ]


def test_default_groups_that_are_not_there_are_one_sentence(splits):
    with pytest.raises(UserError, match="cifar10 has no class airplane here"):
        resolve_groups(ClassGroupsConfig(), splits)
    with pytest.raises(UserError, match="tiny_imagenet has no groups of its own"):
        resolve_groups(ClassGroupsConfig(), make_splits_of("ant", "bee", dataset="tiny_imagenet"))


def test_classes_of_no_group_can_be_left_out(splits):
    groups = groups_of(splits, ["elk", "bee"], ["cat", "bee"], leave_out_others=True)
    left = restrict(splits, groups.labels, remeasure=True)

    assert groups.groups == ((0, 2), (0, 1))
    assert left.class_names == ("bee", "cat", "elk")
    assert left.test.labels.tolist() == [0, 1, 2] * 4
    assert left.test.images[:, 0, 0, 0].tolist() == [1, 2, 4] * 4
    assert left.mean == pytest.approx([7 / 3 / 255] * 3)


def test_a_restriction_to_all_classes_changes_nothing(splits):
    assert restrict(splits, range(5), remeasure=True).digest == splits.digest


def test_groups_of_one_mixture_keep_its_mean(splits):
    assert restrict(splits, [3, 4], remeasure=False).mean == splits.mean
