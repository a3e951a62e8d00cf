"""The training part is divided by class, by the seed alone, and described by its own pixels."""

import pytest
import torch

from collective_pipeline.config import UserError
from collective_pipeline.data.splits import Images, RawImages, Splits, make_splits


def images_of(counts: list[int], *, channels: int = 1) -> Images:
    """Random images whose classes have these counts, in a mixed order; the first pixel numbers the image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 256, (len(labels), channels, 4, 5), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, 0] = torch.arange(len(labels)) % 256
    return Images(images, labels)


def raw_of(counts: list[int], *, channels: int = 1) -> RawImages:
    names = tuple(f"c{label}" for label in range(len(counts)))
    return RawImages("mnist", images_of(counts, channels=channels), images_of(counts, channels=channels), names)


def splits_of(counts: list[int], *, val_fraction: float = 0.1, split_seed: int = 42, channels: int = 1) -> Splits:
    return make_splits(raw_of(counts, channels=channels), val_fraction=val_fraction, split_seed=split_seed)


def numbers(part: Images) -> list[int]:
    return part.images[:, 0, 0, 0].tolist()


def test_a_tenth_of_every_class_is_validation() -> None:
    splits = splits_of([100, 50, 20])

    assert torch.bincount(splits.val.labels).tolist() == [10, 5, 2]
    assert torch.bincount(splits.train.labels).tolist() == [90, 45, 18]


@pytest.mark.parametrize("val_fraction", [0.1, 0.15, 0.29, 1 / 3, 0.5])
@pytest.mark.parametrize("counts", [[17, 17, 17], [11, 23, 40, 9], [26, 25, 24]])
def test_the_total_is_exact_and_no_class_is_off_by_one_image(counts: list[int], val_fraction: float) -> None:
    val_counts = torch.bincount(splits_of(counts, val_fraction=val_fraction).val.labels).tolist()

    assert sum(val_counts) == round(sum(counts) * val_fraction)
    assert all(abs(val - count * val_fraction) < 1 for val, count in zip(val_counts, counts, strict=True))


def test_every_image_is_in_one_part_with_its_label() -> None:
    raw = raw_of([100, 100])
    splits = make_splits(raw, val_fraction=0.1, split_seed=42)
    label_of = dict(zip(numbers(raw.train), raw.train.labels.tolist(), strict=True))

    assert sorted(numbers(splits.train) + numbers(splits.val)) == list(range(200))
    for part in (splits.train, splits.val):
        assert [label_of[number] for number in numbers(part)] == part.labels.tolist()
    assert splits.test is raw.test


def test_the_seed_alone_decides() -> None:
    first = numbers(splits_of([60, 60], split_seed=1).val)
    torch.manual_seed(123)

    assert numbers(splits_of([60, 60], split_seed=1).val) == first
    assert numbers(splits_of([60, 60], split_seed=2).val) != first


@pytest.mark.parametrize(("counts", "val_fraction"), [([200, 1], 0.1), ([200, 1], 0.9), ([200, 0], 0.1)])
def test_a_class_without_a_part_is_named(counts: list[int], val_fraction: float) -> None:
    with pytest.raises(
        UserError, match=r"class 'c1' of mnist has (1 training image|. training images), .*choose another val_fraction"
    ):
        splits_of(counts, val_fraction=val_fraction)


def test_mean_and_std_are_those_of_the_training_pixels() -> None:
    splits = splits_of([40, 40], channels=3)
    pixels = splits.train.images.double() / 255

    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert splits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_validation_and_test_pixels_do_not_reach_mean_and_std() -> None:
    raw = raw_of([40, 40])
    before = make_splits(raw, val_fraction=0.1, split_seed=42)
    held_out = torch.isin(raw.train.images[:, 0, 0, 0], before.val.images[:, 0, 0, 0])
    raw.train.images[held_out] = 255
    raw.test.images.fill_(255)
    after = make_splits(raw, val_fraction=0.1, split_seed=42)

    assert (after.mean, after.std) == (before.mean, before.std)


def test_blank_images_are_refused() -> None:
    blank = Images(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 2)

    with pytest.raises(UserError, match="all training pixels of channel 0 of mnist are alike"):
        make_splits(RawImages("mnist", blank, blank, ("a", "b")), val_fraction=0.1, split_seed=42)


def test_shape_and_classes_are_read_off() -> None:
    splits = splits_of([20, 20], channels=3)

    assert (splits.image_shape, splits.in_dim, splits.num_classes) == ((3, 4, 5), 60, 2)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (36, 4, 40)


def test_to_moves_all_parts() -> None:
    moved = splits_of([20, 20]).to("meta")

    for part in (moved.train, moved.val, moved.test):
        assert part.images.is_meta
        assert part.labels.is_meta
