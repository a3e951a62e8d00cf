"""The published files become tensors, and a file that cannot be used is one clear sentence."""

import gzip
import hashlib
import os
import pickle
import socket
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10 as CIFAR10_SOURCE
from torchvision.datasets import MNIST as MNIST_SOURCE

from collective_pipeline.config import DatasetName, UserError
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import make_splits

REPOSITORY = Path(__file__).parents[2]
MNIST = REPOSITORY / "data" / "01_raw" / "mnist"
FASHION_MNIST = REPOSITORY.parent / "shared" / "data" / "fashion-mnist"
DEAD = "http://127.0.0.1:9/"  # the port of the discard service, where nobody listens

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def idx_images(num: int, side: int = 28) -> bytes:
    return idx(np.arange(num * side * side).reshape(num, side, side) % 251)


def idx_labels(*labels: int) -> bytes:
    return idx(np.array(labels))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Three training and two test images, unpacked."""
    contents = (idx_images(3), idx_labels(0, 9, 5), idx_images(2), idx_labels(1, 2))
    for file, content in zip(IDX_FILES, contents, strict=True):
        (tmp_path / file).write_bytes(content)
    return tmp_path


def cifar_files(name: DatasetName, num: int = 2) -> dict[str, dict[bytes, Any]]:
    """What the files of a CIFAR set hold, `num` images each, with bytes as names as Python 2 wrote them."""
    pixels = (np.arange(num * 3072) % 251).astype(np.uint8).reshape(num, 3072)
    if name == "cifar10":
        batch = {b"data": pixels, b"labels": list(range(num)), b"filenames": [b"a.png"] * num}
        names = [b"class %d" % label for label in range(10)]
        batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        return dict.fromkeys(batches, batch) | {"batches.meta": {b"label_names": names}}
    batch = {b"data": pixels, b"fine_labels": list(range(num)), b"coarse_labels": [19] * num}
    names = [b"class %d" % label for label in range(100)]
    return {"train": batch, "test": batch, "meta": {b"fine_label_names": names, b"coarse_label_names": [b"coarse"]}}


def write_cifar(name: DatasetName, folder: Path, *, protocol: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    for file, content in cifar_files(name).items():
        (folder / file).write_bytes(pickle.dumps(content, protocol=protocol))
    return folder


def assert_sentence(name: DatasetName, folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_images(name, folder)

    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_mnist_is_all_there() -> None:
    raw = load_images("mnist", MNIST)

    assert raw.train.images.shape == (60_000, 1, 28, 28)
    assert raw.test.images.shape == (10_000, 1, 28, 28)
    assert raw.train.images.dtype == torch.uint8
    assert raw.train.labels.dtype == torch.int64
    counts = torch.bincount(raw.train.labels).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(raw.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert raw.class_names == tuple("0123456789")


def test_mnist_splits_have_the_known_sizes_and_moments() -> None:
    splits = make_splits(load_images("mnist", MNIST), val_fraction=0.1, split_seed=42)

    assert (len(splits.train), len(splits.val), len(splits.test)) == (54_000, 6_000, 10_000)
    assert splits.mean == pytest.approx([0.1307], abs=5e-4)
    assert splits.std == pytest.approx([0.3081], abs=5e-4)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"Fashion-MNIST is not at {FASHION_MNIST}")
def test_fashion_mnist_is_all_there() -> None:
    raw = load_images("fashion_mnist", FASHION_MNIST)

    assert torch.bincount(raw.train.labels).tolist() == [6000] * 10
    assert torch.bincount(raw.test.labels).tolist() == [1000] * 10
    assert (raw.class_names[0], raw.class_names[9]) == ("T-shirt/top", "Ankle boot")
    splits = make_splits(raw, val_fraction=0.1, split_seed=42)
    assert splits.mean + splits.std == pytest.approx([0.2860, 0.3530], abs=5e-4)


def test_idx_files_are_read_packed_or_not(idx_folder: Path) -> None:
    unpacked = load_images("mnist", idx_folder)
    for file in IDX_FILES:
        (idx_folder / f"{file}.gz").write_bytes(gzip.compress((idx_folder / file).read_bytes()))
        (idx_folder / file).unlink()
    packed = load_images("mnist", idx_folder)

    assert unpacked.train.labels.tolist() == packed.train.labels.tolist() == [0, 9, 5]
    assert torch.equal(unpacked.train.images, packed.train.images)
    assert unpacked.train.images.flatten().tolist() == [i % 251 for i in range(3 * 784)]


def test_images_can_be_changed_in_place(idx_folder: Path) -> None:
    load_images("mnist", idx_folder).train.images.zero_()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        (TRAIN_IMAGES, idx_images(3)[:-1], "is truncated (2,367 bytes where its header announces 2,368)"),
        (TRAIN_IMAGES, idx_images(3)[:10], "is truncated"),
        (TRAIN_LABELS, idx_labels(0, 9, 5)[:-1], "is truncated"),
        (TRAIN_IMAGES, b"", "should hold idx images but holds something else"),
        (TRAIN_IMAGES, idx_images(3) + b"x", "is too long (2,369 bytes where its header announces 2,368)"),
        (TRAIN_IMAGES, b"\0\0\x08\x03" + b"\xff" * 12, "is truncated"),
        (TRAIN_IMAGES, b"<html>not found</html>", "something else (it starts with '3c68746d', not '00000803')"),
        (TRAIN_IMAGES, idx_labels(1, 2, 3), "should hold idx images but holds labels"),
        (TRAIN_LABELS, idx_images(3), "should hold idx labels but holds images"),
        (TRAIN_IMAGES, idx_images(3, side=32), "holds 32 x 32 images where mnist has 28 x 28"),
        (TRAIN_IMAGES, idx_images(4), "hold 4 images and 3 labels"),
        (TEST_LABELS, idx_labels(1, 2, 3), "hold 2 images and 3 labels"),
        (TRAIN_LABELS, idx_labels(0, 10, 5), "has labels 0 to 10, outside 0 to 9"),
        (TRAIN_IMAGES, idx_images(0), "holds no images"),
    ],
)
def test_a_bad_idx_file_is_one_sentence(idx_folder: Path, file: str, content: bytes, problem: str) -> None:
    (idx_folder / file).write_bytes(content)

    assert_sentence("mnist", idx_folder, str(idx_folder), problem, "put the published file in its place")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda packed: packed[: len(packed) // 2], "Compressed file ended"),
        (lambda packed: b"", "holds something else"),
        (lambda packed: b"no gzip" + packed, "Not a gzipped file"),
        (lambda packed: packed[:20] + b"\xff" * 20 + packed[40:], "cannot be read"),
        (lambda packed: packed[:-8] + b"\0" * 8, "CRC check failed"),
        (lambda packed: packed + b"trailing", "Not a gzipped file"),
    ],
    ids=["truncated", "empty", "no gzip", "corrupt", "checksum", "trailing"],
)
def test_a_bad_gz_file_is_one_sentence(idx_folder: Path, damage: Any, problem: str) -> None:
    path = idx_folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(damage(gzip.compress(idx_images(3))))

    assert_sentence("mnist", idx_folder, str(path), problem)


def test_a_folder_in_the_place_of_a_file_is_one_sentence(idx_folder: Path) -> None:
    (idx_folder / TRAIN_IMAGES).unlink()
    (idx_folder / TRAIN_IMAGES).mkdir()

    assert_sentence("mnist", idx_folder, str(idx_folder / TRAIN_IMAGES), "cannot be read")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("name", "num_train", "num_classes"), [("cifar10", 10, 10), ("cifar100", 2, 100)])
def test_cifar_files_are_read_whatever_pickle_wrote_them(
    tmp_path: Path, name: DatasetName, num_train: int, num_classes: int, protocol: int
) -> None:
    raw = load_images(name, write_cifar(name, tmp_path, protocol=protocol))

    assert raw.train.images.shape == (num_train, 3, 32, 32)
    assert raw.test.images.flatten().tolist() == [i % 251 for i in range(2 * 3072)]
    assert raw.test.labels.tolist() == [0, 1]
    assert raw.class_names == tuple(f"class {label}" for label in range(num_classes))


@pytest.mark.parametrize(("name", "subfolder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar_files_may_lie_in_torchvisions_subfolder(tmp_path: Path, name: DatasetName, subfolder: str) -> None:
    write_cifar(name, tmp_path / subfolder)

    assert len(load_images(name, tmp_path).test) == 2


def test_the_names_of_numpy_1_are_understood(tmp_path: Path) -> None:
    """The published files say numpy.core, and hold their bytes as the strings of Python 2."""
    pixels = bytes(range(256)) * 12
    python_2_string = b"T" + len(pixels).to_bytes(4, "little") + pixels
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nI3072\ntcnumpy\ndtype\n"
        b"(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n" + python_2_string + b"tb"
    )
    write_cifar("cifar100", tmp_path)
    (tmp_path / "test").write_bytes(b"\x80\x02}(S'data'\n" + array + b"S'fine_labels'\n(lI7\nau.")
    test = load_images("cifar100", tmp_path).test

    assert bytes(test.images.flatten().tolist()) == pixels
    assert test.labels.tolist() == [7]


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar("cifar10", tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Malicious()}))

    assert_sentence("cifar10", tmp_path, str(tmp_path / "test_batch"), f"asks for '{os.name}.mkdir'")
    assert not Path("executed").exists()


@pytest.mark.parametrize("call", ["builtins\neval", "numpy\nload", "numpy._core.multiarray\nscalar", "codecs\ndecode"])
def test_every_other_global_is_refused(tmp_path: Path, call: str) -> None:
    write_cifar("cifar10", tmp_path)
    (tmp_path / "batches.meta").write_bytes(f"c{call}\n(S'1'\ntR.".encode())

    assert_sentence("cifar10", tmp_path, "batches.meta", f"asks for '{call.replace(chr(10), '.')}'")


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "has no 'data'"),
        ({b"data": PIXELS}, "has no 'labels'"),
        ({b"data": PIXELS, b"fine_labels": [0, 1]}, "has no 'labels'"),
        ({b"data": PIXELS[:, 1:], b"labels": [0, 1]}, "does not hold rows of 3 x 32 x 32 bytes"),
        ({b"data": PIXELS.astype(np.float32), b"labels": [0, 1]}, "does not hold rows of 3 x 32 x 32 bytes"),
        ({b"data": [1, 2], b"labels": [0, 1]}, "does not hold rows of 3 x 32 x 32 bytes"),
        ({b"data": PIXELS, b"labels": [0]}, "hold 2 images and 1 label"),
        ({b"data": PIXELS, b"labels": [0, 10]}, "has labels 0 to 10, outside 0 to 9"),
        ({b"data": PIXELS, b"labels": [-1, 0]}, "has labels -1 to 0, outside 0 to 9"),
        ({b"data": PIXELS, b"labels": [0, None]}, "does not hold whole numbers as 'labels'"),
        ({b"data": PIXELS[:0], b"labels": []}, "holds no images"),
    ],
)
def test_a_bad_cifar_batch_is_one_sentence(tmp_path: Path, content: Any, problem: str) -> None:
    write_cifar("cifar10", tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content))

    assert_sentence("cifar10", tmp_path, str(tmp_path / "data_batch_3"), problem)


@pytest.mark.parametrize("names", [[b"cat"], None, b"0123456789"])
def test_bad_class_names_are_one_sentence(tmp_path: Path, names: Any) -> None:
    write_cifar("cifar10", tmp_path)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))

    assert_sentence("cifar10", tmp_path, "batches.meta does not list 10 names as 'label_names'")


@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_a_truncated_cifar_file_is_one_sentence(tmp_path: Path, length: int) -> None:
    path = write_cifar("cifar10", tmp_path) / "data_batch_1"
    path.write_bytes(path.read_bytes()[:length])

    assert_sentence("cifar10", tmp_path, f"{path} cannot be read")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that torchvision's addresses for MNIST and CIFAR-10 lead to; MNIST's first mirror is dead."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("collective_pipeline.data.small_images.TIMEOUT_SECONDS", 120)  # for a busy machine
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(served)))
    address = f"http://127.0.0.1:{http_server.server_port}/"
    for file, content in zip(IDX_FILES, (idx_images(2), idx_labels(1, 2)) * 2, strict=True):
        (served / f"{file}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(MNIST_SOURCE, "mirrors", [DEAD, address])
    monkeypatch.setattr(MNIST_SOURCE, "resources", [(path.name, md5(path)) for path in served.iterdir()])

    archive = served / CIFAR10_SOURCE.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(write_cifar("cifar10", tmp_path / "packed"), "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10_SOURCE, "url", address + archive.name)
    monkeypatch.setattr(CIFAR10_SOURCE, "tgz_md5", md5(archive))

    thread = Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    http_server.shutdown()
    thread.join()
    http_server.server_close()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("server")
def test_absent_idx_files_are_downloaded_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "mnist"
    raw = load_images("mnist", folder)

    assert raw.train.labels.tolist() == [1, 2]
    assert names_in(folder) == {f"{file}.gz" for file in IDX_FILES}
    assert capfd.readouterr() == ("", "")


def test_what_the_user_put_there_is_used_and_kept(server: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / TRAIN_LABELS).write_bytes(idx_labels(8, 9))
    (server / f"{TRAIN_LABELS}.gz").unlink()
    raw = load_images("mnist", own)

    assert raw.train.labels.tolist() == [8, 9]
    assert (own / TRAIN_LABELS).read_bytes() == idx_labels(8, 9)
    assert names_in(own) == {f"{file}.gz" for file in IDX_FILES} - {f"{TRAIN_LABELS}.gz"} | {TRAIN_LABELS}


def test_a_download_with_a_wrong_checksum_leaves_nothing(server: Path, tmp_path: Path) -> None:
    (server / f"{TEST_LABELS}.gz").write_bytes(gzip.compress(idx_labels(3, 4)))

    assert_sentence("mnist", tmp_path / "own", f"mnist lacks {TRAIN_IMAGES}.gz", "corrupted")
    assert not (tmp_path / "own").exists()


def test_a_file_that_no_mirror_has_is_one_sentence(server: Path, tmp_path: Path) -> None:
    (server / f"{TEST_LABELS}.gz").unlink()

    assert_sentence("mnist", tmp_path / "own", "HTTP Error 404")
    assert not (tmp_path / "own").exists()


@pytest.mark.usefixtures("server")
def test_absent_cifar_files_are_taken_out_of_the_downloaded_archive(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    marked = cifar_files("cifar10")["test_batch"] | {b"labels": [8, 9]}
    (own / "test_batch").write_bytes(pickle.dumps(marked))
    raw = load_images("cifar10", own)

    assert len(raw.train) == 10
    assert raw.test.labels.tolist() == [8, 9]
    assert names_in(own) == set(cifar_files("cifar10"))


def test_an_archive_that_the_user_fetched_is_unpacked(server: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (server / CIFAR10_SOURCE.filename).rename(own / CIFAR10_SOURCE.filename)

    assert len(load_images("cifar10", own).train) == 10


@pytest.mark.usefixtures("server")
def test_a_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / CIFAR10_SOURCE.filename).write_bytes(b"half an archive")

    assert_sentence("cifar10", tmp_path, f"{tmp_path / CIFAR10_SOURCE.filename} has a wrong checksum")


@pytest.mark.parametrize(
    ("name", "source", "addresses", "missing"),
    [
        ("mnist", MNIST_SOURCE, {"mirrors": [DEAD]}, f"{TRAIN_IMAGES}.gz, {TRAIN_LABELS}.gz"),
        ("cifar10", CIFAR10_SOURCE, {"url": DEAD}, "data_batch_1, data_batch_2"),
    ],
)
def test_without_a_network_the_sentence_says_what_goes_where(
    *,
    name: DatasetName,
    source: type,
    addresses: dict[str, Any],
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for attribute, address in addresses.items():
        monkeypatch.setattr(source, attribute, address)

    assert_sentence(name, tmp_path, f"{name} lacks {missing}", f"in {tmp_path}", f"from {DEAD} and put it there")
    assert names_in(tmp_path) == set()
    assert capfd.readouterr() == ("", "")


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(MNIST_SOURCE, "mirrors", [address])
        monkeypatch.setattr("collective_pipeline.data.small_images.TIMEOUT_SECONDS", 0.1)

        assert_sentence("mnist", tmp_path, "timed out")
    assert socket.getdefaulttimeout() is None


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mnist").touch()

    assert_sentence("mnist", tmp_path / "mnist", "File exists")
