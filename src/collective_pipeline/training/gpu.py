"""What a GPU does while arms train on it: utilisation, memory, power, temperature and energy, as its driver tells.

The figures are those of the whole card, other programs on it included. Arms of this process that train on it at the
same time see the same ones; the card's energy and time are divided evenly among them, so that their joules and seconds
sum to the card's.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import pynvml
import torch

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_READINGS = 1.0
# Each asked on its own: laptops do not tell their power, parts of a card (MIG) not their utilisation.
QUERIES: Mapping[str, Callable[[Any], float]] = {
    "utilization": lambda card: pynvml.nvmlDeviceGetUtilizationRates(card).gpu,
    "memory_mb": lambda card: pynvml.nvmlDeviceGetMemoryInfo(card).used / 1e6,
    "memory_mb_total": lambda card: pynvml.nvmlDeviceGetMemoryInfo(card).total / 1e6,
    "power_watts": lambda card: pynvml.nvmlDeviceGetPowerUsage(card) / 1e3,
    "power_watts_limit": lambda card: pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1e3,
    "temperature_celsius": lambda card: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU),
}
LIMITS = ("memory_mb_total", "power_watts_limit")


@dataclass(frozen=True)
class Usage:
    """Of a card over some time. What could not be read at some moment of it is left out.

    Attributes:
        seconds: How long.
        mean: Of each of `QUERIES`, weighted by time.
        peak: The highest reading of each.
        joules: One arm's part of the card's energy; None if it is not known for all of the time.
        gpu_seconds: One arm's part of the card's time, whatever its driver tells; 0 where there is no card.
    """

    seconds: float = 0.0
    mean: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    joules: float | None = None
    gpu_seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        """Of both times together."""
        if not self.seconds or not other.seconds:
            return self if self.seconds else other
        seconds = self.seconds + other.seconds
        names = [name for name in self.mean if name in other.mean]
        return Usage(
            seconds,
            {n: (self.seconds * self.mean[n] + other.seconds * other.mean[n]) / seconds for n in names},
            {n: max(self.peak[n], other.peak[n]) for n in names},
            None if self.joules is None or other.joules is None else self.joules + other.joules,
            self.gpu_seconds + other.gpu_seconds,
        )

    @property
    def figures(self) -> dict[str, float]:
        """What is known, by the names of the tables' columns."""
        named = {}
        for name, mean in self.mean.items():
            if name in LIMITS:
                named[f"gpu_{name}"] = mean
            else:
                named |= {f"gpu_{name}_mean": mean, f"gpu_{name}_peak": self.peak[name]}
        if self.joules is not None:
            named["joules"] = self.joules
        if self.gpu_seconds:
            named["gpu_seconds"] = self.gpu_seconds
        return {name: round(value, 3) for name, value in named.items()}


class Meter:
    """Measures the usage of the device while one arm trains, in a `with` block; without an NVIDIA GPU it stays empty.

    Args:
        device: Where the arm trains.
        before: What was measured before training was interrupted.
        number: Of devices like this one that are at work alike: energy and time are counted for all of them.

    Attributes:
        usage: As of the last reading, which is a second old at most.
    """

    def __init__(self, device: torch.device, before: Usage, *, number: int = 1) -> None:
        self.usage = before
        self.number = number
        self._card = _card_of(device)

    def __enter__(self) -> Self:
        self._card.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._card.end(self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the card does meanwhile is not for the training."""
        self._card.end(self)
        try:
            yield
        finally:
            self._card.begin(self)

    def read(self) -> Usage:
        """The usage as of now."""
        self._card.read()
        return self.usage


class _Card:
    """A card, and the meters of the arms that train on it; with no handle, one that tells nothing.

    Its time counts even then, unless it `is_gpu` not at all.
    """

    def __init__(self, handle: Any | None, *, is_gpu: bool) -> None:
        self.handle = handle
        self.is_gpu = is_gpu
        self.lock = threading.Lock()
        self.meters: list[Meter] = []
        self.ended = threading.Event()
        self.last_time = 0.0
        self.last_energy: float | None = None

    def begin(self, meter: Meter) -> None:
        """From now on this meter's arm is at work too."""
        self.read()
        with self.lock:
            self.meters.append(meter)
            if len(self.meters) == 1 and self.handle is not None:
                self.ended = threading.Event()
                threading.Thread(target=self._watch, args=(self.ended,), name="gpu", daemon=True).start()

    def end(self, meter: Meter) -> None:
        """From now on it is not."""
        self.read()
        with self.lock:
            self.meters.remove(meter)
            if not self.meters:
                self.ended.set()

    def read(self) -> None:
        """Give each meter what happened since the last reading; what is told now is taken for all of that time."""
        with self.lock:
            values, energy = _ask(self.handle)
            now = time.perf_counter()
            seconds = now - self.last_time
            joules = seconds * values["power_watts"] if "power_watts" in values else None
            # Newer cards count their energy themselves, between readings as well.
            if energy is not None and self.last_energy is not None:
                joules = energy - self.last_energy
            for meter in self.meters:
                part = meter.number / len(self.meters)
                own_seconds = seconds * part if self.is_gpu else 0.0
                meter.usage += Usage(seconds, values, values, None if joules is None else joules * part, own_seconds)
            self.last_time, self.last_energy = now, energy

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(SECONDS_BETWEEN_READINGS):
            self.read()


def _ask(handle: Any | None) -> tuple[dict[str, float], float | None]:
    """The values of all `QUERIES` that the card answers; and the joules since its driver was loaded."""
    values: dict[str, float] = {}
    if handle is None:
        return values, None
    for name, query in QUERIES.items():
        try:
            values[name] = float(query(handle))
        except pynvml.NVMLError:
            continue
    try:
        return values, pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError:
        return values, None


_cards: dict[str, _Card] = {}
_finding = threading.Lock()


def _card_of(device: torch.device) -> _Card:
    """The one of this device, shared by all arms."""
    if device.type != "cuda":
        return _Card(None, is_gpu=False)
    # CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER give cards other numbers than the driver's.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    with _finding:
        if uuid not in _cards:
            _cards[uuid] = _Card(_find(uuid), is_gpu=True)
        return _cards[uuid]


def _find(uuid: str) -> Any | None:
    """The driver's handle of the card, or of the part of a card; None, told in one sentence, if it gives none."""
    try:
        pynvml.nvmlInit()
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError:
            return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    except pynvml.NVMLError as error:
        logger.warning(
            "The GPU's driver does not tell its utilisation, memory or power here (%s): their columns stay empty.",
            error,
        )
        return None
