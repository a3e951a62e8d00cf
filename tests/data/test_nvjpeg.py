"""Planes, rows and files are where the library is told that they are, and what it refuses harms nothing else."""

import contextlib
import ctypes

import pytest
import torch
from tests.data.test_jpeg import BAD, GOOD, encoded, smooth_image

from collective_pipeline.data import jpeg, nvjpeg
from collective_pipeline.data.jpeg import Problem, decode

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
    return decode([ctypes.string_at(address, length)], CPU)[0]


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


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_image_is_written_where_it_is_read(library, kind):
    images = nvjpeg.Decoder(library).decode([kind(file) for file in FILES], SIZES, CPU)

    assert library.lists == [4]
    for image, file in zip(images, FILES, strict=True):
        assert torch.equal(image, decode([file], CPU)[0])
    assert nvjpeg.Decoder(library).decode([], [], CPU) == [] and library.lists == [4]


def test_it_is_prepared_again_for_lists_of_another_length_alone(library):
    decoder = nvjpeg.Decoder(library)
    for number in (4, 4, 2, 2, 4):
        assert len(decoder.decode(FILES[:number], SIZES[:number], CPU)) == number

    assert library.lists == [4, 2, 4]


def test_what_it_does_not_support_is_found_and_left_to_others(library):
    """With one more list, not one for every file."""
    files, sizes = [FILES[0], LOW, *FILES[1:]], [SIZES[0], (10, 90), *SIZES[1:]]
    images = nvjpeg.Decoder(library).decode(files, sizes, CPU)

    assert library.lists == [5, 4] and images[1] is None
    for row in (0, 2, 3, 4):
        assert torch.equal(images[row], decode([files[row]], CPU)[0])


def test_what_it_refuses_though_it_should_not_is_left_to_others(library, monkeypatch):
    monkeypatch.setattr(Library, "nvjpegDecodeBatched", lambda *_: REFUSED)

    assert nvjpeg.Decoder(library).decode(FILES, SIZES, CPU) == [None] * 4


def test_baseline_files_go_there_and_the_others_to_torchvision(library, monkeypatch):
    decoder, lists = nvjpeg.Decoder(library), []

    def by_torchvision(files, device):
        lists.append(len(files))
        return [decode([file.numpy().tobytes()], CPU)[0] for file in files]

    original = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda files, sizes, device: original(files, sizes, CPU))
    monkeypatch.setattr(nvjpeg, "borrow", lambda device: contextlib.nullcontext(decoder))
    monkeypatch.setattr(jpeg, "_decode_by_torchvision", by_torchvision)
    monkeypatch.setattr(jpeg, "_to_device", lambda image, device: image)
    files = [*FILES, *GOOD.values(), LOW, *BAD.values()]
    images = decode(files, CUDA)

    assert library.lists == [8, 7] and lists == [2]  # LOW and a progressive one; PNG and the like go to neither
    for image, file in zip(images, files, strict=True):
        wanted = decode([file], CPU)[0]
        assert image == wanted if isinstance(wanted, Problem) else torch.equal(image, wanted)


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
