"""How long answers take on a device, and whether it rewards closed gates."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
import torch

from collective_pipeline.config import Arm
from collective_pipeline.data.batches import Normalise
from collective_pipeline.data.splits import Images
from collective_pipeline.evaluation.cost import count_layers, executed_macs, open_shares
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.image_classifier import ImageClassifier
from collective_pipeline.models.packing import PackedClassifier, can_be_packed
from collective_pipeline.randomness import make_generator

WARM_UP = 10
REPEATS = 100
ROUNDS = 30
BATCH_SIZES = (1, 32, 512)
SKIPPING_COLUMNS = ("batch_size", "executed_pct", "without_gates_ms", "with_gates_ms", "skipping_ms")


def measure_latency(arm: Arm, device: torch.device, *, batch_size: int = 1) -> float:
    """Median milliseconds from a batch on the device, by default of one image, to its logits there, over 100 times."""
    model = build_arm(arm).to(device).eval()
    images = torch.zeros(1, batch_size, arm.in_dim, device=device)
    with torch.inference_mode():
        times = take_turns({"model": partial(model, images)}, device, rounds=REPEATS, warm_up=WARM_UP)
    return statistics.median(times["model"])


def measure_skipping(checkpoint: Checkpoint, dense: Checkpoint, images: Images, device: torch.device) -> pd.DataFrame:
    """What a network takes without gates, with gates, and where shut gates are skipped (`models.packing`).

    A row for each of `BATCH_SIZES`, with medians over 30 rounds in which the three take turns on the same images, other
    ones in every round, in an order without meaning; `executed_pct` is the part of the dense network's multiply-adds
    that one of them needs. No rows where there are no gates that can be skipped.

    Args:
        checkpoint: What was trained, of which the first seed that did not diverge is measured.
        dense: The same network without gates, likewise.
        images: Uint8, for example the test images.
        device: Where to measure.
    """
    nothing = pd.DataFrame(columns=list(SKIPPING_COLUMNS))
    if not checkpoint.good_seeds or not dense.good_seeds:
        return nothing
    model = checkpoint.of_seeds(checkpoint.good_seeds[:1]).build().to(device).requires_grad_(False)
    if not isinstance(model, ImageClassifier) or not can_be_packed(model):
        return nothing
    ways = {
        "without_gates_ms": dense.of_seeds(dense.good_seeds[:1]).build().to(device),
        "with_gates_ms": model,
        "skipping_ms": PackedClassifier(model).to(device).eval(),
    }
    normalise, layers = Normalise(checkpoint.images, device), count_layers(checkpoint.arm)
    whole = sum(layer.macs for layer in count_layers(dense.arm))
    # A data set may lie class by class, and images of one class open much the same gates.
    order = torch.randperm(len(images), generator=make_generator(0, "skipping"))
    rows = []
    with torch.inference_mode():
        for batch_size in BATCH_SIZES:
            times: dict[str, list[float]] = {name: [] for name in ways}
            shares = []
            for number in range(-WARM_UP, ROUNDS):
                places = order[torch.arange(batch_size).add(number * batch_size) % len(images)]
                x_1BI = normalise(images.images[places].to(device)).unsqueeze(0)
                taken = take_turns({name: partial(way, x_1BI) for name, way in ways.items()}, device)
                if number < 0:
                    continue
                for name, milliseconds in taken.items():
                    times[name] += milliseconds
                open_BL = open_shares(model(x_1BI)[1]["gates"][0], model.gated_channels).double()
                shares.append(float(executed_macs(layers, open_BL).mean()) / whole)
            medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
            rows.append({"batch_size": batch_size, "executed_pct": 100 * statistics.mean(shares), **medians})
    return pd.DataFrame(rows, columns=list(SKIPPING_COLUMNS))


def take_turns(
    ways: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 1, warm_up: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of each, one after another in every round: whatever else the machine does meets all alike.

    Args:
        ways: What to time, by name.
        device: Is waited for.
        rounds: That count.
        warm_up: Rounds before those.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warm_up, rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number >= 0:
                times[name].append(1000 * (time.perf_counter() - started))
    return times
