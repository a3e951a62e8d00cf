"""Training augmentation: a whole batch moved by one resampling, on the device where it is.

Every random number comes in from outside and nothing is read back from the device, so a CUDA graph can hold it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.config import DatasetName

NUM_DRAWS = 7  # turn, shift x, shift y, zoom, crop x, crop y, mirror
NUM_CUTOUT_DRAWS = 2  # centre x, centre y


@dataclass(frozen=True)
class Recipe:
    """How far an image may be moved at strength 1."""

    degrees: float = 0.0
    translate: float = 0.0  # of the side
    scale: float = 0.0  # 0.1: from 0.9 to 1.1
    flip: bool = False
    crop_padding: int = 0  # whole pixels


RECIPES: dict[DatasetName, Recipe] = {
    "mnist": Recipe(degrees=10, translate=0.1, scale=0.1),
    "fashion_mnist": Recipe(degrees=15, translate=0.1, scale=0.1, flip=True),
    "cifar10": Recipe(flip=True, crop_padding=4),
    "cifar100": Recipe(flip=True, crop_padding=4),
}


def augment(images: Tensor, draws: Tensor, recipe: Recipe, strength: float) -> Tensor:
    """Mirror, turn, scale and shift every image as its own row of `draws` says.

    Args:
        images: `(n, C, H, W)`, floating point, with 0 as background: what moves in from outside is 0.
        draws: `(n, NUM_DRAWS)`, uniform in [0, 1).
        recipe: The ranges at strength 1.
        strength: Factor on every range, and on the chance of a mirror image up to a half; 0 changes nothing.
    """
    grid = _sampling_grid(draws, recipe, strength, height=images.shape[2], width=images.shape[3])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def cut_out(images: Tensor, draws: Tensor, side: int) -> Tensor:
    """Leave a square out of every image, or what of it is inside: its centre is any pixel (DeVries & Taylor 2017).

    Args:
        images: `(..., C, H, W)`, with the mean of the training images as 0.
        draws: `(..., NUM_CUTOUT_DRAWS)`, uniform in [0, 1).
        side: Of the square, in pixels.
    """
    height, width = images.shape[-2:]
    centre_x, centre_y = draws[..., None, None, None, :].unbind(-1)
    before_x = torch.arange(width, device=images.device) - (centre_x * width).floor() + side // 2
    before_y = torch.arange(height, device=images.device)[:, None] - (centre_y * height).floor() + side // 2
    inside = (before_x >= 0) & (before_x < side) & (before_y >= 0) & (before_y < side)
    return images.masked_fill(inside, 0.0)


def _sampling_grid(draws: Tensor, recipe: Recipe, strength: float, *, height: int, width: int) -> Tensor:
    """Where every output pixel is read, `(n, H, W, 2)` in [-1, 1]: mirror . turn . (position - shift) / scale.

    Written out rather than by `affine_grid`: its matrix product would round to TF32 or bfloat16 where those are on.
    """
    turn, shift_x, shift_y, zoom = (2 * draws[:, :4, None, None] - 1).unbind(1)
    crop = round(recipe.crop_padding * strength)
    crop_x, crop_y = ((2 * crop + 1) * draws[:, 4:6, None, None]).floor().sub(crop).unbind(1)
    mirrored = draws[:, 6, None, None] < 0.5 * min(strength, 1.0) * recipe.flip

    # In pixels from the centre, so that turning keeps right angles in images that are not square.
    x = torch.arange(width, device=draws.device) - (width - 1) / 2 - crop_x
    y = torch.arange(height, device=draws.device)[:, None] - (height - 1) / 2 - crop_y
    x = x - recipe.translate * strength * width * shift_x
    y = y - recipe.translate * strength * height * shift_y
    angle = math.radians(recipe.degrees * strength) * turn
    scale = 1 + recipe.scale * strength * zoom
    cos, sin = angle.cos() / scale, angle.sin() / scale

    # The factors meet while they are small, (n, 1, 1): only the two sums are as large as the batch.
    to_x, to_y = (1 - 2 * mirrored) * (2 / width), 2 / height
    return torch.stack((to_x * cos * x + to_x * sin * y, to_y * cos * y - to_y * sin * x), dim=-1)
