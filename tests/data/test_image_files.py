"""A user's own images become what the network reads; what cannot be read is named."""

import gzip
import logging
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from collective_pipeline.config import ImageSpec, UserError
from collective_pipeline.data.decoding import read_image
from collective_pipeline.data.image_files import find_images

GREY, COLOUR = (1, 4, 6), (3, 4, 6)  # channels, height, width
SPEC = ImageSpec(shape=GREY, mean=(0.5,), std=(0.5,), class_names=("a", "b"))


@pytest.fixture
def pixels():
    """Bytes of one grey image."""
    return np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def idx(path, array, *, code=8):
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes())
    return path


def all_of(source, size=1024):
    return torch.cat(list(source.batches(size)))


@pytest.mark.parametrize("suffix", ["png", "bmp", "PNG"])
def test_a_grey_image_of_the_right_size_is_read_as_it_is(tmp_path, pixels, suffix):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    image, _ = read_image(tmp_path / f"a.{suffix}", GREY)

    assert image.dtype == torch.uint8 and image.shape == GREY
    assert np.array_equal(image[0].numpy(), pixels)


def test_channels_are_converted(tmp_path, pixels):
    """Grey to three alike; a colour to its brightness."""
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "red.png")

    assert np.array_equal(read_image(tmp_path / "grey.png", COLOUR)[0].numpy(), np.stack([pixels] * 3))
    assert read_image(tmp_path / "red.png", COLOUR)[0].flatten(1).unique(dim=1).squeeze().tolist() == [255, 0, 0]
    assert read_image(tmp_path / "red.png", GREY)[0].unique().tolist() == [76]


def test_what_is_transparent_is_on_black(tmp_path):
    """Whatever colour its hidden pixels have."""
    Image.new("RGBA", (6, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")

    assert read_image(tmp_path / "clear.png", GREY)[0].max() == 0


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.full((4, 6), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")

    assert read_image(tmp_path / "deep.png", GREY)[0].unique().tolist() == [128]


def test_an_image_is_turned_as_its_camera_says(tmp_path, pixels):
    image = Image.fromarray(pixels.T.copy())
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)

    assert np.array_equal(read_image(tmp_path / "turned.png", GREY)[0][0].numpy(), np.rot90(pixels.T, -1))


def test_a_folder_is_read_in_order_with_its_folders(tmp_path):
    """Batches of any size give the same; other files are left out and told of."""
    (tmp_path / "b").mkdir()
    for value, name in enumerate(["a.png", "b/a.bmp", "b/z.jpeg", "c.jpg"]):
        Image.new("L", (6, 4), 10 * value).save(tmp_path / name)
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = find_images(tmp_path, SPEC)

    assert (source.kind, list(source.names)) == ("file", ["a.png", "b/a.bmp", "b/z.jpeg", "c.jpg"])
    assert all_of(source, 3).flatten(1)[:, 0].tolist() == [0, 10, 20, 30]
    assert torch.equal(all_of(source, 1), all_of(source))


def test_what_is_changed_or_left_out_is_told_once(tmp_path, caplog):
    for i in range(3):
        Image.new("RGB", (12, 9)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.webp").touch()
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        all_of(find_images(tmp_path, SPEC), 2)

    assert [record.getMessage().replace(str(tmp_path), "HERE") for record in caplog.records] == [
        "HERE: files that are no png, jpg or bmp are left out: 3 x .webp",
        "Where needed, images are resized to 4 x 6; the first is HERE/0.png (9 x 12)",
        "Where needed, images are converted to 1 channel(s); the first is HERE/0.png (mode RGB)",
    ]


def test_one_image_will_do(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = find_images(tmp_path / "a.png", SPEC)

    assert list(source.names) == ["a.png"] and all_of(source).shape == (1, *GREY)


@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_file_is_read(tmp_path, packed):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)
    path = idx(tmp_path / "images", images)
    if packed:
        path = tmp_path / "images.gz"
        path.write_bytes(gzip.compress((tmp_path / "images").read_bytes()))
    source = find_images(path, SPEC)

    assert (source.kind, list(source.names), len(source)) == ("index", [0, 1, 2, 3, 4], 5)
    assert np.array_equal(all_of(source, 2)[:, 0].numpy(), images)


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_a_damaged_image_is_named(tmp_path, content):
    """One sentence with its path, whatever is wrong with it."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    source = find_images(tmp_path, SPEC)

    with pytest.raises(UserError, match=r"b\.png is not an image that can be read \(.*\): replace it, or remove it"):
        all_of(source)


def test_numbers_that_are_no_bytes_are_refused(tmp_path, pixels):
    """Nobody says which of them is white."""
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "a.tiff")

    with pytest.raises(UserError, match="its pixels are not bytes"):
        read_image(tmp_path / "a.tiff", GREY)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "absent", "there is no .*absent: give an idx file of images, or a folder"),
        (lambda folder: folder, "holds no png, jpg or bmp file: give"),
        (lambda folder: idx(folder / "i", np.zeros((2, 4, 7), np.uint8)), r"holds 1 x 4 x 7 images .* reads 1 x 4 x 6"),
        (lambda folder: idx(folder / "i", np.zeros((0, 4, 6), np.uint8)), "holds no images"),
        (lambda folder: idx(folder / "i", np.zeros(2, np.uint8)), "but holds labels: give an idx file"),
        (lambda folder: idx(folder / "i", np.zeros((2, 4, 6), np.uint8), code=9), "but holds something else"),
    ],
)
def test_what_holds_no_images_for_the_network_is_refused(tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence):
        find_images(make(tmp_path), SPEC)


def test_a_truncated_idx_file_is_refused(tmp_path):
    path = idx(tmp_path / "i", np.zeros((2, 4, 6), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(UserError, match=r"is truncated .*: give an idx file of images"):
        find_images(path, SPEC)


def test_a_network_that_sees_the_middle_is_given_the_middle(tmp_path):
    """As it was validated: half of the shorter side, whatever the image's shape."""
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[10:30, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    known = SPEC.model_copy(update={"shape": (1, 8, 8), "centre": 0.5})

    assert (all_of(find_images(tmp_path, known)) == 200).all()
