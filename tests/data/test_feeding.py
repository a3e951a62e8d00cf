"""Batches come in order, the same whatever makes them; bad files disturb nobody, and no thread stays behind."""

import logging
import threading
import time

import pytest
import torch
from tests.conftest import wait_until
from tests.data.test_jpeg import BAD, GOOD, encoded, smooth_image
from tests.data.test_packed import make_tree
from torchvision.transforms.v2 import functional

from collective_pipeline.config import UserError
from collective_pipeline.data.cropping import NUM_BOX_DRAWS, random_boxes
from collective_pipeline.data.feeding import NUM_CROP_DRAWS, Crop, Feed
from collective_pipeline.data.jpeg import decode
from collective_pipeline.data.packed import PackedImages, claim_folder, pack_images

CPU = torch.device("cpu")
SIZE = 24


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Forty images of all sizes and kinds, each with its row as its label."""
    images = [encoded(smooth_image(40 + row, 90 - 2 * row, seed=row)) for row in range(40 - len(GOOD))]
    return make_tree(tmp_path_factory.mktemp("tree"), images + list(GOOD.values()))


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())  # one of an earlier test may still be ending
    yield
    assert feeding_threads() <= before


def feeding_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("feed")}


def feed(source, **options):
    return Feed(source, **{"device": CPU, "image_size": SIZE, "num_threads": 3} | options)


def order(num_batches=5, size=8, num_images=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_images, generator=generator)[: num_batches * size].view(num_batches, size)


def draws_for(rows_KB, seed=0):
    return torch.rand(*rows_KB.shape, NUM_CROP_DRAWS, generator=torch.Generator().manual_seed(seed))


def bad_tree(folder, places, num_images=16):
    """Good images, and a bad one at each of these places."""
    bad = iter(list(BAD.values()) * 4)
    return make_tree(
        folder,
        [next(bad) if row in places else encoded(smooth_image(40, 50, seed=row)) for row in range(num_images)],
    )


def test_batches_are_the_images_asked_for_in_their_order(tree):
    """Cut as their own draws say, beside their own labels."""
    rows_KB = order()
    draws_KBD = draws_for(rows_KB)
    batches = list(feed(tree, crop=Crop(scale=(0.3, 0.9), flip=0.3)).batches(rows_KB, draws_KBD))

    assert len(batches) == len(rows_KB)
    for (images, labels), rows, draws in zip(batches, rows_KB, draws_KBD, strict=True):
        assert images.dtype == torch.uint8 and images.shape == (8, 3, SIZE, SIZE)
        assert torch.equal(labels, rows)
        for image, whole, draw in zip(images, decode(tree.read(rows.tolist())), draws, strict=True):
            size = torch.tensor([whole.shape[1:]])
            (box,) = random_boxes(draw[None, :NUM_BOX_DRAWS], size, scale=(0.3, 0.9)).tolist()
            wanted = functional.resized_crop(whole, *box, [SIZE, SIZE], antialias=True)
            wanted = wanted.flip(-1) if draw[-1] < 0.3 else wanted
            assert (image.int() - wanted.int()).abs().max() <= 1


def test_without_draws_the_middle_is_seen(tree):
    rows_KB = torch.tensor([[3, 5]])
    ((images, _),) = feed(tree, crop=Crop(centre=0.5)).batches(rows_KB, None)
    (whole,) = decode(tree.read([3]))  # 43 x 84

    wanted = functional.resized_crop(whole, 10, 31, 22, 22, [SIZE, SIZE], antialias=True)
    assert (images[0].int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("options", [{"num_threads": 1}, {"num_threads": 8}, {"ahead": 1}, {"ahead": 50}])
def test_threads_change_nothing(tree, options):
    rows_KB = order()
    draws_KBD = draws_for(rows_KB)
    plain, other = (list(feed(tree, **some).batches(rows_KB, draws_KBD)) for some in ({}, options))

    for (images, labels), (other_images, other_labels) in zip(plain, other, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_packed_images_feed_as_their_files(tree, tmp_path):
    """Those that are small enough are the same to the last bit."""
    pack_images(claim_folder(tree, tmp_path, side=400))
    rows_KB = order(num_images=40 - len(GOOD), num_batches=3)
    draws_KBD = draws_for(rows_KB)

    of_files, of_packed = (feed(some).batches(rows_KB, draws_KBD) for some in (tree, PackedImages.open(tmp_path)))
    for (images, labels), (packed_images, packed_labels) in zip(of_files, of_packed, strict=True):
        assert torch.equal(images, packed_images) and torch.equal(labels, packed_labels)


@pytest.mark.parametrize(
    ("bad", "seen"),
    [
        ({2}, [0, 1, 3, 3, 4, 5, 6, 7]),
        ({2, 3, 4}, [0, 1, 5, 5, 5, 5, 6, 7]),
        ({6, 7}, [0, 1, 2, 3, 4, 5, 0, 0]),
        ({0, 2, 7}, [1, 1, 3, 3, 4, 5, 6, 1]),
        ({0, 1, 2, 3, 4, 5, 7}, [6] * 8),
    ],
)
def test_the_next_good_image_of_its_batch_stands_for_a_bad_one(tmp_path, bad, seen):
    source = bad_tree(tmp_path, bad)
    one = feed(source, most_bad=len(bad), crop=Crop(scale=(1.0, 1.0), flip=0.0))
    middle_of_all = torch.full((2, 8, NUM_CROP_DRAWS), 0.5)
    (images, labels), (_, others) = one.batches(torch.arange(16).view(2, 8), middle_of_all)
    same = feed(source, crop=Crop(scale=(1.0, 1.0), flip=0.0))
    ((wanted, _),) = same.batches(torch.tensor([seen]), middle_of_all[:1])

    assert labels.tolist() == seen and others.tolist() == list(range(8, 16))
    assert torch.equal(images, wanted)
    assert one.num_bad == len(bad)


def test_bad_files_are_counted_and_named_once(tmp_path, caplog):
    source = bad_tree(tmp_path, {4, 1})
    (tmp_path / source.paths[9]).unlink()
    one = feed(source, most_bad=3)
    for _ in range(2):
        list(one.batches(torch.arange(16).view(2, 8), None))

    assert one.num_bad == 3
    assert [text.partition(": ")[0] for text in one.bad_files] == [source.name(row) for row in (1, 4, 9)]
    assert one.bad_files[2].endswith("b/9.JPEG: No such file or directory")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 3 and told[2].endswith(one.bad_files[2])


def test_too_many_bad_files_stop_the_feed(tmp_path):
    source = bad_tree(tmp_path, {1, 2, 9, 11, 14})
    one = feed(source, most_bad=4, num_files=4000)

    with pytest.raises(
        UserError,
        match=r"at least 5 image files cannot be read, where 4 of all 4,000 may.*/b/1.JPEG: .*; and 2 more\)",
    ):
        list(one.batches(torch.arange(16).view(2, 8), None))


def test_a_batch_without_any_image_stops_the_feed(tmp_path):
    source = bad_tree(tmp_path, {0, 1})

    with pytest.raises(UserError, match=r"no file of a batch of 2 is an image: .*/a/0.JPEG: "):
        list(feed(source, most_bad=2).batches(torch.tensor([[0, 1]]), torch.zeros(1, 2, NUM_CROP_DRAWS)))


class Watched:
    """A source that counts how many batches are read, and fails at one row if it is told to."""

    def __init__(self, source, fails_at=None):
        self.source = source
        self.fails_at = fails_at
        self.rows = []
        self.labels = source.labels

    def __len__(self):
        return len(self.source)

    def name(self, row):
        return self.source.name(row)

    def read(self, rows):
        self.rows += rows
        if self.fails_at in rows:
            raise MemoryError("no more")
        return self.source.read(rows)


def test_no_more_is_made_than_may_wait(tree):
    watched = Watched(tree)
    batches = feed(watched, ahead=3).batches(torch.arange(40).view(10, 4), None)
    assert watched.rows == []
    for num_taken in range(1, 5):
        next(batches)
        wait_until(lambda made=num_taken + 2: len(watched.rows) >= 4 * made)
        time.sleep(0.05)
        assert len(watched.rows) == 4 * (num_taken + 2)
    batches.close()


def test_closing_early_stops_the_threads(tree):
    before = feeding_threads()
    batches = feed(tree).batches(order(), None)
    next(batches)
    assert feeding_threads() - before
    batches.close()

    assert feeding_threads() <= before


def test_what_fails_in_a_thread_reaches_the_consumer_at_its_batch(tree):
    """Batches before it still come."""
    batches = feed(Watched(tree, fails_at=13)).batches(torch.arange(40).view(5, 8), None)
    assert torch.equal(next(batches)[1], torch.arange(8))
    with pytest.raises(MemoryError, match="no more"):
        next(batches)


def test_no_batches_are_no_batches(tree):
    assert list(feed(tree).batches(torch.zeros(0, 8, dtype=torch.int64), None)) == []


def test_batches_are_on_the_device_that_is_asked_for(tree):
    """Also where the CPU decodes for another kind of device than CUDA."""
    batches = feed(tree, device=torch.device("meta")).batches(order(), None)

    assert {tensor.device.type for batch in batches for tensor in batch} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_is_fed_what_the_cpu_is_fed(tree):
    """Also while the network's stream is busy."""
    rows_KB = order().repeat(6, 1)
    draws_KBD = draws_for(rows_KB)
    here = feed(tree).batches(rows_KB, draws_KBD)
    there = feed(tree, device=torch.device("cuda")).batches(rows_KB, draws_KBD)
    busy = torch.rand(2048, 2048, device="cuda")
    for (images, labels), (on_gpu, labels_on_gpu) in zip(here, there, strict=True):
        for _ in range(20):
            busy = busy @ busy / busy.norm()
        assert torch.equal(labels_on_gpu.cpu(), labels)
        assert (on_gpu.cpu().int() - images.int()).abs().float().mean() < 2
