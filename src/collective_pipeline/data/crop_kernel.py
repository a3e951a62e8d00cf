"""Parts of images of any sizes brought to one size by one kernel, for CUDA devices.

One by one they are some hundred small operations a batch, for which a network that trains beside them has to wait.
Suffixes: B images.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from collective_pipeline.data.cropping import DecodedImages

PIXELS_AT_ONCE = 256  # of a program


def resample(images: DecodedImages, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """As `cropping.resample`, for images on the device of the current stream, which must outlive what it does."""
    device = images.device
    strides_B3 = images.places_B5[:, 2:]
    corners_B = images.addresses_B + (boxes[:, :2] * strides_B3[:, 1:]).sum(dim=1)
    about_B7 = torch.cat([corners_B[:, None], strides_B3, boxes[:, 2:], flips[:, None]], dim=1)
    if device.type == "cuda":  # of other memory a copy makes the host wait for all that came before it
        about_B7 = about_B7.pin_memory().to(device, non_blocking=True)
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=device)
    grid = (len(images), triton.cdiv(size * size, PIXELS_AT_ONCE))
    _resample[grid](about_B7, out, size, BLOCK=PIXELS_AT_ONCE, num_warps=4)
    return out


def try_out(device: torch.device) -> None:
    """Compile the kernel and run it, so that a machine that cannot is known."""
    image = torch.zeros(3, 1, 1, dtype=torch.uint8, device=device)
    resample(DecodedImages.of([image]), torch.tensor([[0, 0, 1, 1]]), torch.tensor([False]), 1)
    torch.cuda.current_stream(device).synchronize()


@triton.jit(do_not_specialize=["size"])
def _resample(about, out, size, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    about += image * 7
    source = tl.load(about).to(tl.pointer_type(tl.uint8))
    stride_c, stride_y, stride_x = tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
    height, width, flip = tl.load(about + 4), tl.load(about + 5), tl.load(about + 6)
    y, x = pixel // size, pixel % size
    x = tl.where(flip != 0, size - 1 - x, x)
    # A triangle about the output pixel's centre that reaches one output or one input pixel, whichever is more.
    step_y, step_x = height.to(tl.float32) / size, width.to(tl.float32) / size
    reach_y, reach_x = tl.maximum(step_y, 1.0), tl.maximum(step_x, 1.0)
    centre_y, centre_x = (y + 0.5) * step_y, (x + 0.5) * step_x
    top, left = tl.floor(centre_y - reach_y).to(tl.int32), tl.floor(centre_x - reach_x).to(tl.int32)
    rows, columns = tl.ceil(2 * reach_y).to(tl.int32) + 1, tl.ceil(2 * reach_x).to(tl.int32) + 1

    red = tl.zeros([BLOCK], dtype=tl.float32)
    green = tl.zeros([BLOCK], dtype=tl.float32)
    blue = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(rows):
        row = top + i
        weight_y = 1 - tl.abs(row + 0.5 - centre_y) / reach_y
        weight_y = tl.where((row >= 0) & (row < height), tl.maximum(weight_y, 0.0), 0.0)
        for j in range(columns):
            column = left + j
            weight = 1 - tl.abs(column + 0.5 - centre_x) / reach_x
            weight = tl.where((column >= 0) & (column < width), tl.maximum(weight, 0.0), 0.0) * weight_y
            here = source + row * stride_y + column * stride_x
            inside = weight > 0
            red += weight * tl.load(here, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(here + stride_c, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(here + 2 * stride_c, mask=inside, other=0).to(tl.float32)
            total += weight
    place = out + image * 3 * size * size + pixel
    inside = pixel < size * size
    total = tl.where(inside, total, 1.0)
    tl.store(place, (red / total + 0.5).to(tl.uint8), mask=inside)
    tl.store(place + size * size, (green / total + 0.5).to(tl.uint8), mask=inside)
    tl.store(place + 2 * size * size, (blue / total + 0.5).to(tl.uint8), mask=inside)
