"""One thread for all tests (two on busy cores were 12 times slower), and a project to run as a user would."""

import gzip
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest
import torch

from collective_pipeline.data.splits import Images, RawImages, Splits, make_splits
from collective_pipeline.training import gpu, loop

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run here, slowly; read when Triton is imported

ROOT = Path(__file__).parents[1]
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def wait_until(happened: Callable[[], object]) -> None:
    """For what other threads and processes do."""
    for _ in range(6000):
        if happened():
            return
        time.sleep(0.05)
    raise TimeoutError


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


CLASSES, SIDE = 3, 6


def make_images(num_images: int, seed: int) -> Images:
    """Each class is a bright row of its own in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % CLASSES
    images = torch.randint(0, 100, (num_images, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    images[torch.arange(num_images), 0, 2 * labels] += 120
    return Images(images, labels)


@pytest.fixture(scope="session")
def splits() -> Splits:
    raw = RawImages("mnist", make_images(330, 0), make_images(60, 1), tuple("abc"))
    return make_splits(raw, val_fraction=0.1, split_seed=0)


@pytest.fixture(scope="session")
def new_project() -> Callable[[Path], Path]:
    """Makes a project in an empty folder."""
    return make_project


class Driver:
    """Stands in for the driver of a machine with two cards, the second of which torch calls its first.

    Attributes:
        watts: Of the second card, at all times since `now` was 0.
        refused: Queries that end in an error, with its code.
        visible: What the second card is called.
    """

    def __init__(self) -> None:
        self.now: float | None = None
        self.watts = 300.0
        self.busy = 40
        self.refused: dict[str, int] = {}
        self.visible = "GPU-b"
        self.num_readings = 0

    def answer(self, name: str, value: Callable) -> Callable:
        def query(*arguments):
            if name in self.refused:
                raise pynvml.NVMLError(self.refused[name])
            return value(*arguments)

        return query

    def handle(self, uuid: str) -> int:
        if uuid != self.visible:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return 1

    def utilization(self, card: int) -> SimpleNamespace:
        self.num_readings += card
        return SimpleNamespace(gpu=card * self.busy)


@pytest.fixture
def driver(monkeypatch) -> Driver:
    """Every training measures its second card, wherever it trains; time stands still once `now` is set."""
    driver = Driver()
    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": driver.handle,
        "nvmlDeviceGetUtilizationRates": driver.utilization,
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(used=card * 2e9, total=8e9),
        "nvmlDeviceGetPowerUsage": lambda card: card * 1e3 * driver.watts,
        "nvmlDeviceGetEnforcedPowerLimit": lambda card: 700e3,
        "nvmlDeviceGetTemperature": lambda card, sensor: card * 55,
        "nvmlDeviceGetTotalEnergyConsumption": lambda card: card * 1e3 * driver.watts * gpu.time.perf_counter(),
    }
    for name, value in answers.items():
        monkeypatch.setattr(pynvml, name, driver.answer(name, value))
    monkeypatch.setattr(gpu, "_cards", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="b"))
    perf_counter = gpu.time.perf_counter
    clock = SimpleNamespace(perf_counter=lambda: perf_counter() if driver.now is None else driver.now)
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(loop, "Meter", lambda device, before, **more: gpu.Meter(torch.device("cuda"), before, **more))
    return driver
