"""What a training step does between its matrix products, each as one kernel for CUDA devices.

With weights this small a step is bound by the number of kernels and by passes over the features, not by arithmetic.
`fuse` and `fuse_batches` put these kernels in place of the modules' own forward passes, which define what is computed
and which every other device uses. No autotuning: the same configuration in every process, so that a resumed run
rounds as the unbroken one did.

Suffixes as in `models.layers`; P pixels of an image, W 64-bit words of random bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from collective_pipeline.data.batches import Batches
from collective_pipeline.models.layers import BN_EPSILON, BN_MOMENTUM, BatchNorm, FanOut, bits_below
from collective_pipeline.models.mlp import HiddenLayer
from collective_pipeline.training.dropout_bits import DropoutBits

# All images of a batch stand in one program's registers.
MAX_BATCH = 2048
COLUMNS = 16
# Widths and strides are handed over in units of as many numbers, so that the compiler knows that rows start where wide
# loads may; and as plain numbers, so that it compiles a kernel once and not for every kind of width (0.5 s each).
UNIT = 8
PLAIN = ("num_members", "batch", "dim", "stride_s", "stride_n", "stride_b")
GOLDEN_RATIO = tl.constexpr(-7046029254386353131)  # 2^64 / golden ratio, the increment of SplitMix64


def fuse(network: nn.Module) -> None:
    """Let every normalised hidden layer of `network` that trains work with fused kernels."""
    for module in network.modules():
        if isinstance(module, HiddenLayer) and module.norm is not None:
            layer = FusedHiddenLayer(module, module.norm)
            module.__dict__["forward"] = layer


class FusedHiddenLayer:
    """The forward pass of a `HiddenLayer`: one matrix product, then one kernel."""

    def __init__(self, layer: HiddenLayer, norm: BatchNorm) -> None:
        self.layer = layer
        self.norm = norm

    def __call__(self, x_SNBI: Tensor) -> Tensor:
        layer, norm = self.layer, self.norm
        if not norm.training or x_SNBI.shape[2] > MAX_BATCH:
            return HiddenLayer.forward(layer, x_SNBI)
        y_SNBO = layer.linear.product(x_SNBI)
        skipped = None if layer.skip is None else layer.skip(x_SNBI).expand_as(y_SNBO)
        bits, rate = None, 0.0
        if layer.dropout.training and layer.dropout.draw is not None:
            bits, rate = layer.dropout.draw(y_SNBO), layer.dropout.rate
        bias = layer.linear.linear.bias if isinstance(layer.linear, FanOut) else layer.linear.bias
        finished: Tensor = _Finish.apply(
            y_SNBO, bias, norm.weight, norm.bias, skipped, bits, rate, norm.running_mean, norm.running_var
        )
        return finished


class _Finish(torch.autograd.Function):
    """dropout(relu(norm(y + bias) + skip)) of `(S, N, B, D)`; the statistics are updated on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        bias: Tensor,
        weight: Tensor,
        shift: Tensor,
        skip: Tensor | None,
        bits: Tensor | None,
        rate: float,
        running_mean: Tensor,
        running_var: Tensor,
    ) -> Tensor:
        num_seeds, num_members, batch, dim = y.shape
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        mean = torch.empty(num_seeds, num_members, dim, device=y.device)
        rstd = torch.empty_like(mean)
        skip = None if skip is None else skip.contiguous()
        grid, unit = (num_seeds * num_members, triton.cdiv(dim, COLUMNS)), _unit(y)
        _finish_forward[grid](
            y, bias, weight, shift, skip, bits, running_mean, running_var, out, mean, rstd,
            num_members, batch, *_in_units(y, unit), 0 if bits is None else bits.stride(0),
            bits_below(rate), 1 / (1 - rate), BN_EPSILON, BN_MOMENTUM,
            UNIT=unit, HAS_SKIP=skip is not None, HAS_BITS=bits is not None,
            ROWS=triton.next_power_of_2(batch), COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(y, bias, weight, mean, rstd, out)
        ctx.scale, ctx.has_skip = 1 / (1 - rate), skip is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        y, bias, weight, mean, rstd, out = ctx.saved_tensors
        num_seeds, num_members, batch, dim = y.shape
        grad_out = grad_out.contiguous()
        grad_y = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)
        grad_bias, grad_weight, grad_shift = (torch.empty_like(tensor) for tensor in (bias, weight, weight))
        grad_skip = torch.empty_like(out) if ctx.has_skip else None
        grid, unit = (num_seeds * num_members, triton.cdiv(dim, COLUMNS)), _unit(y)
        _finish_backward[grid](
            y, bias, weight, mean, rstd, out, grad_out, grad_y, grad_bias, grad_weight, grad_shift, grad_skip,
            num_members, batch, *_in_units(y, unit), ctx.scale,
            UNIT=unit, HAS_SKIP=ctx.has_skip, ROWS=triton.next_power_of_2(batch), COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        return grad_y, grad_bias, grad_weight, grad_shift, grad_skip, None, None, None, None


def _unit(y: Tensor) -> int:
    return 1 if any(size % UNIT for size in (y.shape[-1], *y.stride()[:3])) else UNIT


def _in_units(y: Tensor, unit: int) -> list[int]:
    return [size // unit for size in (y.shape[-1], *y.stride()[:3])]


@triton.jit(do_not_specialize=[*PLAIN, "bits_stride_s", "threshold"])
def _finish_forward(
    y, bias, weight, shift, skip, bits, running_mean, running_var, out, mean, rstd,
    num_members, batch, dim, stride_s, stride_n, stride_b, bits_stride_s, threshold, scale, epsilon, momentum,
    UNIT: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dim, stride_s, stride_n, stride_b = dim * UNIT, stride_s * UNIT, stride_n * UNIT, stride_b * UNIT
    pair = tl.program_id(0).to(tl.int64)
    seed, member = pair // num_members, pair % num_members
    rows, columns = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < dim
    here = (rows < batch) & in_columns[None, :]
    channel = pair * dim + columns
    place = pair * batch * dim + rows * dim + columns[None, :]

    x = tl.load(y + seed * stride_s + member * stride_n + rows * stride_b + columns[None, :], mask=here, other=0.0)
    x = x.to(tl.float32) + tl.load(bias + channel, mask=in_columns, other=0.0)[None, :]
    average = tl.sum(tl.where(here, x, 0.0), axis=0) / batch
    centred = tl.where(here, x - average[None, :], 0.0)
    variance = tl.sum(centred * centred, axis=0) / batch
    inverse = 1 / tl.sqrt(variance + epsilon)
    tl.store(mean + channel, average, mask=in_columns)
    tl.store(rstd + channel, inverse, mask=in_columns)
    old = tl.load(running_mean + channel, mask=in_columns, other=0.0)
    tl.store(running_mean + channel, old + momentum * (average - old), mask=in_columns)
    old = tl.load(running_var + channel, mask=in_columns, other=0.0)
    tl.store(running_var + channel, old + momentum * (variance * batch / (batch - 1) - old), mask=in_columns)

    gain = tl.load(weight + channel, mask=in_columns, other=0.0) * inverse
    z = centred * gain[None, :] + tl.load(shift + channel, mask=in_columns, other=0.0)[None, :]
    if HAS_SKIP:
        z += tl.load(skip + place, mask=here, other=0.0).to(tl.float32)
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as relu does, or a loss that is NaN would go unseen
    if HAS_BITS:
        drawn = tl.load(bits + seed * bits_stride_s + member * batch * dim + rows * dim + columns[None, :],
                        mask=here, other=0)  # fmt: skip
        z = tl.where(drawn.to(tl.int32) >= threshold, z * scale, 0.0)
    tl.store(out + place, z, mask=here)


@triton.jit(do_not_specialize=PLAIN)
def _finish_backward(
    y, bias, weight, mean, rstd, out, grad_out, grad_y, grad_bias, grad_weight, grad_shift, grad_skip,
    num_members, batch, dim, stride_s, stride_n, stride_b, scale,
    UNIT: tl.constexpr, HAS_SKIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dim, stride_s, stride_n, stride_b = dim * UNIT, stride_s * UNIT, stride_n * UNIT, stride_b * UNIT
    pair = tl.program_id(0).to(tl.int64)
    seed, member = pair // num_members, pair % num_members
    rows, columns = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < dim
    here = (rows < batch) & in_columns[None, :]
    channel = pair * dim + columns
    place = pair * batch * dim + rows * dim + columns[None, :]
    strided = seed * stride_s + member * stride_n + rows * stride_b + columns[None, :]

    # What came out as more than 0 is what neither ReLU nor dropout stopped.
    passed = tl.load(out + place, mask=here, other=0.0) > 0
    grad = tl.where(passed, tl.load(grad_out + place, mask=here, other=0.0).to(tl.float32) * scale, 0.0)
    if HAS_SKIP:
        tl.store(grad_skip + place, grad, mask=here)
    x = tl.load(y + strided, mask=here, other=0.0).to(tl.float32)
    x += tl.load(bias + channel, mask=in_columns, other=0.0)[None, :]
    inverse = tl.load(rstd + channel, mask=in_columns, other=0.0)
    normal = (x - tl.load(mean + channel, mask=in_columns, other=0.0)[None, :]) * inverse[None, :]
    normal = tl.where(here, normal, 0.0)
    of_weight, of_shift = tl.sum(grad * normal, axis=0), tl.sum(grad, axis=0)
    tl.store(grad_weight + channel, of_weight, mask=in_columns)
    tl.store(grad_shift + channel, of_shift, mask=in_columns)
    gain = tl.load(weight + channel, mask=in_columns, other=0.0) * inverse
    grad = (grad - (of_shift[None, :] + normal * of_weight[None, :]) / batch) * gain[None, :]
    grad = tl.where(here, grad, 0.0)
    tl.store(grad_bias + channel, tl.sum(grad, axis=0), mask=in_columns)
    tl.store(grad_y + strided, grad, mask=here)


class FusedBits(DropoutBits):
    """All bits of a step by one kernel: SplitMix64 of a key for each seed, the step, and the place of the word.

    A generator for each seed would be a kernel for each, and its state could not be advanced inside a CUDA graph.
    """

    def draw(self, step: Tensor) -> None:
        """Fill the bits of this step, an int64 tensor of one element."""
        num_words = self.words_SW.shape[1]
        if num_words:
            grid = (triton.cdiv(num_words, 1024), len(self.words_SW))
            _draw_bits[grid](self.words_SW, self.keys_S, step, num_words, BLOCK=1024, num_warps=4)


def try_out(device: torch.device) -> None:
    """Compile and run the smallest kernel, so that a machine that cannot is known before training begins."""
    words = torch.zeros(1, 1, dtype=torch.int64, device=device)
    _draw_bits[(1, 1)](words, words.flatten(), words.flatten(), 1, BLOCK=1024, num_warps=4)
    torch.accelerator.synchronize(device)


@triton.jit
def _draw_bits(words, keys, step, num_words, BLOCK: tl.constexpr):
    seed = tl.program_id(1)
    word = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    counter = tl.load(step) * num_words + word + 1
    z = (tl.load(keys + seed) + counter * GOLDEN_RATIO).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    tl.store(words + seed.to(tl.int64) * num_words + word, z.to(tl.int64, bitcast=True), mask=word < num_words)


def fuse_batches(batches: Batches) -> None:
    """Let `batches` gather, move and normalise its images in one kernel."""
    batches.__dict__["cut"] = FusedCut(batches)


class FusedCut:
    """`Batches.cut` in one kernel: from the images' bytes to features, without anything in between."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __call__(self, index_SB: Tensor, draws_SBD: Tensor | None) -> Tensor:
        batches = self.batches
        images, recipe, strength = batches.train.images, batches.recipe, batches.strength
        channels, height, width = images.shape[1:]
        x_SBI = torch.empty(*index_SB.shape, channels * height * width, device=images.device)
        crop = round(recipe.crop_padding * strength)
        num_draws, cutout = batches.num_draws, batches.cutout
        degree = 3.141592653589793 / 180
        _cut[(index_SB.numel(), channels)](
            images, index_SB, draws_SBD, batches.normalise.mean, batches.normalise.scale, x_SBI,
            degree * recipe.degrees * strength, recipe.translate * strength, recipe.scale * strength,
            crop, 0.5 * min(strength, 1.0) * recipe.flip, num_draws,
            MOVE=draws_SBD is not None, CUTOUT=cutout, CHANNELS=channels, HEIGHT=height, WIDTH=width,
            BLOCK=triton.next_power_of_2(height * width), num_warps=4,
        )  # fmt: skip
        return x_SBI


@triton.jit
def _cut(
    images, index, draws, mean, scale, out, radians, translate, zoom, crop, flip_chance, num_draws,
    MOVE: tl.constexpr, CUTOUT: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = tl.arange(0, BLOCK)
    source = images + (tl.load(index + image) * CHANNELS + channel) * HEIGHT * WIDTH
    if MOVE:
        # As `augment._sampling_grid`, in pixels: mirror . turn . (position - shift) / scale, about the centre.
        drawn = draws + image * num_draws
        angle = radians * (2 * tl.load(drawn) - 1)
        size = 1 + zoom * (2 * tl.load(drawn + 3) - 1)
        shift_x = tl.floor((2 * crop + 1) * tl.load(drawn + 4)) - crop
        shift_y = tl.floor((2 * crop + 1) * tl.load(drawn + 5)) - crop
        shift_x += translate * WIDTH * (2 * tl.load(drawn + 1) - 1)
        shift_y += translate * HEIGHT * (2 * tl.load(drawn + 2) - 1)
        mirror = tl.where(tl.load(drawn + 6) < flip_chance, -1.0, 1.0)
        x = (pixel % WIDTH).to(tl.float32) - (WIDTH - 1) / 2 - shift_x
        y = (pixel // WIDTH).to(tl.float32) - (HEIGHT - 1) / 2 - shift_y
        cos, sin = tl.cos(angle) / size, tl.sin(angle) / size
        from_x = mirror * (cos * x + sin * y) + (WIDTH - 1) / 2
        from_y = cos * y - sin * x + (HEIGHT - 1) / 2
        left, top = tl.floor(from_x), tl.floor(from_y)
        part_x, part_y = from_x - left, from_y - top
        column, row = left.to(tl.int32), top.to(tl.int32)
        value = tl.zeros([BLOCK], dtype=tl.float32)
        for corner in tl.static_range(4):
            c, r = column + corner % 2, row + corner // 2
            inside = (c >= 0) & (c < WIDTH) & (r >= 0) & (r < HEIGHT) & (pixel < HEIGHT * WIDTH)
            share_x = part_x if corner % 2 else 1 - part_x
            share_y = part_y if corner // 2 else 1 - part_y
            value += share_x * share_y * tl.load(source + r * WIDTH + c, mask=inside, other=0).to(tl.float32)
    else:
        value = tl.load(source + pixel, mask=pixel < HEIGHT * WIDTH, other=0).to(tl.float32)
    value = (value - tl.load(mean + channel)) * tl.load(scale + channel)
    if CUTOUT:
        # As `augment.cut_out`; the draws are behind the others.
        x = pixel % WIDTH - tl.floor(tl.load(drawn + num_draws - 2) * WIDTH).to(tl.int32) + CUTOUT // 2
        y = pixel // WIDTH - tl.floor(tl.load(drawn + num_draws - 1) * HEIGHT).to(tl.int32) + CUTOUT // 2
        value = tl.where((x >= 0) & (x < CUTOUT) & (y >= 0) & (y < CUTOUT), 0.0, value)
    tl.store(out + (image * CHANNELS + channel) * HEIGHT * WIDTH + pixel, value, mask=pixel < HEIGHT * WIDTH)
