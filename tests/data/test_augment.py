"""Augmentation moves each image as its own draws say, by at most what the recipe allows."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from collective_pipeline.config import DATASETS
from collective_pipeline.data.augment import (
    NUM_COLOUR_DRAWS,
    NUM_CROP_DRAWS,
    NUM_CUTOUT_DRAWS,
    NUM_DRAWS,
    NUM_MIX_DRAWS,
    NUM_MOVE_DRAWS,
    RECIPES,
    Recipe,
    augment,
    colour_jitter,
    cut_out,
    draw_mix,
    mix,
    random_resized_crop,
    shift_scale_rotate,
)

TURN, SHIFT_X, SHIFT_Y, ZOOM, CROP_X, CROP_Y, MIRROR = range(NUM_DRAWS)
EVERYTHING = Recipe(degrees=15, translate=0.1, scale=0.1, flip=True, crop_padding=4)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def draws_for(images: Tensor, columns: dict[int, float]) -> Tensor:
    """Draws that leave images where they are, but for the given ones: 0 and 1 are the ends of a range."""
    draws = torch.full((len(images), NUM_DRAWS), 0.5)
    for column, value in columns.items():
        draws[:, column] = value
    return draws


def random_draws(images: Tensor) -> Tensor:
    return torch.rand(len(images), NUM_DRAWS, generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (5, 3, 32, 32), (5, 2, 6, 9)])
def test_strength_0_changes_nothing(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))

    assert_same(augment(images, random_draws(images), EVERYTHING, 0.0), images)


@pytest.mark.parametrize("turn", [0.0, 1.0])
def test_a_quarter_turn_is_rot90(images: Tensor, turn: float) -> None:
    turned = augment(images, draws_for(images, {TURN: turn}), Recipe(degrees=90), 1.0)

    assert_same(turned, images.rot90(1 if turn else -1, dims=(3, 2)))


def test_a_half_turn_is_exact_for_images_that_are_not_square() -> None:
    images = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(0))

    assert_same(augment(images, draws_for(images, {TURN: 1.0}), Recipe(degrees=180), 1.0), images.flip(2, 3))


@pytest.mark.parametrize(
    ("columns", "right", "down"),
    [({SHIFT_X: 1.0}, 2, 0), ({SHIFT_X: 0.0}, -2, 0), ({SHIFT_Y: 1.0}, 0, 2), ({SHIFT_Y: 0.0}, 0, -2)],
)
def test_a_shift_moves_whole_pixels_and_lets_0_in(
    images: Tensor, columns: dict[int, float], right: int, down: int
) -> None:
    moved = augment(images, draws_for(images, columns), Recipe(translate=2 / 8), 1.0)

    assert_same(moved, F.pad(images, (right, -right, down, -down)))


def test_a_crop_is_one_of_the_windows_of_the_padded_image(images: Tensor) -> None:
    padded = F.pad(images[:1], (2, 2, 2, 2))
    for column in range(5):
        for row in range(5):
            draws = draws_for(images[:1], {CROP_X: (column + 0.5) / 5, CROP_Y: (row + 0.5) / 5})
            cropped = augment(images[:1], draws, Recipe(crop_padding=2), 1.0)

            assert_same(cropped, padded[:, :, 4 - row : 12 - row, 4 - column : 12 - column])


def test_crops_stay_inside_the_padding_at_the_end_of_the_range(images: Tensor) -> None:
    almost_1 = 1 - 2**-24
    cropped = augment(images, draws_for(images, {CROP_X: almost_1}), Recipe(crop_padding=4), 1.0)

    assert_same(cropped, F.pad(images, (4, -4)))


def test_zoom_is_that_of_a_resized_image(images: Tensor) -> None:
    zoomed = augment(images, draws_for(images, {ZOOM: 1.0}), Recipe(scale=1.0), 1.0)
    resized = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)

    assert_same(zoomed, resized[:, :, 4:12, 4:12])


def test_flip_mirrors_left_and_right(images: Tensor) -> None:
    recipe = Recipe(flip=True)

    assert_same(augment(images, draws_for(images, {MIRROR: 0.49}), recipe, 1.0), images.flip(-1))
    assert_same(augment(images, draws_for(images, {MIRROR: 0.5}), recipe, 1.0), images)
    assert_same(augment(images, draws_for(images, {MIRROR: 0.0}), Recipe(), 1.0), images)


@pytest.mark.parametrize(("strength", "share"), [(0.5, 0.25), (1.0, 0.5), (3.0, 0.5)])
def test_strength_raises_the_chance_of_a_mirror_image_to_a_half(strength: float, share: float) -> None:
    images = torch.tensor([0.0, 1.0]).expand(400, 1, 1, 2)
    draws = draws_for(images, {})
    draws[:, MIRROR] = torch.arange(400) / 400
    mirrored = augment(images, draws, Recipe(flip=True), strength)[:, 0, 0, 0] > 0.5

    assert mirrored.float().mean().item() == pytest.approx(share)


def test_all_motions_are_one_resampling() -> None:
    """A plane comes through exactly, read at the mirrored, turned, scaled and shifted places."""
    position = torch.arange(64) - 31.5
    x, y = position[None, :], position[:, None]

    def plane(x: Tensor, y: Tensor) -> Tensor:
        return (0.03 * x + 0.05 * y).expand(1, 1, 64, 64)

    images = plane(x, y)
    draws = draws_for(images, {TURN: 1.0, SHIFT_X: 1.0, SHIFT_Y: 0.0, ZOOM: 1.0, CROP_X: 1.0 - 1e-6, MIRROR: 0.0})
    recipe = Recipe(degrees=30, translate=0.1, scale=0.2, flip=True, crop_padding=3)
    cos, sin = 3**0.5 / 2, 0.5
    moved_x, moved_y = (x - 6.4 - 3) / 1.2, (y + 6.4) / 1.2
    expected = plane(-(cos * moved_x + sin * moved_y), cos * moved_y - sin * moved_x)

    inside = (..., slice(16, 48), slice(16, 48))  # where no corner of the plane has moved in
    assert_same(augment(images, draws, recipe, 1.0)[inside], expected[inside])


def test_an_image_does_not_depend_on_its_neighbours(images: Tensor) -> None:
    draws = random_draws(images)
    together = augment(images, draws, EVERYTHING, 1.0)

    for i in range(len(images)):
        assert_same(together[i : i + 1], augment(images[i : i + 1], draws[i : i + 1], EVERYTHING, 1.0))


def test_the_draws_decide_everything(images: Tensor) -> None:
    draws = random_draws(images)
    first = augment(images, draws, EVERYTHING, 1.0)
    torch.manual_seed(123)

    assert torch.equal(augment(images, draws, EVERYTHING, 1.0), first)
    for column in range(MIRROR):
        other = draws.clone()
        other[:, column] = 1 - other[:, column]
        assert not torch.allclose(augment(images, other, EVERYTHING, 1.0), first), column


def test_nothing_is_read_back_from_the_device() -> None:
    """On the meta device there is nothing to read: any such need is an error."""
    images, draws = torch.empty(4, 1, 28, 28, device="meta"), torch.empty(4, NUM_DRAWS, device="meta")

    assert augment(images, draws, EVERYTHING, 1.0).shape == images.shape


def test_every_data_set_has_a_recipe() -> None:
    assert set(RECIPES) == set(DATASETS)
    assert not RECIPES["mnist"].flip  # a mirrored 2 is no 2


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_leaves_a_square_out(side: int) -> None:
    """Of that side around each image's own centre, in all channels; nothing else changes."""
    images = torch.ones(40, 3, 8, 9)
    draws = torch.rand(40, NUM_CUTOUT_DRAWS, generator=torch.Generator().manual_seed(2))
    left = cut_out(images, draws, side)

    for image, (x, y) in zip(left, draws.tolist(), strict=True):
        expected = torch.ones(8, 9)
        column, row = int(x * 9) - side // 2, int(y * 8) - side // 2
        expected[max(row, 0) : row + side, max(column, 0) : column + side] = 0
        assert torch.equal(image, expected.expand(3, -1, -1))


def test_cutout_leaves_nothing_out_of_0_pixels(images: Tensor) -> None:
    assert torch.equal(cut_out(images, torch.rand(6, NUM_CUTOUT_DRAWS), 0), images)


def test_cutout_of_some_images(images: Tensor) -> None:
    """As many as are asked for; the centre of those is still any column."""
    draws = torch.rand(4000, NUM_CUTOUT_DRAWS, generator=torch.Generator().manual_seed(2))
    left = cut_out(torch.ones(4000, 1, 8, 8), draws, 1, probability=0.3)

    assert (left.sum(dim=(1, 2, 3)) < 64).float().mean().item() == pytest.approx(0.3, abs=0.02)
    hits = (left == 0).sum(dim=(0, 1, 2))
    assert (hits > 100).all() and (hits < 200).all()
    assert torch.equal(cut_out(images, draws[:6], 5, probability=0.0), images)


def uniform(n: int, columns: int, seed: int = 3) -> Tensor:
    return torch.rand(n, columns, generator=torch.Generator().manual_seed(seed))


def test_a_resized_crop_of_everything_is_a_resized_image(images: Tensor) -> None:
    """And of every other image mirrored."""
    draws = torch.full((6, NUM_CROP_DRAWS), 0.5)
    draws[::2, 4] = 0.49
    expected = F.interpolate(images, size=(13, 13), mode="bilinear", align_corners=False)
    expected[::2] = expected[::2].flip(-1)

    assert_same(random_resized_crop(images, draws, size=13, scale=(1, 1), ratio=(1, 1)), expected)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (32, 32), (20, 90)])
def test_a_resized_crop_is_the_part_that_the_draws_say(shape: tuple[int, int]) -> None:
    """Inside the image, of the area and of a ratio in the range: read from images whose values are their places."""
    height, width = shape
    x = (torch.arange(width) + 0.5).expand(height, width)
    y = (torch.arange(height) + 0.5)[:, None].expand(height, width)
    draws = uniform(300, NUM_CROP_DRAWS)
    places = random_resized_crop(torch.stack([x, y]).expand(300, -1, -1, -1), draws, size=7)

    # Pixels of the image end half a pixel before its edge: what is read there is not a place.
    (x, y), step = places[:, :, 3, 3].unbind(1), places[:, :, 4, 4] - places[:, :, 3, 3]
    (part_x, part_y), mirrored = (7 * step.abs()).unbind(1), step[:, 0] < 0
    area, ratio = part_x * part_y / (height * width), part_x / part_y
    wanted = 0.08 + 0.92 * draws[:, 0]

    assert torch.equal(mirrored, draws[:, 4] < 0.5)
    assert ((ratio > 0.7499) & (ratio < 1.3334)).all()
    assert (area <= wanted + 1e-4).all()
    if shape != (20, 90):
        assert_same(area, wanted)
    torch.testing.assert_close(x - part_x / 2, draws[:, 2] * (width - part_x), rtol=0, atol=1e-3)
    torch.testing.assert_close(y - part_y / 2, draws[:, 3] * (height - part_y), rtol=0, atol=1e-3)


def test_a_resized_crop_of_every_image_is_its_own(images: Tensor) -> None:
    """As torch's own crop-and-resize by an affine map, image by image."""
    draws = uniform(6, NUM_CROP_DRAWS)
    together = random_resized_crop(images, draws, size=5, scale=(0.2, 0.6), ratio=(1, 1))

    for image, crop, (u_area, _, u_x, u_y, u_mirror) in zip(images, together, draws.tolist(), strict=True):
        side = (0.2 + 0.4 * u_area) ** 0.5
        centre_x, centre_y = (2 * u * (1 - side) + side - 1 for u in (u_x, u_y))
        theta = torch.tensor([[[side * (-1 if u_mirror < 0.5 else 1), 0, centre_x], [0, side, centre_y]]])
        grid = F.affine_grid(theta, [1, 3, 5, 5], align_corners=False)
        assert_same(crop, F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0])


def test_shift_scale_rotate_moves_some_images_as_augment_does(images: Tensor) -> None:
    many = images.repeat(50, 1, 1, 1)
    draws = uniform(300, NUM_MOVE_DRAWS)
    moved = shift_scale_rotate(many, draws, shift=0.1, scale=0.2, degrees=15, probability=0.3)
    whole = torch.cat([draws[:, :4], torch.full((300, 3), 0.9)], dim=1)
    expected = augment(many, whole, Recipe(degrees=15, translate=0.1, scale=0.2), 1.0)
    chosen = draws[:, 4] < 0.3

    assert 60 < chosen.sum() < 120
    assert_same(moved[chosen], expected[chosen])
    assert_same(moved[~chosen], many[~chosen])


JITTER = {"brightness": 0.4, "contrast": 0.5, "saturation": 0.6, "hue": 0.2}


def test_colour_jitter_is_torchvisions_image_by_image(images: Tensor) -> None:
    """Grey, black and pure colours among them; who is not chosen stays as it was."""
    pure = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [0.3, 0.3, 0.3]])
    many = torch.cat([images, pure[:, :, None, None].expand(-1, -1, 8, 8)])
    draws = uniform(12, NUM_COLOUR_DRAWS)
    jittered = colour_jitter(many, draws, **JITTER, probability=0.7)

    for image, changed, (light, sharp, rich, turn, whether) in zip(many, jittered, draws.tolist(), strict=True):
        expected = image
        if whether < 0.7:
            expected = tv.adjust_brightness(expected, 1 + 0.4 * (2 * light - 1))
            expected = tv.adjust_contrast(expected, 1 + 0.5 * (2 * sharp - 1))
            expected = tv.adjust_saturation(expected, 1 + 0.6 * (2 * rich - 1))
            expected = tv.adjust_hue(expected, 0.2 * (2 * turn - 1))
        assert_same(changed, expected)


@pytest.mark.parametrize("name", JITTER)
def test_each_part_of_colour_jitter_alone(images: Tensor, name: str) -> None:
    """Others at 0 leave the colours alone, a factor is never below 0, and all of them at 0 change nothing."""
    none = dict.fromkeys(JITTER, 0.0)
    draws = uniform(6, NUM_COLOUR_DRAWS)

    assert_same(colour_jitter(images, draws, **none, probability=1.0), images)
    for amount in (0.3, 3.0) if name != "hue" else (0.3,):
        jittered = colour_jitter(images, draws, **none | {name: amount}, probability=1.0)
        for image, changed, u in zip(images, jittered, draws[:, list(JITTER).index(name)].tolist(), strict=True):
            turn = amount * (2 * u - 1)
            adjust = getattr(tv, f"adjust_{name}")
            assert_same(changed, adjust(image, turn if name == "hue" else max(0.0, 1 + turn)))


BOTH = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}


def batch(num_seeds: int = 3, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(num_seeds, size, 3, 8, 10, generator=generator), torch.arange(num_seeds * size).view(-1, size)


def test_shares_are_drawn_from_the_beta_distributions() -> None:
    """MixUp and CutMix each half of the time, by the seed's generator alone."""
    drawn = draw_mix(torch.Generator().manual_seed(5), 4000, **BOTH)
    again = draw_mix(torch.Generator().manual_seed(5), 4000, **BOTH)
    cuts = drawn[:, 0] == 1

    assert drawn.shape == (4000, NUM_MIX_DRAWS) and torch.equal(drawn, again)
    assert cuts.float().mean().item() == pytest.approx(0.5, abs=0.03)
    for chosen, alpha in ((cuts, 1.0), (~cuts, 0.2)):
        assert stats.kstest(drawn[chosen, 1].numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    for column in (2, 3, 4):
        assert stats.kstest(drawn[:, column].numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(("alphas", "cuts"), [((0.2, 0.0), {0.0}), ((0.0, 1.0), {1.0}), ((0.2, 1.0), {0.0, 1.0})])
def test_an_alpha_of_0_leaves_the_other_alone(alphas: tuple[float, float], cuts: set[float]) -> None:
    drawn = draw_mix(torch.Generator(), 100, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])

    assert set(drawn[:, 0].tolist()) == cuts and drawn[:, 1].mean() < 0.7


def test_both_alphas_at_0_change_nothing() -> None:
    images, labels = batch()
    mixed = mix(images, labels, draw_mix(torch.Generator(), 3, mixup_alpha=0.0, cutmix_alpha=0.0))

    assert torch.equal(mixed.images, images) and mixed.share.tolist() == [1, 1, 1]


@pytest.mark.parametrize("seed", range(8))
def test_mixing_is_what_its_definition_says(seed: int) -> None:
    """Image by image: blended by the share, or with a box of the partner whose area is what the share lacks."""
    images, labels = batch()
    draws = draw_mix(torch.Generator().manual_seed(seed), 3, **BOTH)
    mixed = mix(images, labels, draws)

    for s, (cuts, share, x, y, partner) in enumerate(draws.tolist()):
        shift = 1 + int(partner * 4)
        for b in range(5):
            other = images[s, (b + shift) % 5]
            expected = share * images[s, b] + (1 - share) * other
            if cuts:
                side = (1 - share) ** 0.5
                rows, columns = int(8 * side) // 2, int(10 * side) // 2
                top, left = max(int(y * 8) - rows, 0), max(int(x * 10) - columns, 0)
                bottom, right = min(int(y * 8) + rows, 8), min(int(x * 10) + columns, 10)
                expected = images[s, b].clone()
                expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
                assert mixed.share[s].item() == pytest.approx(1 - (bottom - top) * (right - left) / 80)
                # Of every image as much as was pasted is no longer its own.
                own = (mixed.images[s, b] == images[s, b]).all(dim=0).float().mean()
                assert own.item() == pytest.approx(mixed.share[s].item())
            else:
                assert mixed.share[s].item() == pytest.approx(share)
            assert_same(mixed.images[s, b], expected)
            assert mixed.other_labels[s, b] == labels[s, (b + shift) % 5]


def test_every_image_has_another_partner_and_none_is_left_out() -> None:
    """All others of the batch take their turn; one image alone is mixed with itself."""
    images, labels = batch(num_seeds=200)
    others = mix(images, labels, draw_mix(torch.Generator(), 200, **BOTH)).other_labels
    distances = (others - labels) % 5

    assert torch.equal(others.sort(dim=1).values, labels)
    assert set(distances.unique().tolist()) == {1, 2, 3, 4}
    one = mix(images[:, :1], labels[:, :1], draw_mix(torch.Generator(), 200, **BOTH))
    assert torch.equal(one.other_labels, labels[:, :1])


def test_nothing_of_all_that_is_read_back_from_the_device() -> None:
    """As above."""
    images = torch.empty(2, 4, 3, 8, 8, device="meta")
    rows = images[0]

    def draws(columns: int) -> Tensor:
        return torch.empty(4, columns, device="meta")

    assert random_resized_crop(rows, draws(NUM_CROP_DRAWS), size=5).shape == (4, 3, 5, 5)
    assert colour_jitter(rows, draws(NUM_COLOUR_DRAWS), **JITTER, probability=0.5).shape == rows.shape
    moved = shift_scale_rotate(rows, draws(NUM_MOVE_DRAWS), shift=0.1, scale=0.1, degrees=5, probability=0.5)
    assert moved.shape == rows.shape
    assert cut_out(rows, draws(NUM_CUTOUT_DRAWS), 3, probability=0.5).shape == rows.shape
    labels = torch.empty(2, 4, dtype=torch.int64, device="meta")
    assert mix(images, labels, torch.empty(2, NUM_MIX_DRAWS, device="meta")).images.shape == images.shape
