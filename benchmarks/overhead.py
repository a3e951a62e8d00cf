"""What progress lines, tracking and checkpoints add to the time of training, over an engine that has none of them.

    python benchmarks/overhead.py [--arm collective] [--seeds 10] [--epochs 100] [--size phase1] [--device cuda]

The same training, again and again: bare, with each of them alone, with all. Progress lines go to a file. Tracking is
an active MLflow run in a database of its own, with the curves and with system metrics every two seconds; opening and
closing it is not counted. Checkpoints are saved at their usual interval, and at the end. Medians over the repeats;
the overhead is that over the bare training of the same repeat, its median with the smallest and the largest. The last
line is of one more training that saves often, so that savings in its midst can be timed.
"""

import contextlib
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import torch

from collective_pipeline.config import MODEL_TYPES, Arm, Parameters
from collective_pipeline.data.splits import Splits
from collective_pipeline.training import snapshots
from collective_pipeline.training.loop import Epoch
from collective_pipeline.training.progress import Progress
from collective_pipeline.training.runtime import choose_device
from collective_pipeline.training.snapshots import Snapshots
from collective_pipeline.training.tracking import Curves
from collective_pipeline.training.train import match_to_splits, snapshots_at, train_arm
from conditions import ROOT, describe, make_parser, settings_of, split_mnist

VARIANTS = {
    "bare": set(),
    "progress": {"progress"},
    "tracking": {"tracking"},
    "checkpoints": {"checkpoints"},
    "all three": {"progress", "tracking", "checkpoints"},
}
SYSTEM_METRICS_SECONDS = 2  # as in `hooks`, which would bring Kedro along


@dataclass(frozen=True)
class Bench:
    """What all variants share."""

    arm: Arm
    splits: Splits
    settings: Parameters
    device: torch.device
    folder: Path

    def train(self, parts: set[str]) -> float:
        """Seconds of training with these parts."""
        progress = Progress(
            self.arm.model_type,
            num_epochs=self.settings.training.epochs,
            num_arms=1,
            device_type=self.device.type,
        )
        options: dict[str, Any] = {"callbacks": []}
        if "progress" in parts:
            options["callbacks"].append(progress)
            options["watch"] = progress.watch
        if "tracking" in parts:
            options["callbacks"].append(Curves())
        if "checkpoints" in parts:
            options["snapshots"] = self.snapshots()
        with tracked() if "tracking" in parts else contextlib.nullcontext():
            return self.time(**options)

    def time(self, **options: Any) -> float:
        """Seconds of `train_arm`; it ends when the weights are on the CPU."""
        started = time.perf_counter()
        train_arm(
            self.arm,
            self.splits,
            self.settings.training,
            seeds=self.settings.seeds,
            device=self.device,
            **options,
        )
        return time.perf_counter() - started

    def snapshots(self) -> Snapshots:
        """Where a run would save its state."""
        return snapshots_at(self.folder / "last.safetensors", self.arm, self.splits, self.settings, self.device)

    def seconds_an_epoch(self) -> float:
        """Of the second epoch of a bare training."""
        clock: list[Epoch] = []
        config = self.settings.training.model_copy(update={"epochs": 2})
        train_arm(
            self.arm, self.splits, config, seeds=self.settings.seeds, device=self.device, callbacks=[clock.append]
        )
        return clock[1].seconds - clock[0].seconds

    def savings(self, seconds_between: float) -> list[float]:
        """Seconds for which training stood still in each saving; the last one is at its end."""
        snapshots.SECONDS_BETWEEN, snapshots.SHARE = seconds_between, 1.0
        saved, blocked = self.snapshots(), []
        save = saved.save

        def timed(*arguments: Any, **options: Any) -> None:
            started = time.perf_counter()
            save(*arguments, **options)
            blocked.append(time.perf_counter() - started)

        saved.save = timed  # type: ignore[method-assign]
        self.time(snapshots=saved)
        return blocked


@contextlib.contextmanager
def tracked() -> Iterator[None]:
    """An active MLflow run as an arm has it."""
    with mlflow.start_run(log_system_metrics=True):
        yield


def set_up(folder: Path) -> None:
    """A database for the tracked runs, and a file for the progress lines."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("overhead")
    mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_SECONDS)
    mlflow.set_system_metrics_samples_before_logging(1)
    lines = logging.FileHandler(folder / "progress.txt")
    lines.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("collective_pipeline")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def measure(bench: Bench, repeats: int) -> None:
    """Print the table."""
    config, num_seeds = bench.settings.training, len(bench.settings.seeds)
    print(
        f"{describe(bench.device)}\n{bench.arm.model_type}, {bench.arm.params:,} parameters, MNIST, batch "
        f"{config.batch_size}, {num_seeds} seed{'s' * (num_seeds > 1)}, {config.epochs} "
        f"epoch{'s' * (config.epochs > 1)}, {repeats} repeats"
    )
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats):
        # There and back, so that a machine that gets slower or faster favours none.
        for name in list(VARIANTS) if repeat % 2 == 0 else reversed(VARIANTS):
            seconds[name].append(bench.train(VARIANTS[name]))
    print(f"{'training with':<16}{'seconds':>9}{'overhead %':>13}")
    for name, times in seconds.items():
        row = f"{name:<16}{statistics.median(times):>9.2f}"
        if name != "bare":
            overheads = [100 * (time / bare - 1) for time, bare in zip(times, seconds["bare"], strict=True)]
            row += f"{statistics.median(overheads):>+13.1f} ({min(overheads):+.1f} to {max(overheads):+.1f})"
        print(row)

    usual, share = snapshots.SECONDS_BETWEEN, snapshots.SHARE
    *inside, at_end = bench.savings(statistics.median(seconds["bare"]) / 10)
    if not inside:
        print("checkpoints: training was too short for one in its midst")
        return
    blocked = statistics.median(inside)
    interval = max(usual, blocked / share)
    size = (bench.folder / "last.safetensors").stat().st_size / 2**20
    print(
        f"one checkpoint of {size:.1f} MiB blocks training for {blocked:.3f} s (median of {len(inside)}; "
        f"{at_end:.3f} s at the end), {100 * blocked / interval:.2f} % of the time at one every {interval:.0f} s"
    )


def main() -> None:
    """Measure."""
    parser = make_parser(__doc__)
    parser.add_argument("--arm", choices=MODEL_TYPES, default="collective")
    parser.add_argument("--seeds", type=int, default=1, help="stacked")
    parser.add_argument("--epochs", type=int, help="default: as many as take 5 s, on a GPU 20 s")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    settings, device = settings_of(options.size), choose_device(options.device)
    settings = settings.model_copy(update={"seeds": tuple(range(options.seeds))})
    splits = split_mnist(settings)
    arm = match_to_splits(settings, splits, options.arm)
    # On the disk that a run writes to: the system's temporary folder may be memory.
    with tempfile.TemporaryDirectory(dir=ROOT / "data", prefix="overhead-") as name:
        set_up(Path(name))
        bench = Bench(arm, splits, settings, device, Path(name))
        warm = bench.seconds_an_epoch()
        epochs = options.epochs or math.ceil((20 if device.type == "cuda" else 5) / warm)
        training = settings.training.model_copy(update={"epochs": epochs})
        measure(replace(bench, settings=settings.model_copy(update={"training": training})), options.repeats)


if __name__ == "__main__":
    main()
