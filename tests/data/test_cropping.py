"""Parts of images are where they should be, and reach one size as torchvision would bring them there."""

import importlib.util

import numpy as np
import pytest
import torch
from tests.data.test_jpeg import smooth_image
from torchvision.transforms.v2 import functional

from collective_pipeline.data import cropping
from collective_pipeline.data.cropping import NUM_BOX_DRAWS, DecodedImages, centre_boxes, random_boxes, resample

triton_only = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")

SIZES = torch.tensor([[500, 375], [60, 80], [300, 1200], [33, 900], [1, 1]])


def draws(num_images, seed=0):
    return torch.rand(num_images, NUM_BOX_DRAWS, generator=torch.Generator().manual_seed(seed))


def images_of(sizes):
    return [torch.from_numpy(np.array(smooth_image(*size, seed=seed))).permute(2, 0, 1) for seed, size in sizes]


@pytest.fixture(scope="module")
def batch():
    """Images, boxes and flips of all relations between part and output: larger, smaller, much larger, narrow."""
    images = images_of(enumerate([(500, 375), (60, 80), (400, 1600), (901, 1033), (90, 700), (64, 64)]))
    boxes = torch.tensor(
        [[13, 50, 301, 277], [0, 0, 60, 80], [0, 0, 400, 1600], [1, 2, 899, 1030], [9, 5, 10, 690], [3, 4, 40, 50]]
    )
    return DecodedImages.of(images), boxes, torch.tensor([False, True, True, False, False, True])


def one_by_one(images, boxes, flips, size):
    """As devices without the kernel do."""
    about = zip(images.one_by_one(), boxes.tolist(), flips.tolist(), strict=True)
    return torch.stack([cropping._resize(image, box, flip, size) for image, box, flip in about])


@pytest.mark.parametrize("cut", [resample, one_by_one])
@pytest.mark.parametrize("size", [224, 64])
def test_it_is_torchvisions_antialiased_resize(batch, cut, size):
    images, boxes, flips = batch
    seen = cut(images, boxes, flips, size)

    assert seen.dtype == torch.uint8 and seen.shape == (len(images), 3, size, size) and seen.is_contiguous()
    for image, box, flip, here in zip(images.one_by_one(), boxes.tolist(), flips.tolist(), seen, strict=True):
        wanted = functional.resized_crop(image.float(), *box, [size, size], antialias=True)
        wanted = wanted.flip(-1) if flip else wanted
        assert (here - wanted).abs().max() < 4
        assert (here - wanted).abs().mean() < 0.6


def test_fine_stripes_become_grey():
    """Seen at an eighth of their size they have nothing of their own left."""
    image = (255 * (torch.arange(512) % 2)).to(torch.uint8).expand(3, 512, 512).contiguous()
    for cut in (resample, one_by_one):
        seen = cut(DecodedImages.of([image]), torch.tensor([[0, 0, 512, 512]]), torch.tensor([False]), 64)
        assert (seen.float() - 127.5).abs().max() < 6


@triton_only
@pytest.mark.parametrize("size", [5, 24])
def test_the_kernel_resizes_as_torch_does(size):
    """Parts of all relations to the output, mirrored or not, of images with the channels first or last."""
    from collective_pipeline.data import crop_kernel  # noqa: PLC0415  # Triton comes with CUDA builds only

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = images_of(enumerate([(40, 50), (70, 30), (17, 23), (5, 90), (8, 9)]))
    images = [image.contiguous() if row % 2 else image for row, image in enumerate(images)]
    boxes = torch.tensor([[0, 0, 40, 50], [10, 3, 60, 20], [2, 2, 3, 4], [0, 30, 5, 60], [7, 8, 1, 1]])
    flips = torch.tensor([False, True, True, False, True])
    seen = crop_kernel.resample(DecodedImages.of([image.to(device) for image in images]), boxes, flips, size).cpu()

    wanted = one_by_one(DecodedImages.of(images), boxes, flips, size)
    assert seen.shape == wanted.shape and seen.dtype == torch.uint8
    assert (seen.int() - wanted.int()).abs().max() <= 1


def test_images_are_found_wherever_they_lie():
    """Side by side in one piece of memory, or alone, with channels first or last; also some of them, in any order."""
    two, side_by_side = images_of([(0, (3, 4)), (1, (5, 2))]), torch.arange(100, dtype=torch.uint8)
    inside = [side_by_side[10:34].view(3, 2, 4), side_by_side[40:58].view(3, 3, 2)]
    all_of_them = [inside[0], *two, inside[1], two[0].contiguous()]
    images = DecodedImages.none(6).put(dict(enumerate(all_of_them[:3]))).put({3: all_of_them[3], 5: all_of_them[4]})

    assert images.sizes_B2.tolist() == [[2, 4], [3, 4], [5, 2], [3, 2], [0, 0], [3, 4]]
    some = images.take(torch.tensor([5, 3, 0, 0]))
    assert some.addresses_B.tolist() == [all_of_them[i].data_ptr() for i in (4, 3, 0, 0)]
    for image, i in zip(some.one_by_one(), (4, 3, 0, 0), strict=True):
        assert torch.equal(image, all_of_them[i]) and image.data_ptr() == all_of_them[i].data_ptr()


def test_random_boxes_are_inside_and_as_large_as_asked():
    sizes = SIZES.repeat(2000, 1)
    boxes = random_boxes(draws(len(sizes)), sizes, scale=(0.25, 1.0))
    ends = boxes[:, :2] + boxes[:, 2:]

    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all() and (ends <= sizes).all()
    usual = boxes[::5, 2:].double()
    share = usual.prod(dim=1) / sizes[::5].prod(dim=1)
    ratio = usual[:, 1] / usual[:, 0]
    assert 0.24 < share.min() < 0.27 and 0.93 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    # Everywhere, the ends included.
    assert boxes[::5, 0].min() == 0 and (ends == sizes)[::5].any(dim=0).all()


def test_a_random_box_is_uniform_in_its_place():
    sizes = torch.tensor([[100, 100]]).repeat(20_000, 1)
    boxes = random_boxes(draws(len(sizes)), sizes, scale=(0.25, 0.25), ratio=(1.0, 1.0))

    assert boxes[:, 2:].unique().tolist() == [50]
    counts = torch.bincount(boxes[:, 0], minlength=51)
    assert len(counts) == 51 and counts.min() > 300 and counts.max() < 500


def test_an_image_that_no_attempt_fits_shows_its_middle():
    boxes = random_boxes(draws(2), torch.tensor([[30, 3000], [3000, 30]]), scale=(0.9, 1.0))

    assert boxes.tolist() == [[0, 1480, 30, 40], [1480, 0, 40, 30]]


def test_boxes_follow_from_their_draws_alone():
    sizes = SIZES.repeat(4, 1)
    all_at_once = random_boxes(draws(20), sizes, scale=(0.08, 1.0))
    halves = [random_boxes(draws(20)[part], sizes[part], scale=(0.08, 1.0)) for part in (slice(7), slice(7, None))]

    assert torch.equal(all_at_once, torch.cat(halves))
    assert not torch.equal(all_at_once, random_boxes(draws(20, seed=1), sizes, scale=(0.08, 1.0)))


def test_the_middle_is_the_middle():
    assert centre_boxes(torch.tensor([[256, 256], [256, 512], [400, 300], [1, 9]]), 0.875).tolist() == [
        [16, 16, 224, 224],
        [16, 144, 224, 224],
        [69, 19, 262, 262],
        [0, 4, 1, 1],
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("size", [224, 64])
def test_the_gpu_sees_what_the_cpu_sees(batch, size):
    images, boxes, flips = batch
    there = resample(DecodedImages.of([image.cuda() for image in images.one_by_one()]), boxes, flips, size).cpu()

    assert (there.int() - resample(images, boxes, flips, size).int()).abs().max() <= 1
