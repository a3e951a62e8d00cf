"""Training augmentation: a whole batch moved, recoloured or mixed at once, on the device where it is.

Every random number comes in from outside and nothing is read back from the device, so a CUDA graph can hold it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import special
from torch import Generator, Tensor

from collective_pipeline.config import DatasetName

NUM_DRAWS = 7  # turn, shift x, shift y, zoom, crop x, crop y, mirror
NUM_CUTOUT_DRAWS = 2  # centre x, centre y
NUM_CROP_DRAWS = 5  # area, ratio, x, y, mirror
NUM_COLOUR_DRAWS = 5  # brightness, contrast, saturation, hue, whether
NUM_MOVE_DRAWS = 5  # turn, shift x, shift y, zoom, whether
NUM_MIX_DRAWS = 5  # whether a box is cut, share kept, centre x, centre y, partner
GREY = (0.2989, 0.587, 0.114)  # what red, green and blue add to brightness (ITU-R BT.601)


@dataclass(frozen=True)
class Recipe:
    """How far an image may be moved at strength 1."""

    degrees: float = 0.0
    translate: float = 0.0  # of the side
    scale: float = 0.0  # 0.1: from 0.9 to 1.1
    flip: bool = False
    crop_padding: int = 0  # whole pixels
    crop_area: float = 0.0  # a random part of the image instead of all of these: at least so much of it


RECIPES: dict[DatasetName, Recipe] = {
    "mnist": Recipe(degrees=10, translate=0.1, scale=0.1),
    "fashion_mnist": Recipe(degrees=15, translate=0.1, scale=0.1, flip=True),
    "cifar10": Recipe(flip=True, crop_padding=4),
    "cifar100": Recipe(flip=True, crop_padding=4),
    "tiny_imagenet": Recipe(flip=True, crop_area=0.25),
    "imagenet64": Recipe(flip=True, crop_area=0.25),
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


def random_resized_crop(
    images: Tensor,
    draws: Tensor,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Tensor:
    """A part of every image, as a square of `size` pixels, every other one mirrored: one bilinear resampling.

    The area is uniform, and so is the logarithm of the ratio, over what of its range fits into the image with this
    area. torchvision draws both again where they do not fit, which makes large areas rarer than they are asked for.
    Nothing smooths an image that shrinks: one that is more than twice too large had better be halved before.

    Args:
        images: `(n, C, H, W)`, floating point.
        draws: `(n, NUM_CROP_DRAWS)`, uniform in [0, 1).
        size: Pixels of either side of what comes out.
        scale: Range of the part's area, as a share of the image's.
        ratio: Range of the part's width over its height; where an image is too long for that, the part gets smaller.
        flip: Whether parts are mirrored.
    """
    height, width = images.shape[2:]
    u_area, u_ratio, u_x, u_y, u_mirror = draws[:, :, None, None].unbind(1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
    ends = math.log(ratio[0]), math.log(ratio[1])
    lowest = (area.log() - 2 * math.log(height)).clamp(*ends)
    highest = (2 * math.log(width) - area.log()).clamp(*ends)
    drawn = (lowest + (highest - lowest) * u_ratio).exp()
    part_x, part_y = (area * drawn).sqrt(), (area / drawn).sqrt()
    shrink = torch.minimum(width / part_x, height / part_y).clamp(max=1)
    part_x, part_y = shrink * part_x, shrink * part_y

    # Of every new pixel, from 0 to 1 over the part; then from -1 to 1 over the image.
    place = (torch.arange(size, device=draws.device) + 0.5) / size
    x = torch.where(u_mirror < 0.5 * flip, 1 - place, place)
    x = 2 / width * (u_x * (width - part_x) + part_x * x) - 1
    y = 2 / height * (u_y * (height - part_y) + part_y * place[:, None]) - 1
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def shift_scale_rotate(
    images: Tensor, draws: Tensor, *, shift: float, scale: float, degrees: float, probability: float
) -> Tensor:
    """Turn, scale and shift some of the images, by one resampling.

    Args:
        images: As for `augment`.
        draws: `(n, NUM_MOVE_DRAWS)`, uniform in [0, 1).
        shift: At most, in either direction, of the side.
        scale: At most: 0.1 for 0.9 to 1.1.
        degrees: At most, in either direction.
        probability: That an image is moved at all.
    """
    moves = torch.where(draws[:, 4:] < probability, draws[:, :4], 0.5)  # 0.5 leaves an image where it is
    others = moves.new_full((len(moves), NUM_DRAWS - 4), 0.5)
    return augment(images, torch.cat([moves, others], dim=1), Recipe(degrees, shift, scale), 1.0)


def colour_jitter(
    images: Tensor,
    draws: Tensor,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float,
) -> Tensor:
    """Change brightness, contrast, saturation and hue of some of the images, in this order.

    Args:
        images: `(n, 3, H, W)`: red, green and blue in [0, 1], and so they stay.
        draws: `(n, NUM_COLOUR_DRAWS)`, uniform in [0, 1).
        brightness: 0.2 for a factor from 0.8 to 1.2; 0 leaves it as it is.
        contrast: Likewise, about the mean of the grey image.
        saturation: Likewise, about the grey image.
        hue: At most, in either direction; 1 is once around the circle of colours.
        probability: That an image is changed at all.
    """
    *ups, u_whether = draws[:, :, None, None, None].unbind(1)
    lighter, sharper, richer = (
        (1 + amount * (2 * u - 1)).clamp(min=0)
        for amount, u in zip((brightness, contrast, saturation), ups[:3], strict=True)
    )
    changed = (images * lighter).clamp(0, 1)
    mean = _grey(changed).mean(dim=(2, 3), keepdim=True)
    changed = torch.lerp(mean, changed, sharper).clamp(0, 1)
    changed = torch.lerp(_grey(changed), changed, richer).clamp(0, 1)
    if hue:
        changed = _turn_hue(changed, hue * (2 * ups[3] - 1).squeeze(1))
    return torch.where(u_whether < probability, changed, images)


def cut_out(images: Tensor, draws: Tensor, side: int, *, probability: float = 1.0) -> Tensor:
    """Leave a square out of images, or what of it is inside: its centre is any pixel (DeVries & Taylor 2017).

    Args:
        images: `(..., C, H, W)`, with the mean of the training images as 0.
        draws: `(..., NUM_CUTOUT_DRAWS)`, uniform in [0, 1).
        side: Of the square, in pixels.
        probability: That an image loses something: below it, the draw of x is uniform again.
    """
    height, width = images.shape[-2:]
    centre_x, centre_y = draws[..., None, None, None, :].unbind(-1)
    chosen, centre_x = centre_x < probability, centre_x / max(probability, 1e-9)
    before_x = torch.arange(width, device=images.device) - (centre_x * width).floor() + side // 2
    before_y = torch.arange(height, device=images.device)[:, None] - (centre_y * height).floor() + side // 2
    inside = (before_x >= 0) & (before_x < side) & (before_y >= 0) & (before_y < side)
    return images.masked_fill(inside & chosen, 0.0)


class Mixed(NamedTuple):
    """Images that are each a mixture with another of their batch.

    The loss is `share` times that of an image's own label and `1 - share` times that of the other's.

    Attributes:
        images: `(S, B, C, H, W)`.
        other_labels: `(S, B)`.
        share: `(S,)`, what of every image is its own.
    """

    images: Tensor
    other_labels: Tensor
    share: Tensor


def draw_mix(generator: Generator, num_steps: int, *, mixup_alpha: float, cutmix_alpha: float) -> Tensor:
    """How each step mixes its batch, `(num_steps, NUM_MIX_DRAWS)`, on the CPU, for `mix`.

    Args:
        generator: Of one seed.
        num_steps: How many.
        mixup_alpha: MixUp keeps a share from Beta(alpha, alpha) (Zhang et al. 2018); 0: never.
        cutmix_alpha: CutMix likewise, of the area (Yun et al. 2019); 0: never. With both, a coin decides.
    """
    coin, u, centre_x, centre_y, partner = torch.rand(num_steps, NUM_MIX_DRAWS, generator=generator).unbind(1)
    cuts = coin < (0.5 if mixup_alpha else 1.0) * (cutmix_alpha > 0)
    share = torch.where(cuts, _beta(u, cutmix_alpha), _beta(u, mixup_alpha))
    return torch.stack([cuts.float(), share, centre_x, centre_y, partner], dim=1)


def mix(images: Tensor, labels: Tensor, draws: Tensor) -> Mixed:
    """Blend every image with another of its batch, or paste a box of that one: MixUp or CutMix, seed by seed.

    Batches come in random order, so the next images but some are as good as any others. The box has any pixel as its
    centre and ends at the edges; the share is then what is left around it.

    Args:
        images: `(S, B, C, H, W)`, floating point.
        labels: `(S, B)`.
        draws: `(S, NUM_MIX_DRAWS)`, one row of `draw_mix` for each seed.
    """
    num_seeds, batch, _, height, width = images.shape
    cuts, share, centre_x, centre_y, partner = draws.unbind(1)
    cuts = cuts > 0
    distance = 1 + (partner * (batch - 1)).floor().long()
    partners = (torch.arange(batch, device=images.device) + distance[:, None]) % batch
    side = (1 - share).sqrt()
    box = _reaches(centre_y, side, height)[:, :, None] & _reaches(centre_x, side, width)[:, None, :]
    share = torch.where(cuts, 1 - box.float().mean(dim=(1, 2)), share)
    own = torch.where(cuts[:, None, None], (~box).float(), share[:, None, None]).to(images.dtype)
    others = images[torch.arange(num_seeds, device=images.device)[:, None], partners]
    return Mixed(torch.lerp(others, images, own[:, None, None]), labels.gather(1, partners), share)


def _beta(u: Tensor, alpha: float) -> Tensor:
    """Uniform numbers made Beta(alpha, alpha); 1 where alpha is 0."""
    if not alpha:
        return torch.ones_like(u)
    shares: Tensor = torch.from_numpy(special.betaincinv(alpha, alpha, u.double().numpy()))
    return shares.to(u.dtype)


def _reaches(centre: Tensor, side: Tensor, size: int) -> Tensor:
    """Which of `size` pixels a box covers along one axis, `(S, size)`; centre and side are shares of it, `(S,)`."""
    place = torch.arange(size, device=centre.device)
    middle, half = (centre * size).floor()[:, None], (side * size / 2).floor()[:, None]
    return (place >= middle - half) & (place < middle + half)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    grey: Tensor = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    return grey


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Red, green and blue `(n, 3, H, W)` with another hue: `turn` `(n, 1, 1)` is 1 for once around the circle."""
    red, green, blue = images.unbind(1)
    high, chroma = images.amax(dim=1), images.amax(dim=1) - images.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1)
    on_green = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(high == red, (green - blue) / divisor, on_green) + 6 * turn
    # A channel is low for two sixths of the circle about its opposite, and high for two about itself.
    opposite = 5 - 2 * torch.arange(3, device=images.device)[:, None, None]
    away = (sixths[:, None] + opposite) % 6
    return high[:, None] - chroma[:, None] * torch.minimum(away, 4 - away).clamp(0, 1)


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
