"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from their published files, which are fetched where they are absent.

CIFAR-10 may also lie there as image files, as Tiny-ImageNet and ImageNet's classes always do. One table of data sets,
one reader per format. A file that cannot be used is a `UserError` of one sentence.
"""

import contextlib
import gzip
import http.client
import io
import logging
import math
import pickle
import socket
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from collective_pipeline.config import DatasetName, UserError, count_of
from collective_pipeline.data.image_folders import read_image_files, read_image_folders
from collective_pipeline.data.image_index import TRAIN, VAL, ImageIndex, index_images
from collective_pipeline.data.splits import Images, RawImages

logger = logging.getLogger(__name__)

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_IMAGES, IDX_LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"  # 0, 0, unsigned byte, number of dimensions
IDX_CONTENT = {IDX_IMAGES: "images", IDX_LABELS: "labels"}
IDX_SIDE = 28
CIFAR_SHAPE = (3, 32, 32)
TINY_IMAGENET, TINY_IMAGENET_SHAPE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", (3, 64, 64)
IMAGENET64_SHAPE = (3, 64, 64)
# All of its images are in memory at once, and on the device: of a hundred whole classes 1.6 GB.
MAX_CLASSES, MAX_BYTES = 100, 2 * 10**9
# The classes of the original's Task B in its order, that of their numbers in ILSVRC's devkit.
TASK_B = {
    "n02504458": "African_elephant",
    "n02117135": "hyena",
    "n02391049": "zebra",
    "n02106030": "collie",
    "n02099601": "golden_retriever",
    "n02108089": "boxer",
    "n02486261": "patas",
    "n02486410": "baboon",
    "n02120079": "Arctic_fox",
    "n02085620": "Chihuahua",
    "n02127052": "lynx",
    "n02116738": "African_hunting_dog",
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# What a pickled array is made of, in numpy 2's names. Any other global could run code of the file's choosing.
PICKLED_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}

PUBLISHED = "put the published file in its place, or delete it to have it downloaded"
TIMEOUT_SECONDS = 5  # for a server to answer, not for a whole file
DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)  # RuntimeError: torchvision's wrong checksum


def load_images(name: DatasetName, folder: Path) -> RawImages:
    """The data set `name` from its files in `folder`; absent ones are downloaded into it.

    Raises:
        UserError: If a file is damaged, is not what its name says, or is absent and cannot be downloaded.
    """
    return READERS[name](name, folder)


def _read_idx(name: DatasetName, folder: Path, *, source: str, class_names: tuple[str, ...]) -> RawImages:
    packed = [folder / f"{file}.gz" for file in IDX_FILES]
    if missing := [path.name for path in packed if not (path.exists() or path.with_suffix("").exists())]:
        published = getattr(import_module("torchvision.datasets"), source)
        with _downloads(name, folder, missing, published.mirrors[0]) as arriving:
            for file in missing:
                _download(published.mirrors, file, dict(published.resources)[file], arriving)
            for file in missing:
                (arriving / file).rename(folder / file)
    train_images, train_labels, test_images, test_labels = (
        path if path.exists() else path.with_suffix("") for path in packed
    )
    train = _idx_part(name, train_images, train_labels, num_classes=len(class_names))
    test = _idx_part(name, test_images, test_labels, num_classes=len(class_names))
    return RawImages(name, train, test, class_names)


def _idx_part(name: DatasetName, images_path: Path, labels_path: Path, *, num_classes: int) -> Images:
    images, labels = read_idx(images_path, IDX_IMAGES), read_idx(labels_path, IDX_LABELS)
    height, width = images.shape[1:]
    if (height, width) != (IDX_SIDE, IDX_SIDE):
        raise _unusable(images_path, f"holds {height} x {width} images where {name} has {IDX_SIDE} x {IDX_SIDE}")
    return _checked(images[:, None], labels, num_classes, images_path, labels_path)


def read_idx(path: Path, expected: bytes, *, advice: str = PUBLISHED) -> npt.NDArray[np.uint8]:
    """The array in an idx file: four bytes that say what it is, big-endian sizes, data.

    Args:
        path: The file; `.gz` is unpacked.
        expected: Its first four bytes, `IDX_IMAGES` or `IDX_LABELS`.
        advice: What to do if it cannot be used, in the words of who gave it.

    Raises:
        UserError: If it is damaged or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _unusable(path, f"cannot be read ({error})", advice) from None
    magic = content[:4]
    if magic != expected:
        holds = IDX_CONTENT.get(magic, f"something else (it starts with '{magic.hex()}', not '{expected.hex()}')")
        raise _unusable(path, f"should hold idx {IDX_CONTENT[expected]} but holds {holds}", advice)
    header = 4 + 4 * expected[-1]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    num_bytes = header + math.prod(shape)
    if len(content) != num_bytes:
        state = "truncated" if len(content) < num_bytes else "too long"
        raise _unusable(path, f"is {state} ({len(content):,} bytes where its header announces {num_bytes:,})", advice)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_cifar10(name: DatasetName, folder: Path) -> RawImages:
    """From image files `train/<class>/*` and `test/<class>/*` where such folders lie there, else as published."""
    train, test = folder / "train", folder / "test"
    if not train.is_dir() and not test.is_dir():
        return _read_published_cifar10(name, folder)
    logger.info("%s is read from the image files in %s", name, folder)
    for part in (train, test):
        if not part.is_dir():
            raise UserError(f"{folder} lacks the folder {part.name}: put the images of that part there, by class")
    return RawImages(
        name,
        read_image_folders(train, CIFAR10_CLASSES, CIFAR_SHAPE),
        read_image_folders(test, CIFAR10_CLASSES, CIFAR_SHAPE),
        CIFAR10_CLASSES,
    )


def _read_cifar(
    name: DatasetName,
    folder: Path,
    *,
    source: str,
    subfolder: str,
    train: Sequence[str],
    test: str,
    meta: str,
    labels_key: str,
    names_key: str,
    num_classes: int,
) -> RawImages:
    def path_of(file: str) -> Path:
        return folder / file if (folder / file).exists() else folder / subfolder / file

    if missing := [file for file in (*train, test, meta) if not path_of(file).exists()]:
        published = getattr(import_module("torchvision.datasets"), source)
        with _downloads(name, folder, missing, published.url) as arriving:
            _unpack(published, folder, arriving)
            for file in missing:
                (arriving / subfolder / file).rename(folder / file)
    names = _unpickle(path_of(meta), names_key)[names_key]
    if not isinstance(names, list) or len(names) != num_classes:
        raise _unusable(path_of(meta), f"does not list {num_classes} names as '{names_key}'")
    batches = [_cifar_batch(path_of(file), labels_key, num_classes) for file in train]
    return RawImages(
        name,
        Images(torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])),
        _cifar_batch(path_of(test), labels_key, num_classes),
        tuple(map(_text, names)),
    )


def _cifar_batch(path: Path, labels_key: str, num_classes: int) -> Images:
    content = _unpickle(path, "data", labels_key)
    pixels = content["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (math.prod(CIFAR_SHAPE),):
        raise _unusable(path, "does not hold rows of 3 x 32 x 32 bytes as 'data'")
    try:
        labels = np.asarray(content[labels_key])
        if labels.size and labels.dtype.kind not in "iu":
            raise TypeError(f"they are {labels.dtype}")
        labels = labels.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _unusable(path, f"does not hold whole numbers as '{labels_key}' ({error})") from None
    return _checked(pixels.reshape(-1, *CIFAR_SHAPE), labels, num_classes, path, path)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers; whatever else a pickle asks for is refused before it is looked up."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file, encoding="bytes")  # as Python 2 wrote them
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # its name in numpy 1
        if (module, name) not in PICKLED_ARRAYS:
            raise _unusable(self._path, f"asks for '{module}.{name}', which no CIFAR file needs and may be harmful")
        return super().find_class(module, name)


def _unpickle(path: Path, *keys: str) -> dict[str, Any]:
    """The dictionary in the file, which has `keys`."""
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, path).load()
    except UserError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        raise _unusable(path, f"cannot be read ({error})") from None
    named = {_text(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    for key in keys:
        if key not in named:
            raise _unusable(path, f"has no '{key}'")
    return named


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _checked(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[Any], num_classes: int, images_path: Path, labels_path: Path
) -> Images:
    """The arrays as tensors that own their memory, one label in 0..num_classes-1 for every image."""
    if len(images) == 0:
        raise _unusable(images_path, "holds no images")
    if labels.shape != images.shape[:1]:
        holders = f"{images_path.name} and {labels_path.name}"
        held = f"{count_of(len(images), 'image')} and {count_of(labels.size, 'label')}"
        raise _unusable(labels_path, f"does not fit: {holders} hold {held}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _unusable(labels_path, f"has labels {labels.min()} to {labels.max()}, outside 0 to {num_classes - 1}")
    return Images(torch.tensor(images), torch.tensor(labels, dtype=torch.int64))


def _unusable(path: Path, problem: str, advice: str = PUBLISHED) -> UserError:
    return UserError(f"{path} {problem}: {advice}")


@contextlib.contextmanager
def _downloads(name: DatasetName, folder: Path, missing: Sequence[str], address: str) -> Iterator[Path]:
    """A passing folder inside `folder`, to move whole files out of; a failure becomes one sentence, without noise."""
    logger.info("Downloading %s into %s", name, folder)
    timeout, was_there = socket.getdefaulttimeout(), folder.exists()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)  # torchvision waits for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as arriving,
            contextlib.redirect_stderr(io.StringIO()),  # torchvision's progress bars
        ):
            yield Path(arriving)
    except DOWNLOAD_ERRORS as error:
        if not was_there and folder.exists():
            folder.rmdir()
        raise UserError(
            f"{name} lacks {', '.join(missing)} in {folder}, and downloading failed ({error}): "
            f"fetch what is missing from {address} and put it there"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _download(mirrors: Sequence[str], file: str, md5: str, folder: Path) -> None:
    failures = []
    for mirror in mirrors:
        try:
            import_module("torchvision.datasets.utils").download_url(mirror + file, folder, file, md5)
        except DOWNLOAD_ERRORS as error:
            failures.append(str(error))
        else:
            return
    raise OSError(" and ".join(dict.fromkeys(failures)))  # mirrors often fail alike


def _unpack(published: Any, folder: Path, arriving: Path) -> None:
    """The published archive into `arriving`, taken from `folder` where the user has put it."""
    tools = import_module("torchvision.datasets.utils")
    archive = folder / published.filename
    if not archive.exists():
        archive = arriving / published.filename
        tools.download_url(published.url, arriving, published.filename, published.tgz_md5)
    elif not tools.check_integrity(archive, published.tgz_md5):
        raise _unusable(archive, "has a wrong checksum")
    with warnings.catch_warnings():
        # tarfile of Python 3.12 wants its caller, torchvision, to name a filter; the archive's checksum is right.
        warnings.simplefilter("ignore", DeprecationWarning)
        tools.extract_archive(archive, arriving)


# `source` names the class of torchvision that knows addresses and checksums. It is imported only to download: that
# takes four seconds, which every command would pay.
_read_published_cifar10 = partial(
    _read_cifar,
    source="CIFAR10",
    subfolder="cifar-10-batches-py",
    train=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
    test="test_batch",
    meta="batches.meta",
    labels_key="labels",
    names_key="label_names",
    num_classes=10,
)


def _read_tiny_imagenet(name: DatasetName, folder: Path) -> RawImages:
    """As many of its 200 classes as are there; its validation part, the only other one with labels, is the test."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{folder} does not hold {name}: unpack {TINY_IMAGENET} there (its train/ and val/, or the folder around "
            "them), which the project does not download"
        )
    index = index_images(folder)

    def read(part: str) -> Images:
        rows = index.rows_of(part)
        files, labels = [index.root / path for path in rows["path"]], torch.tensor(rows["label"].to_numpy())
        return read_image_files(files, labels, TINY_IMAGENET_SHAPE, index.root / part)

    return RawImages(name, read(TRAIN), read(VAL), index.class_names)


def _read_imagenet64(name: DatasetName, folder: Path) -> RawImages:
    """Classes of ImageNet at 64 pixels: those of Task B where all of them are there, else all that are.

    Images are stretched, as those of the down-sampled ImageNet that Task B is made of, and as `predict` does: nothing
    of an image is cut off. The validation part, the only other one with labels, is the test.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{folder} does not hold {name}: put ILSVRC there or a link to it, or its classes' folders in train/ and "
            "val/, which the project does not download"
        )
    index = index_images(folder)
    class_of_label = _choose_classes(name, folder, index)

    def read(part: str) -> Images:
        rows = index.rows_of(part)
        rows = rows[rows["label"].isin(list(class_of_label))]
        labels = rows["label"].map({label: place for place, label in enumerate(class_of_label)})
        lacking = [title for label, title in class_of_label.items() if label not in set(rows["label"])]
        if lacking:
            raise UserError(f"{index.root} has no {part} images of {lacking[0]}: put some there, or remove that class")
        files = [index.root / path for path in rows["path"]]
        return read_image_files(files, torch.tensor(labels.to_numpy()), IMAGENET64_SHAPE, index.root, stretch=True)

    return RawImages(name, read(TRAIN), read(VAL), tuple(class_of_label.values()))


def _choose_classes(name: DatasetName, folder: Path, index: ImageIndex) -> dict[int, str]:
    """The names of those classes that are read, by their labels in the tree."""
    label_of = {class_name.partition(" ")[0]: label for label, class_name in enumerate(index.class_names)}
    absent = [title for wnid, title in TASK_B.items() if wnid not in label_of]
    if not absent:
        logger.info("%s: of %d classes, the %d of Task B are read", folder, len(label_of), len(TASK_B))
        return {label_of[wnid]: title for wnid, title in TASK_B.items()}
    num_classes, num_bytes = len(index.class_names), len(index.table) * math.prod(IMAGENET64_SHAPE)
    if num_classes > MAX_CLASSES or num_bytes > MAX_BYTES:
        raise UserError(
            f"{folder} holds {num_classes:,} classes without {absent[0]}, which Task B needs, and all of them are too "
            f"many for {name}, which keeps at most {MAX_CLASSES} classes and {MAX_BYTES / 1e9:g} GB in memory where "
            f"these take {num_bytes / 1e9:.1f}: put the folders of the wanted classes alone there, or links to them"
        )
    return dict(enumerate(index.class_names))


READERS: dict[DatasetName, Callable[[DatasetName, Path], RawImages]] = {
    "mnist": partial(_read_idx, source="MNIST", class_names=tuple("0123456789")),
    "fashion_mnist": partial(
        _read_idx,
        source="FashionMNIST",
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "cifar10": _read_cifar10,
    "cifar100": partial(
        _read_cifar,
        source="CIFAR100",
        subfolder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels_key="fine_labels",
        names_key="fine_label_names",
        num_classes=100,
    ),
    "tiny_imagenet": _read_tiny_imagenet,
    "imagenet64": _read_imagenet64,
}
