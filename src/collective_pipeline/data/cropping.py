"""Which part of an image of any size is seen, and all parts of a batch brought to one size on the device.

Suffixes: B images, A attempts.
A box is `(top, left, height, width)` in whole pixels, inside its image.
"""

import logging
import math
import threading
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

ATTEMPTS = 10
NUM_BOX_DRAWS = 2 * ATTEMPTS + 2  # area and ratio of every attempt, place down, place right
_LOADING = threading.Lock()
_loaded: list[ModuleType | None] = []


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

    As torch's bilinear resize with antialiasing has it, one by one; on CUDA the whole batch in one kernel, which may
    differ from it by one step of the 255.

    Args:
        images: B of uint8 `(3, height, width)`.
        boxes: `(B, 4)`, on the CPU.
        flips: `(B,)`, bool, on the CPU: which to mirror.
        size: Side of the output.
    """
    about = zip(images, boxes.tolist(), flips.tolist(), strict=True)
    if (device := images[0].device).type == "cpu":
        return torch.from_numpy(np.stack([_resize_on_cpu(image, box, flip, size) for image, box, flip in about]))
    kernel = _load_kernel(device) if device.type == "cuda" else None
    if kernel is None:
        return torch.stack([_resize(image, box, flip, size) for image, box, flip in about])
    batch: Tensor = kernel.resample(images, boxes, flips, size)
    return batch


def _load_kernel(device: torch.device) -> ModuleType | None:
    """`crop_kernel`, or None, told once, where Triton is missing or cannot compile for this device."""
    with _LOADING:
        if not _loaded:
            try:
                from collective_pipeline.data import crop_kernel  # noqa: PLC0415  # Triton comes with CUDA builds only

                crop_kernel.try_out(device)
                _loaded.append(crop_kernel)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton, its compiler and the driver each have errors of their own
                logger.warning("Triton cannot be used here (%s): images are cut one by one, which is slower.", error)
                _loaded.append(None)
    return _loaded[0]


def _resize(image: Tensor, box: Sequence[int], flip: bool, size: int) -> Tensor:
    """One image as torch resizes it, `(3, size, size)`."""
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width].float()
    resized = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    return resized.flip(-1) if flip else resized


def _resize_on_cpu(image: Tensor, box: Sequence[int], flip: bool, size: int) -> NDArray[np.uint8]:
    """`_resize` in less time.

    NumPy copies, because torch would copy with as many threads as there are cores in each of the threads that feed: on
    two busy cores that took twenty times as long.
    """
    top, left, height, width = box
    # Only with the channels last does torch resize bytes as they are.
    part = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[top : top + height, left : left + width])
    channels_last = torch.from_numpy(part).permute(2, 0, 1)[None]
    resized: NDArray[np.uint8] = F.interpolate(channels_last, (size, size), mode="bilinear", antialias=True)[0].numpy()
    return resized[..., ::-1] if flip else resized
