"""Whatever a tree of images holds, every file becomes an image or a reason, and none disturbs the others."""

import contextlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tests.conftest import wait_until

from collective_pipeline.data import jpeg
from collective_pipeline.data.jpeg import Files, Problem, decode, decode_on_gpu, encode, is_usual


def smooth_image(height, width, seed=0, mode="RGB"):
    """Noise without fine detail."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def with_header_of(file, height, width):
    """The same JPEG file, whose header says another size."""
    start = file.index(b"\xff\xc0") + 5
    return file[:start] + height.to_bytes(2) + width.to_bytes(2) + file[start + 4 :]


JPEG = encoded(smooth_image(60, 80))
BAD = {
    "half of it": JPEG[: len(JPEG) // 2],
    "without its end": JPEG[:-2],
    "header alone": JPEG[:100],
    "zero bytes": b"",
    "text": b"not an image",
    "giant": with_header_of(JPEG, 65_000, 65_000),
    "giant within the format": with_header_of(JPEG, 20_000, 20_000),
    "half a PNG": encoded(smooth_image(60, 80), "PNG")[:2000],
}
GOOD = {
    "jpeg": JPEG,
    "progressive": encoded(smooth_image(60, 80), progressive=True),
    "greyscale": encoded(smooth_image(60, 80, mode="L")),
    "CMYK": encoded(smooth_image(60, 80, mode="CMYK")),
    "PNG": encoded(smooth_image(60, 80), "PNG"),
    "BMP": encoded(smooth_image(60, 80), "BMP"),
    "bytes behind its end": JPEG + b"\0\n",
}


def by_pillow(file):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1)


def decode_there(files):
    """As `decode` gives them."""
    images, problems = decode_on_gpu(Files.of(files), torch.device("cuda"))
    return [problems.get(row, image) for row, image in enumerate(images.one_by_one())]


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for torchvision's decoder, which fails a whole list for one file: here for a progressive one."""
    lists = []

    def decode_jpegs_cuda(files, mode, device):
        lists.append(len(files))
        if any(b"\xff\xc2" in file.numpy().tobytes() for file in files):
            raise RuntimeError("Error while decoding JPEG images")
        return [torch.ops.image.decode_jpeg(file, mode, False) for file in files]

    monkeypatch.setattr(jpeg._operators(), "decode_jpegs_cuda", decode_jpegs_cuda)
    monkeypatch.setattr(jpeg.nvjpeg, "borrow", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(jpeg, "_to_device", lambda image, device: image)
    return lists


@pytest.mark.parametrize("kind", GOOD)
def test_what_pillow_reads_is_read_as_pillow_reads_it(kind):
    (image,) = decode([GOOD[kind]])

    assert image.dtype == torch.uint8 and image.shape == (3, 60, 80)
    assert (image.int() - by_pillow(GOOD[kind]).int()).abs().max() <= 1


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_file_is_turned_as_its_camera_says(gpu, orientation, order):
    """As `predict` turns it; the GPU, which does not, gets only what is upright."""
    tags = Image.Exif()
    tags.endian = {"little": "<", "big": ">"}[order]
    tags[0x010F], tags[0x0112] = "a camera", orientation
    files = [encoded(smooth_image(60, 80, mode=mode), exif=tags) for mode in ("RGB", "L", "CMYK")]
    files += [encoded(smooth_image(60, 80), "PNG", exif=tags)]

    for way in (decode, decode_there):
        for image, file in zip(way(files), files, strict=True):
            turned = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
            assert image.shape == (3, turned.height, turned.width)
            assert (image.int() - torch.from_numpy(np.array(turned)).permute(2, 0, 1).int()).abs().max() <= 1
    assert is_usual(files[0]) == (orientation not in range(2, 9)) == bool(gpu)


def test_of_several_things_that_a_camera_says_none_is_overheard():
    """A number of another type, and a second header after it."""
    turned = b"MM\0*\0\0\0\x08\0\1\1\x12\0\4\0\0\0\1\0\0\0\6\0\0\0\0"
    upright = turned.replace(b"\0\0\0\6", b"\0\0\0\1")

    def with_headers(*said):
        return JPEG[:2] + b"".join(b"\xff\xe1" + (len(s) + 8).to_bytes(2) + b"Exif\0\0" + s for s in said) + JPEG[2:]

    assert [is_usual(with_headers(*said)) for said in ((upright,), (turned,), (turned, upright))] == [
        True,
        False,
        False,
    ]
    assert decode([with_headers(turned)])[0].shape == (3, 80, 60)


@pytest.mark.parametrize(
    "says", [b"", b"II*\0", b"MM\0*" + 60 * b"\xff", b"II*\0\x08\0\0\0\xff\xff" + 60 * b"\x12\x01"]
)
def test_a_camera_that_says_nonsense_is_not_heard(says):
    header = b"\xff\xe1" + (len(says) + 8).to_bytes(2) + b"Exif\0\0" + says
    file = JPEG[:2] + header + JPEG[2:]
    assert is_usual(file) and torch.equal(decode([file])[0], decode([JPEG])[0])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_told_and_the_others_are_read(kind):
    first, bad, last = decode([JPEG, BAD[kind], JPEG])

    assert isinstance(bad, Problem) and bad.reason and "BytesIO" not in bad.reason
    assert torch.equal(first, last) and first.shape == (3, 60, 80)


def test_reasons_say_what_is_wrong():
    def reason(kind):
        return decode([BAD[kind]])[0].reason

    assert reason("zero bytes") == "it is empty"
    assert reason("giant") == "its header says 65,000 x 65,000 pixels"
    assert "truncated" in reason("half of it")


def test_a_problem_given_stays_one():
    assert decode([Problem("gone")]) == [Problem("gone")]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_files_may_be_any_bytes(kind):
    assert torch.equal(decode([kind(JPEG)])[0], decode([JPEG])[0])


def test_threads_decode_side_by_side():
    """Each gets its own images, and the warning of torchvision reaches none of them."""
    files = [encoded(smooth_image(40 + row, 50)) for row in range(16)]
    before = set(threading.enumerate())
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda file: decode([file])[0], files))

    assert [image.shape[1] for image in images] == list(range(40, 56))
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_whole_jpeg_files_alone_go_to_the_gpu():
    """It would fill with grey what a truncated one lacks, and make room for a giant one."""
    files = Files.of([*GOOD.values(), *BAD.values(), Problem("gone")])
    kinds = [*GOOD, *BAD, "gone"]
    plain = {kind for kind, size in zip(kinds, files.sizes_B2.tolist(), strict=True) if size == [60, 80]}

    assert plain == {"jpeg", "progressive", "greyscale", "bytes behind its end"}
    assert files.sizes_B2.any(axis=1).sum() == 4
    usual = {kind for kind, is_one in zip(kinds, files.are_usual_B, strict=True) if is_one}
    assert (
        usual == plain - {"progressive", "greyscale"} == {kind for kind, file in (GOOD | BAD).items() if is_usual(file)}
    )


def test_files_are_where_their_table_says():
    every = [JPEG, Problem("gone"), bytearray(GOOD["PNG"]), b"", Problem("gone too"), memoryview(JPEG)]
    files = Files.of(every)

    assert [bytes(files[row]) for row in (0, 2, 5)] == [JPEG, GOOD["PNG"], JPEG]
    assert len(files) == 6 and files.problems == {1: every[1], 4: every[4]}
    assert files.lengths_B.tolist() == [len(JPEG), 0, len(GOOD["PNG"]), 0, 0, len(JPEG)]
    assert files.sizes_B2.tolist() == [[60, 80], [0, 0], [0, 0], [0, 0], [0, 0], [60, 80]]
    assert len(Files.of([])) == 0


def test_bad_files_disturb_no_others_on_the_gpu(gpu):
    every = [JPEG, Problem("gone"), *BAD.values(), *GOOD.values()]

    for image, file in zip(decode_there(every), every, strict=True):
        (wanted,) = decode([file])
        assert image == wanted if isinstance(wanted, Problem) else torch.equal(image, wanted)


def test_a_file_that_the_gpu_refuses_is_found_among_the_others_and_read_on_the_cpu(gpu):
    files = [JPEG] * 5 + [GOOD["progressive"]] + [JPEG] * 4 + [GOOD["CMYK"], BAD["half of it"], BAD["zero bytes"]]
    images = decode_there(files)

    assert max(gpu) == 10 and len(gpu) < 10
    assert [isinstance(image, Problem) for image in images] == [False] * 11 + [True] * 2
    for image, file in zip(images[:11], files[:11], strict=True):
        assert torch.equal(image, decode([file])[0])


def test_no_call_to_the_gpu_is_made_for_nothing(gpu):
    decode_there([GOOD["PNG"]])

    assert gpu == []


def test_an_image_encoded_again_stays_what_it_was():
    image = by_pillow(JPEG)

    assert (decode([encode(image, 95)])[0].int() - image.int()).abs().float().mean() < 2
    assert len(encode(image, 50)) < len(encode(image, 95))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_reads_what_the_cpu_reads():
    on_gpu = decode_there([*GOOD.values(), *BAD.values()])
    on_cpu = decode([*GOOD.values(), *BAD.values()])
    for here, there in zip(on_gpu, on_cpu, strict=True):
        if isinstance(there, Problem):
            assert here == there
        else:
            assert here.device.type == "cuda"
            assert (here.cpu().int() - there.int()).abs().float().mean() < 2
