"""Planes, rows and files are where the library is told that they are, and what it refuses harms nothing else."""

import contextlib
import ctypes

import pytest
import torch
from tests.data.test_jpeg import BAD, GOOD, decode_there, encoded, smooth_image
from tests.data.test_packed import make_tree
from torch import Tensor

from collective_pipeline.data import feeding, jpeg, nvjpeg, packed
from collective_pipeline.data.feeding import NUM_CROP_DRAWS, Feed
from collective_pipeline.data.jpeg import Files, Problem, decode
from collective_pipeline.data.packed import PackedImages, claim_folder, pack_images

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = [(60, 80), (33, 47), (64, 64), (21, 100)]
FILES = [encoded(smooth_image(*size, seed=row)) for row, size in enumerate(SIZES)]
LOW = encoded(smooth_image(10, 90))
REFUSED = 4


def table(address, rows, columns):
    return torch.frombuffer((ctypes.c_uint64 * (rows * columns)).from_address(address), dtype=torch.int64).view(
        rows, columns
    )


def read(address, length):
    return decode([ctypes.string_at(address, length)])[0]


class Library:
    """nvJPEG as nvjpeg.h has it, in the memory of the host. It does not support images of less than 20 rows."""

    def __init__(self):
        self.lists = []

    def create(self, *arguments):
        return 0

    def begin(self, handle, state, number, threads, output):
        self.lists.append(number)
        return 0

    def parse(self, handle, address, length, header):
        self.parsed = read(address, length)
        return 0

    def answer(self, handle, header, supported):
        supported._obj.value = int(self.parsed.shape[1] < 20)
        return 0

    def decode(self, handle, state, files, lengths, images, stream):
        number = self.lists[-1]
        pairs = zip(table(files, number, 1).tolist(), table(lengths, number, 1).tolist(), strict=True)
        decoded = [read(address, length) for (address,), (length,) in pairs]
        if any(image.shape[1] < 20 for image in decoded):
            return REFUSED
        for image, row in zip(decoded, table(images, number, 8).tolist(), strict=True):
            for plane, address, pitch in zip(image, row[:3], row[4:7], strict=True):
                for y, line in enumerate(plane.contiguous()):
                    ctypes.memmove(address + y * pitch, line.data_ptr(), len(line))
        return 0

    nvjpegCreateEx = nvjpegJpegStateCreate = nvjpegJpegStreamCreate = create
    nvjpegJpegStreamParseHeader, nvjpegDecodeBatchedSupported = parse, answer
    nvjpegDecodeBatchedInitialize, nvjpegDecodeBatched = begin, decode


@pytest.fixture
def library(monkeypatch):
    """In place of the card's; its memory is the host's."""
    monkeypatch.setattr(nvjpeg, "_wait_for", lambda stream: None)
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return Library()


def decode_by(decoder, files):
    """Images, and None where there is none."""
    arrays = Files.of(files)
    memory, starts, are_there = decoder.decode(arrays.addresses_B, arrays.lengths_B, arrays.sizes_B2, CPU)
    about = zip(starts.tolist(), arrays.sizes_B2.tolist(), are_there.tolist(), strict=True)
    return [
        memory[start : start + 3 * height * width].view(3, height, width) if is_there else None
        for start, (height, width), is_there in about
    ]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_image_is_written_where_it_is_read(library, kind):
    images = decode_by(nvjpeg.Decoder(library), [kind(file) for file in FILES])

    assert library.lists == [4]
    for image, file in zip(images, FILES, strict=True):
        assert torch.equal(image, decode([file])[0])


def test_it_is_prepared_again_for_lists_of_another_length_alone(library):
    decoder = nvjpeg.Decoder(library)
    for number in (4, 4, 2, 2, 4):
        assert len(decode_by(decoder, FILES[:number])) == number

    assert library.lists == [4, 2, 4]


def test_what_it_does_not_support_is_found_and_left_to_others(library):
    """With one more list, not one for every file."""
    files = [FILES[0], LOW, *FILES[1:]]
    images = decode_by(nvjpeg.Decoder(library), files)

    assert library.lists == [5, 4] and images[1] is None
    for row in (0, 2, 3, 4):
        assert torch.equal(images[row], decode([files[row]])[0])


def test_what_it_refuses_though_it_should_not_is_left_to_others(library, monkeypatch):
    """And it is prepared anew after that."""
    decoder = nvjpeg.Decoder(library)
    with monkeypatch.context() as refusing:
        refusing.setattr(Library, "nvjpegDecodeBatched", lambda *_: REFUSED)
        assert decode_by(decoder, FILES) == [None] * 4
        assert decode_by(decoder, [LOW, LOW]) == [None] * 2
    assert None not in decode_by(decoder, FILES) and library.lists == [4, 2, 4]


class OnHost(nvjpeg.Decoder):
    """Whose card has the memory of the host."""

    def decode(self, addresses_B, lengths_B, sizes_B2, device):
        return super().decode(addresses_B, lengths_B, sizes_B2, CPU)


@pytest.fixture
def card(library, monkeypatch):
    """One with units for JPEG, whose library is `library` for the first thread; lists of torchvision are counted."""
    by_torchvision, libraries = [], [library]

    def decode_by_torchvision(files, device):
        by_torchvision.append(len(files))
        return [decode([file.numpy().tobytes()])[0] for file in files]

    monkeypatch.setattr(nvjpeg, "_make", lambda device: OnHost(libraries.pop() if libraries else Library()))
    monkeypatch.setattr(nvjpeg, "_idle", {})
    monkeypatch.setattr(jpeg, "_decode_by_torchvision", decode_by_torchvision)
    monkeypatch.setattr(jpeg, "_to_device", lambda image, device: image)
    return by_torchvision


def test_usual_files_go_there_and_the_others_to_torchvision(library, card):
    files = [*FILES, Problem("gone"), *GOOD.values(), LOW, *BAD.values()]
    images = decode_there(files)

    assert library.lists == [7, 6]
    assert card == [3]  # LOW, a progressive and a grey one; PNG and the like go to neither
    for image, file in zip(images, files, strict=True):
        (wanted,) = decode([file])
        assert image == wanted if isinstance(wanted, Problem) else torch.equal(image, wanted)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_feed_of_a_gpu_gives_the_batches_of_the_cpu(card, tmp_path, monkeypatch, is_packed):
    """Of both kinds of sources, with bad files among the good ones, in several threads."""
    monkeypatch.setattr(feeding, "_streams_of", lambda device: None)
    monkeypatch.setattr(Feed, "_make", Feed._cut)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor)
    files = [*FILES, BAD["half of it"], *GOOD.values(), b"", LOW, *FILES]
    source = make_tree(tmp_path / "tree", files)
    if is_packed:
        monkeypatch.setattr(packed, "MAX_UNUSABLE", 0.5)
        pack_images(claim_folder(source, tmp_path / "packed", side=400))
        source = PackedImages.open(tmp_path / "packed")
    rows_KB = torch.arange(len(source)).repeat(8).view(-1, 8)
    draws_KBD = torch.rand(*rows_KB.shape, NUM_CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    here, there = (Feed(source, device=device, image_size=24, most_bad=2) for device in (CPU, CUDA))
    for draws in (draws_KBD, None):
        batches = zip(here.batches(rows_KB, draws), there.batches(rows_KB, draws), strict=True)
        assert all(torch.equal(one, other) for pair in batches for one, other in zip(*pair, strict=True))
    assert here.bad_files == there.bad_files and here.num_bad == (0 if is_packed else 2)


def test_a_card_without_such_units_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(Library, "nvjpegCreateEx", lambda *_: 7)
    monkeypatch.setattr(nvjpeg, "_load_library", Library)
    monkeypatch.setattr(nvjpeg, "_without", set())
    monkeypatch.setattr(nvjpeg, "_idle", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with caplog.at_level("INFO"):
        for _ in range(2):
            with nvjpeg.borrow(CUDA) as decoder:
                assert decoder is None

    assert caplog.text.count("nvJPEG's units cannot be used (nvjpegCreateEx says 7)") == 1


def test_a_decoder_is_nobody_elses_meanwhile(library, monkeypatch):
    monkeypatch.setattr(nvjpeg, "_make", lambda device: nvjpeg.Decoder(library))
    monkeypatch.setattr(nvjpeg, "_idle", {})
    with nvjpeg.borrow(CPU) as one, nvjpeg.borrow(CPU) as other:
        assert one is not other
    with nvjpeg.borrow(CPU) as again:
        assert again in {one, other}
