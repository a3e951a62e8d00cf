"""Which part of an image of any size is seen, and all parts of a batch brought to one size on the device.

Suffixes: B images, A attempts, S side of the output, H and W of the largest part, C channels.
A box is `(top, left, height, width)` in whole pixels, inside its image.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ATTEMPTS = 10
NUM_BOX_DRAWS = 2 * ATTEMPTS + 2  # area and ratio of every attempt, place down, place right
# Of parts of like size, so that little is spent on what fills up the small ones.
IMAGES_AT_ONCE = 64
# A side of so many times the output's, or more, is averaged to less before: what fills up the others stays small.
MAX_STEP = 4


def random_boxes(
    draws: Tensor, sizes: Tensor, *, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """A part of every image with a random area, ratio of sides and place, `(B, 4)` int64 (Szegedy et al. 2015).

    The first of ten attempts that fits inside; if none does, the largest part in the middle with an allowed ratio.

    Args:
        draws: `(B, NUM_BOX_DRAWS)`, uniform in [0, 1).
        sizes: `(B, 2)`, heights and widths.
        scale: Least and largest share of the area.
        ratio: Least and largest ratio of width to height; its logarithm is uniform.
    """
    draws = draws.double()
    height_B1, width_B1 = sizes.double().split(1, dim=1)
    area_BA = (scale[0] + (scale[1] - scale[0]) * draws[:, :ATTEMPTS]) * height_B1 * width_B1
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio_BA = (low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS]).exp()
    heights_BA, widths_BA = (area_BA / ratio_BA).sqrt().round(), (area_BA * ratio_BA).sqrt().round()
    fits_BA = (heights_BA >= 1) & (heights_BA <= height_B1) & (widths_BA >= 1) & (widths_BA <= width_B1)
    first_B1 = fits_BA.int().argmax(dim=1, keepdim=True)

    fits_B1 = fits_BA.any(dim=1, keepdim=True)
    middle_height_B1 = torch.minimum(height_B1, (width_B1 / ratio[0]).round().clamp(min=1))
    middle_width_B1 = torch.minimum(width_B1, (height_B1 * ratio[1]).round().clamp(min=1))
    box_height_B1 = torch.where(fits_B1, heights_BA.gather(1, first_B1), middle_height_B1)
    box_width_B1 = torch.where(fits_B1, widths_BA.gather(1, first_B1), middle_width_B1)
    rest_B2 = torch.cat([height_B1 - box_height_B1, width_B1 - box_width_B1], dim=1)
    place_B2 = torch.where(fits_B1, (draws[:, -2:] * (rest_B2 + 1)).floor(), (rest_B2 / 2).floor())
    return torch.cat([torch.minimum(place_B2, rest_B2), box_height_B1, box_width_B1], dim=1).long()


def centre_boxes(sizes: Tensor, share: float) -> Tensor:
    """The square in the middle whose side is `share` of the shorter side, `(B, 4)` int64, for `sizes` `(B, 2)`.

    0.875 is what shows 224 pixels of an image resized to 256.
    """
    side_B1 = (share * sizes.amin(dim=1, keepdim=True)).round().long().clamp(min=1)
    return torch.cat([(sizes - side_B1) // 2, side_B1, side_B1], dim=1)


def resample(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """The parts of images of any sizes as one uint8 batch `(B, 3, size, size)` on their device.

    As torch's bilinear resize with antialiasing has it; on the CPU it is that, image by image, which takes a fifth of
    the time of the matrices there.

    Args:
        images: B of uint8 `(3, height, width)`.
        boxes: `(B, 4)`, on the CPU.
        flips: `(B,)`, bool, on the CPU: which to mirror.
        size: Side of the output.
    """
    if images[0].device.type == "cpu":
        about = zip(images, boxes.tolist(), flips.tolist(), strict=True)
        return torch.from_numpy(np.stack([_resize(image, box, flip, size) for image, box, flip in about]))
    return resample_together(images, boxes, flips, size)


def resample_together(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """`resample` by two matrix products for every group of images of like size: few calls, whatever the sizes."""
    order = boxes[:, 2:].amax(dim=1).argsort(stable=True)
    groups = [
        _resample_group([images[row] for row in rows.tolist()], boxes[rows], flips[rows], size)
        for rows in order.split(IMAGES_AT_ONCE)
    ]
    return torch.cat(groups)[order.argsort().to(groups[0].device)]


def _resize(image: Tensor, box: Sequence[int], flip: bool, size: int) -> NDArray[np.uint8]:
    """One image as torch resizes it, `(3, size, size)`.

    NumPy copies, because torch would copy with as many threads as there are cores in each of the threads that feed: on
    two busy cores that took twenty times as long.
    """
    top, left, height, width = box
    # Only with the channels last does torch resize bytes as they are.
    part = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[top : top + height, left : left + width])
    channels_last = torch.from_numpy(part).permute(2, 0, 1)[None]
    resized: NDArray[np.uint8] = F.interpolate(channels_last, (size, size), mode="bilinear", antialias=True)[0].numpy()
    return resized[..., ::-1] if flip else resized


def _resample_group(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    device = images[0].device
    # Bytes are exact in half precision, and weights good to a tenth of a step of the result.
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pixels_a_cell = (2 * boxes[:, 2:] // (MAX_STEP * size)).clamp(min=1)  # down, right
    cells = boxes[:, 2:].add(pixels_a_cell - 1) // pixels_a_cell
    largest_H, largest_W = cells.amax(dim=0).tolist()
    # Channels between the two sides, so that no product has to be turned for the next one.
    parts_BHCW = torch.zeros(len(images), largest_H, 3, largest_W, device=device, dtype=dtype)
    about = zip(images, boxes.tolist(), pixels_a_cell.tolist(), cells.tolist(), strict=True)
    places, parts = [], []
    for padded, (image, (top, left, height, width), pooled, (rows, columns)) in zip(parts_BHCW, about, strict=True):
        part = image[:, top : top + height, left : left + width]
        if max(pooled) > 1:
            part = F.avg_pool2d(part.to(dtype), pooled, ceil_mode=True, count_include_pad=False)
        places.append(padded[:rows, :, :columns])
        parts.append(part.transpose(0, 1))
    torch._foreach_copy_(places, parts)  # one call: other threads have Python to themselves meanwhile

    known = torch.cat([boxes[:, 2:], pixels_a_cell, flips[:, None]], dim=1).to(device, torch.float32)
    height_B, width_B, down_B, right_B, flip_B = known.unbind(dim=1)
    to_rows_BSH = _weights(height_B, down_B, torch.zeros_like(flip_B), size, largest_H).to(dtype)
    to_columns_BSW = _weights(width_B, right_B, flip_B, size, largest_W).to(dtype)
    narrow_BHCS = torch.bmm(parts_BHCW.flatten(1, 2), to_columns_BSW.mT).unflatten(1, (largest_H, 3))
    small_BSCS: Tensor = torch.bmm(to_rows_BSH, narrow_BHCS.flatten(2, 3)).unflatten(2, (3, size))
    return small_BSCS.round().clamp(0, 255).to(torch.uint8).transpose(1, 2).contiguous()


def _weights(length_B: Tensor, pixels_a_cell_B: Tensor, flip_B: Tensor, size: int, num_cells: int) -> Tensor:
    """How much every cell of a side weighs in every output pixel, `(B, size, num_cells)`, with sums of 1.

    A triangle about the output pixel's centre that reaches one output pixel or one input pixel to both sides,
    whichever is more. Cells behind the end weigh nothing; the last one may be narrower than the others.
    """
    length, pixels_a_cell, flip = (known[:, None, None] for known in (length_B, pixels_a_cell_B, flip_B))
    start = torch.arange(num_cells, device=length_B.device) * pixels_a_cell
    end = torch.minimum(start + pixels_a_cell, length)
    place = torch.arange(size, device=length_B.device)[:, None]
    step = length / size
    centre = (torch.where(flip > 0, size - 1 - place, place) + 0.5) * step
    weights = (1 - ((start + end) / 2 - centre).abs() / step.clamp(min=1)).clamp(min=0) * (end - start).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)
