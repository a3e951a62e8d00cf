"""Which part of an image of any size is seen, and all parts of a batch brought to one size on the device.

Suffixes: B images, A attempts.
A box is `(top, left, height, width)` in whole pixels, inside its image.
"""

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Self

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


@dataclass(frozen=True)
class DecodedImages:
    """Images of any sizes on one device, each somewhere in one of several pieces of memory.

    Attributes:
        memory: The pieces, uint8.
        places_B5: int64, on the CPU: the number of its piece, where in that it begins, and how far apart channels, rows
            and columns are.
        sizes_B2: int64, on the CPU: heights and widths; 0 where there is no image.
    """

    memory: tuple[Tensor, ...]
    places_B5: Tensor
    sizes_B2: Tensor

    @classmethod
    def none(cls, number: int) -> Self:
        """Nothing in as many places."""
        return cls((), torch.zeros(number, 5, dtype=torch.int64), torch.zeros(number, 2, dtype=torch.int64))

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> Self:
        """These, `(3, height, width)` each."""
        return cls.none(len(images)).put(dict(enumerate(images)))

    def put(self, images: Mapping[int, Tensor]) -> Self:
        """The same with other ones, `(3, height, width)` each, in some places."""
        if not images:
            return self
        places_B5, sizes_B2, rows = self.places_B5.clone(), self.sizes_B2.clone(), list(images)
        about = [(piece, image.storage_offset(), *image.stride()) for piece, image in enumerate(images.values())]
        places_B5[rows] = torch.tensor(about) + torch.tensor([len(self.memory), 0, 0, 0, 0])
        sizes_B2[rows] = torch.tensor([image.shape[1:] for image in images.values()])
        return replace(self, memory=(*self.memory, *images.values()), places_B5=places_B5, sizes_B2=sizes_B2)

    def take(self, rows: Tensor | slice) -> Self:
        """Some of them."""
        return replace(self, places_B5=self.places_B5[rows], sizes_B2=self.sizes_B2[rows])

    def __len__(self) -> int:
        return len(self.places_B5)

    @property
    def device(self) -> torch.device:
        return self.memory[0].device

    @property
    def addresses_B(self) -> Tensor:
        """Of the first value of each, int64, on the CPU."""
        pieces = torch.tensor([piece.untyped_storage().data_ptr() for piece in self.memory])
        return pieces[self.places_B5[:, 0]] + self.places_B5[:, 1]

    def one_by_one(self) -> list[Tensor]:
        """Each as `(3, height, width)`, where it lies."""
        about = zip(self.places_B5.tolist(), self.sizes_B2.tolist(), strict=True)
        return [self.memory[piece].as_strided((3, *size), strides, first) for (piece, first, *strides), size in about]


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


def resample(images: DecodedImages, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """The parts of B images, at least one, as one uint8 batch `(B, 3, size, size)` on their device.

    As torch's bilinear resize with antialiasing has it, one by one; on CUDA the whole batch in one kernel, which may
    differ from it by one step of the 255.

    Args:
        images: Of any sizes.
        boxes: `(B, 4)`, on the CPU.
        flips: `(B,)`, bool, on the CPU: which to mirror.
        size: Side of the output.
    """
    device = images.device
    if device.type == "cuda" and (kernel := _load_kernel(device)) is not None:
        batch: Tensor = kernel.resample(images, boxes, flips, size)
        return batch
    about = zip(images.one_by_one(), boxes.tolist(), flips.tolist(), strict=True)
    if device.type == "cpu":
        return torch.from_numpy(np.stack([_resize_on_cpu(image, box, flip, size) for image, box, flip in about]))
    return torch.stack([_resize(image, box, flip, size) for image, box, flip in about])


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
