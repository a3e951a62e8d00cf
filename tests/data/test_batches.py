"""Every seed sees the training images in its own order, whoever trains beside it."""

from dataclasses import replace

import pytest
import torch

from collective_pipeline.config import DATASETS, ImageSpec, Stage, UserError
from collective_pipeline.data.augment import mix
from collective_pipeline.data.batches import Batches, MixedLabels, Normalise, resize
from collective_pipeline.data.splits import Images, RawImages, make_splits

NUM_CLASSES, PER_CLASS = 4, 25
BATCH_SIZE = 16


def splits_of(name="fashion_mnist", channels=1, side=8):
    """90 training and 10 validation images of one data set; channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(0)

    def part():
        labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
        images = torch.randint(0, 128, (len(labels), channels, side, side), generator=generator)
        images = images // torch.arange(1, channels + 1).view(-1, 1, 1) + 20
        return Images(images.to(torch.uint8), labels)

    raw = RawImages(name, part(), part(), tuple("abcd"))
    return make_splits(raw, val_fraction=0.1, split_seed=42)


@pytest.fixture
def splits():
    """A small Fashion-MNIST."""
    return splits_of()


@pytest.fixture
def numbered(splits):
    """The same, every training image labelled by its own number."""
    train = replace(splits.train, labels=torch.arange(len(splits.train)))
    return replace(splits, train=train)


def batches_of(splits, seeds, *, strength=0.0, cutout=0, batch_size=BATCH_SIZE):
    """Batches, without augmentation unless asked for."""
    return Batches(splits, seeds, batch_size=batch_size, augmentation_strength=strength, cutout=cutout)


def epoch_of(batches, number=1):
    """All of one epoch, `(S, n, I)` and `(S, n)`."""
    xs, ys = zip(*batches.epoch(number), strict=True)
    return torch.cat(xs, dim=1), torch.cat(ys, dim=1)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_shapes(splits, strength):
    """Flattened images and labels for every seed, as many steps as announced."""
    batches = batches_of(splits, [1, 2, 3], strength=strength)
    steps = list(batches.epoch(1))

    assert len(steps) == len(batches) == 90 // BATCH_SIZE
    for x, y in steps:
        assert x.shape == (3, BATCH_SIZE, 64)
        assert x.dtype == torch.float32
        assert y.shape == (3, BATCH_SIZE)
        assert y.dtype == torch.int64


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_same_seed_sees_the_same(splits, strength):
    """Two arms with one seed are given the same images in the same order, epoch after epoch."""
    first, second = batches_of(splits, [7], strength=strength), batches_of(splits, [7], strength=strength)
    for number in (1, 2, 3):
        torch.testing.assert_close(epoch_of(first, number), epoch_of(second, number), rtol=0, atol=0)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_epochs_do_not_depend_on_each_other(splits, strength):
    """Whichever came before, if any: a run can go on from every epoch, or go back to one."""
    in_turn, astray = batches_of(splits, [7, 8], strength=strength), batches_of(splits, [7, 8], strength=strength)
    expected = {number: epoch_of(in_turn, number) for number in (1, 2, 3)}
    for number in (3, 1, 1, 2, 3):
        torch.testing.assert_close(epoch_of(astray, number), expected[number], rtol=0, atol=0)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_every_step_can_be_taken_by_itself(splits, strength):
    """In any order, more than once, and after an epoch that was left halfway."""
    expected = [list(batches_of(splits, [7, 8], strength=strength).epoch(number)) for number in (1, 2)]
    batches = batches_of(splits, [7, 8], strength=strength)
    for number, steps in [(1, (2, 0)), (2, (3, 1, 4, 1)), (1, (1, 2))]:
        batches.begin(number)
        for step in steps:
            batch = batches.take(torch.tensor([step]))
            torch.testing.assert_close(batch, expected[number - 1][step], rtol=0, atol=0)


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("prepared", [[2], [2, 2], [3], [1], [2, 3], [3, 2]])
def test_preparing_changes_nothing(splits, prepared, strength):
    """Neither the epoch that has begun nor the next one, whichever was prepared, and how often."""
    expected = [list(batches_of(splits, [7, 8], strength=strength).epoch(number)) for number in (1, 2)]
    batches = batches_of(splits, [7, 8], strength=strength)
    for number, steps in enumerate(expected, start=1):
        batches.begin(number)
        for other in prepared:
            batches.prepare(other)
        for step, batch in enumerate(steps):
            torch.testing.assert_close(batches.take(torch.tensor([step])), batch, rtol=0, atol=0)


def test_different_seeds_see_different_orders(numbered):
    """Within one training as between two."""
    _, y = epoch_of(batches_of(numbered, [7, 8]))

    assert not torch.equal(y[0], y[1])
    assert not torch.equal(epoch_of(batches_of(numbered, [9]))[1][0], y[0])


def test_different_seeds_see_different_augmentation():
    """Also where they draw the same image."""
    splits = splits_of()
    one = replace(splits, train=splits.train[torch.zeros(90, dtype=torch.int64)])
    x, _ = epoch_of(batches_of(one, [7, 8], strength=1.0))

    assert not torch.allclose(x[0], x[1])


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [[7, 8], [8, 7], [1, 2, 7, 3]])
def test_a_seed_does_not_depend_on_its_neighbours(splits, seeds, strength):
    """Whoever trains beside it, in whichever place."""
    alone, among = batches_of(splits, [7], strength=strength), batches_of(splits, seeds, strength=strength)
    place = seeds.index(7)
    for number in (1, 2):
        (x, y), (x_among, y_among) = epoch_of(alone, number), epoch_of(among, number)

        torch.testing.assert_close(x_among[place], x[0])
        assert torch.equal(y_among[place], y[0])


@pytest.mark.parametrize("batch_size", [2, 16, 45, 46, 90])
def test_an_epoch_visits_every_image_at_most_once(numbered, batch_size):
    """Fewer than a batch of them are left out."""
    _, y = epoch_of(batches_of(numbered, [7, 8], batch_size=batch_size))

    for seen in y:
        assert len(seen.unique()) == len(seen)
        assert len(numbered.train) - len(seen) < batch_size


def test_the_next_epoch_has_another_order(numbered):
    """And leaves out other images, so that none is left out for good."""
    batches = batches_of(numbered, [7])
    epochs = [epoch_of(batches, number)[1][0] for number in range(1, 7)]

    assert not any(torch.equal(epoch, epochs[0]) for epoch in epochs[1:])
    assert len(torch.cat(epochs).unique()) == len(numbered.train)


def test_the_next_epoch_is_augmented_otherwise():
    """Fresh draws every time, for the same images."""
    splits = splits_of()
    one = replace(splits, train=splits.train[torch.zeros(90, dtype=torch.int64)])
    batches = batches_of(one, [7], strength=1.0)

    assert not torch.allclose(epoch_of(batches, 1)[0], epoch_of(batches, 2)[0])


def test_validation_images_are_never_in_a_batch(splits):
    """What chooses the weights was not trained on."""
    x, _ = epoch_of(batches_of(splits, [7], batch_size=2))
    held_out = {tuple(row) for row in Normalise(splits, torch.device("cpu"))(splits.val.images).tolist()}

    assert len(held_out) == len(splits.val)
    assert held_out.isdisjoint(map(tuple, x[0].tolist()))


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_images_keep_their_labels(numbered, strength):
    """A label stands beside its own image: unaugmented exactly that image, moved a little still most like it."""
    digits = replace(numbered, name="mnist")  # never mirrored
    x, y = epoch_of(batches_of(digits, [7, 8], strength=strength))
    originals = Normalise(digits, torch.device("cpu"))(digits.train.images)

    assert strength or torch.equal(x, originals[y])
    assert torch.equal(torch.cdist(x.flatten(0, 1), originals).argmin(dim=1), y.flatten())


@pytest.mark.parametrize("name", DATASETS)
def test_augmentation_changes_images_and_not_labels(name):
    """Same order, same labels, other pixels, whatever the data set."""
    splits = splits_of(name, channels=1 if "mnist" in name else 3)
    x, y = epoch_of(batches_of(splits, [7], strength=1.0))
    x_plain, y_plain = epoch_of(batches_of(splits, [7]))

    assert torch.equal(y, y_plain)
    assert (x != x_plain).any(dim=-1).float().mean().item() > 0.9
    assert x.isfinite().all()


def test_strength_0_is_none(splits):
    """The images as they are, and as small a strength as there is comes close to it."""
    (x, y), (x_almost, y_almost) = (epoch_of(batches_of(splits, [7], strength=s)) for s in (0.0, 1e-7))
    as_they_are = {tuple(row) for row in Normalise(splits, torch.device("cpu"))(splits.train.images).tolist()}

    assert as_they_are.issuperset(map(tuple, x[0].tolist()))
    assert torch.equal(y_almost, y)
    torch.testing.assert_close(x_almost, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_training_images_are_normalised(channels):
    """Mean 0 and standard deviation 1 in every channel of the training part."""
    splits = splits_of("cifar10" if channels == 3 else "mnist", channels=channels)
    x = Normalise(splits, torch.device("cpu"))(splits.train.images).unflatten(1, splits.image_shape)

    assert x.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0] * channels, abs=1e-5)
    assert x.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1] * channels, abs=1e-5)


def test_other_parts_are_normalised_like_the_training_part(splits):
    """By the training part's numbers, not by their own."""
    x = Normalise(splits, torch.device("cpu"))(splits.test.images)

    torch.testing.assert_close(
        x, ((splits.test.images.double() / 255 - splits.mean[0]) / splits.std[0]).flatten(1).float()
    )


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_images_themselves_stay_as_they_are(splits, strength):
    """Normalising overwrites copies only."""
    before = splits.train.images.clone()
    epoch_of(batches_of(splits, [7], strength=strength))

    assert torch.equal(splits.train.images, before)


def test_a_batch_larger_than_the_training_part_is_refused(splits):
    """Otherwise an epoch would have no step at all."""
    with pytest.raises(UserError, match=r"batch_size=91 is more than the 90 training images"):
        batches_of(splits, [7], batch_size=91)

    assert len(batches_of(splits, [7], batch_size=90)) == 1


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_cutout_is_the_seeds_own_and_leaves_the_rest_as_it_was(splits, strength):
    """Beside another seed the same; where no square is, the image is the one without cutout, and its mean is 0."""
    plain, _ = epoch_of(batches_of(splits, [1], strength=1.0))
    alone, _ = epoch_of(batches_of(splits, [1], strength=strength, cutout=3))
    beside, _ = epoch_of(batches_of(splits, [7, 1], strength=strength, cutout=3))

    assert torch.equal(alone[0], beside[1])
    assert ((alone == 0).sum(dim=-1) >= 4).all() and plain.shape == alone.shape


MIXING = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}


def mixed_of(splits, seeds, *, strength=0.0, **changes):
    return Batches(splits, seeds, batch_size=BATCH_SIZE, augmentation_strength=strength, **MIXING | changes)


@pytest.mark.parametrize("image_size", [None, 12])
def test_mixed_batches_are_those_without_mixing_mixed_afterwards(splits, image_size):
    """The same order, images and labels; every seed's share is told, and every step of an epoch has its own."""
    plain, mixed = (
        Batches(splits, [7, 8], batch_size=BATCH_SIZE, augmentation_strength=1.0, image_size=image_size, **changes)
        for changes in ({}, MIXING)
    )
    shares = []
    for step, ((x, y), (x_mixed, labels)) in enumerate(zip(plain.epoch(1), mixed.epoch(1), strict=True)):
        expected = mix(x.unflatten(-1, plain.seen_shape), y, mixed.mixes_KSD[step])
        assert isinstance(labels, MixedLabels) and torch.equal(labels.labels_SB, y)
        torch.testing.assert_close(x_mixed, expected.images.flatten(2), rtol=0, atol=0)
        assert torch.equal(labels.others_SB, expected.other_labels) and torch.equal(labels.share_S, expected.share)
        shares += labels.share_S.tolist()
    assert len(set(shares)) > 0.7 * len(shares) and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("seeds", [[7, 8], [8, 7], [1, 2, 7, 3]])
def test_mixing_is_the_seeds_own(splits, seeds):
    """Whoever trains beside it, whichever epoch came before, and afresh in every epoch."""
    alone, among = mixed_of(splits, [7], strength=1.0), mixed_of(splits, seeds, strength=1.0)
    place = seeds.index(7)
    drawn = []
    for number in (2, 1):
        for (x, y), (x_among, y_among) in zip(alone.epoch(number), among.epoch(number), strict=True):
            torch.testing.assert_close(x_among[place], x[0])
            for part in ("labels_SB", "others_SB", "share_S"):
                assert torch.equal(getattr(y_among, part)[place], getattr(y, part)[0])
        drawn.append(alone.mixes_KSD.clone())
    assert not torch.equal(*drawn)


def test_a_stage_changes_what_it_names_and_no_more(splits):
    """Its own batches and sizes, mixing where it is on; the stage that names nothing has the batches there were."""
    batches = mixed_of(splits, [7, 8])
    same = batches.for_stage(Stage(epochs=1))
    small = batches.for_stage(Stage(epochs=1, batch_size=9, image_size=10, mixing=False))

    assert batches.for_stage(None) is batches
    for (x, y), (x_same, y_same) in zip(batches.epoch(1), same.epoch(1), strict=True):
        assert torch.equal(x, x_same) and torch.equal(y.share_S, y_same.share_S)
    steps = list(small.epoch(1))
    assert len(steps) == len(small) == 10
    assert all(x.shape == (2, 9, 100) and y.shape == (2, 9) for x, y in steps)


@pytest.mark.parametrize("side", [5, 8, 12])
def test_images_of_another_size_are_the_same_images(numbered, side):
    """Resized before they are normalised, as those that are evaluated are."""
    batches = Batches(numbered, [7], batch_size=BATCH_SIZE, augmentation_strength=0.0, image_size=side)
    spec = ImageSpec(shape=(1, side, side), class_names=numbered.class_names, mean=numbered.mean, std=numbered.std)
    expected = Normalise(spec, torch.device("cpu"))(numbered.train.images)
    for x, y in batches.epoch(1):
        torch.testing.assert_close(x, expected[y])
    flat = resize(torch.full((2, 3, 4, 4), 7.0), (9, 9))
    torch.testing.assert_close(flat, torch.full((2, 3, 9, 9), 7.0))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_random_crops_come_at_the_size_of_the_batches(strength):
    """Of a data set whose recipe crops: finite, and with a cutout of as large a part as without resizing."""
    splits = splits_of("tiny_imagenet", channels=3)
    batches = Batches(splits, [7], batch_size=BATCH_SIZE, augmentation_strength=strength, cutout=4, image_size=16)
    for x, _ in batches.epoch(1):
        assert x.shape == (1, BATCH_SIZE, 3 * 16 * 16) and x.isfinite().all()
        left_out = (x.unflatten(-1, batches.seen_shape) == 0).all(dim=2).sum(dim=(-1, -2))
        assert left_out.min() >= 4 * 4 and left_out.max() <= 8 * 8 + 4
