"""Augmentation moves each image as its own draws say, by at most what the recipe allows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.config import DATASETS
from collective_pipeline.data.augment import NUM_CUTOUT_DRAWS, NUM_DRAWS, RECIPES, Recipe, augment, cut_out

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
