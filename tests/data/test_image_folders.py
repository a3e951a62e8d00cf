"""Image files in a folder for each class become one tensor; a few bad ones are told of, many are refused."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from collective_pipeline.config import UserError
from collective_pipeline.data.image_folders import read_image_folders
from collective_pipeline.data.small_images import CIFAR10_CLASSES, load_images

CLASSES = ("cat", "ant")
SHAPE = (3, 4, 5)


def write_images(folder, classes=CLASSES, num=2, shape=SHAPE):
    """`num` images of each class, every one of a single brightness: 10 * class + number."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            pixels = np.full((*shape[1:], 3), 10 * label + i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:04d}.png")
    return folder


def sentence_of(folder):
    with pytest.raises(UserError) as caught:
        read_image_folders(folder, CLASSES, SHAPE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_follow_the_order_of_the_classes_and_images_that_of_their_names(tmp_path):
    images = read_image_folders(write_images(tmp_path, num=3), CLASSES, SHAPE)

    assert images.images.shape == (6, *SHAPE) and images.images.dtype == torch.uint8
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_few_unusable_files_are_left_out_counted_and_named(tmp_path, caplog):
    write_images(tmp_path, num=150)
    (tmp_path / "cat" / "0001.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "ant" / "0000.png")
    with caplog.at_level(logging.WARNING):
        images = read_image_folders(tmp_path, CLASSES, SHAPE)

    assert images.images[:, 0, 0, 0].tolist() == [0, *range(2, 150), *range(11, 160)]
    assert images.labels.tolist() == [0] * 149 + [1] * 149
    assert "2 of the 300 image files" in caplog.text
    assert str(tmp_path / "cat" / "0001.png") in caplog.text
    assert "9 x 9 where the others are 4 x 5" in caplog.text


def test_many_unusable_files_are_refused_in_one_sentence(tmp_path):
    write_images(tmp_path)
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:30])
    sentence = sentence_of(tmp_path)

    assert f"4 of the 4 image files in {tmp_path} cannot be used, more than 1 %" in sentence
    assert "cat/0000.png" in sentence and sentence.endswith("; and 1 more)")


def test_folders_that_do_not_fit_the_classes_are_refused(tmp_path):
    assert sentence_of(tmp_path).startswith(f"{tmp_path} lacks a folder of images for cat, ant")
    write_images(tmp_path, classes=(*CLASSES, "aunt"))
    assert "aunt is a folder of no known class: did you mean 'ant'?" in sentence_of(tmp_path)


def test_a_class_without_images_is_refused(tmp_path):
    write_images(tmp_path, num=0)
    (tmp_path / "cat" / "notes.txt").write_text("no image")

    assert sentence_of(tmp_path).startswith(f"{tmp_path / 'cat'} holds no png, jpg or bmp file")


def test_cifar10_may_lie_as_image_folders(tmp_path):
    write_images(tmp_path / "train", CIFAR10_CLASSES, shape=(3, 32, 32))
    write_images(tmp_path / "test", CIFAR10_CLASSES, num=1, shape=(3, 32, 32))
    raw = load_images("cifar10", tmp_path)

    assert (raw.name, len(raw.train), len(raw.test)) == ("cifar10", 20, 10)
    assert raw.class_names == CIFAR10_CLASSES
    assert raw.test.images[:, 0, 0, 0].tolist() == [10 * label for label in range(10)]


def test_one_part_of_cifar10_without_the_other_is_one_sentence(tmp_path):
    write_images(tmp_path / "train", CIFAR10_CLASSES, shape=(3, 32, 32))

    with pytest.raises(UserError, match=f"^{tmp_path} lacks the folder test: "):
        load_images("cifar10", tmp_path)
