"""One thread for all tests (two on busy cores were 12 times slower), and a project to run as a user would."""

import gzip
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run here, slowly; read when Triton is imported

ROOT = Path(__file__).parents[1]
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def make_project(folder: Path) -> Path:
    """This project's configuration beside a few hundred images; each class has a bright row of its own."""
    shutil.copytree(ROOT / "conf", folder / "conf", ignore=shutil.ignore_patterns("local"))
    (folder / "conf" / "local").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / ".telemetry", folder)
    (folder / "src").mkdir()
    raw = folder / "data" / "01_raw" / "mnist"
    raw.mkdir(parents=True)
    for part, num_images in ((0, 600), (2, 100)):
        generator = np.random.default_rng(part)
        labels = (np.arange(num_images) % 10).astype(np.uint8)
        images = generator.integers(0, 100, (num_images, 28, 28), dtype=np.uint8)
        images[np.arange(num_images), 2 * labels] += 120
        write_idx(raw / f"{FILES[part]}.gz", images)
        write_idx(raw / f"{FILES[part + 1]}.gz", labels)
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    """An idx file of bytes, packed."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


@pytest.fixture(scope="session")
def new_project() -> Callable[[Path], Path]:
    """Makes a project in an empty folder."""
    return make_project
