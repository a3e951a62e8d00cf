"""Seconds of one training epoch on MNIST: this project's loop against two ways of writing it by hand, in one run.

    python benchmarks/training.py [--size debug|phase1] [--device auto] [--seeds 3]

`plain` is eager PyTorch with one module for each member and the images as tensors in memory. `DataLoader` is the same
network fed by torchvision's dataset, its transforms on PIL images and worker processes, the way the originals did it;
it is timed on some batches and scaled to the epoch. One table, in seconds an epoch and seed.
"""

import argparse
import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from collective_pipeline.config import DEBUG, PHASE1, CollectiveConfig, Parameters, TrainingConfig
from collective_pipeline.data.batches import Batches
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import Splits, make_splits
from collective_pipeline.models.matching import match_arm
from collective_pipeline.training.runtime import choose_device
from collective_pipeline.training.train import train_arm

FOLDER = Path(__file__).parents[1] / "data" / "01_raw" / "mnist"
LOADER_BATCHES = 40


def member(in_dim: int, hidden: Iterable[int], out_dim: int) -> nn.Sequential:
    """An expert or analyst as separate torch modules."""
    dims = [in_dim, *hidden]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
        if i < len(dims) - 2:
            layers.append(nn.Dropout(0.2))
    return nn.Sequential(*layers, nn.Linear(dims[-1], out_dim))


class PlainCollective(nn.Module):
    """The default collective, written out member by member."""

    def __init__(self, config: CollectiveConfig) -> None:
        super().__init__()
        joined, encoded = config.num_experts * config.expert_output, config.encoded_dim
        hidden = int((joined * encoded) ** 0.5)
        self.experts = nn.ModuleList(
            member(784, config.expert_hidden, config.expert_output) for _ in range(config.num_experts)
        )
        self.encoder = nn.Sequential(
            nn.Linear(joined, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, encoded)
        )
        self.analysts = nn.ModuleList(
            member(784 + encoded, config.analyst_hidden, config.analyst_output) for _ in range(config.num_analysts)
        )
        width = config.head_input_dim
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(torch.cat([expert(x) for expert in self.experts], dim=1))
        xh = torch.cat([x, h], dim=1)
        logits: Tensor = self.head(torch.cat([analyst(xh) for analyst in self.analysts], dim=1))
        return logits


def time_plain(
    settings: Parameters, batches: Iterable[tuple[Tensor, Tensor]], num_batches: int, device: torch.device
) -> float:
    """Seconds of `num_batches` steps of the plain loop, after a few to warm up."""
    model = PlainCollective(settings.collective).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    iterator = iter(batches)

    def steps(number: int) -> None:
        for x, y in itertools.islice(iterator, number):
            logits = model(x.to(device).flatten(1))
            loss = nn.functional.cross_entropy(logits, y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait(device)

    steps(5)
    started = time.perf_counter()
    steps(num_batches - 5)
    return (time.perf_counter() - started) * num_batches / (num_batches - 5)


def time_ours(settings: Parameters, splits: Splits, training: TrainingConfig, num_seeds: int, name: str) -> float:
    """Seconds of the last of two epochs of this project's loop, validation included, for each seed."""
    arm = match_arm(name, settings.collective, settings.baselines, in_dim=splits.in_dim, num_classes=splits.num_classes)
    config = training.model_copy(update={"epochs": 2})
    seconds: list[float] = []
    train_arm(
        arm,
        splits,
        config,
        seeds=range(num_seeds),
        device=choose_device(settings.device),
        callbacks=[lambda epoch: seconds.append(epoch.seconds)],
    )
    return (seconds[1] - seconds[0]) / num_seeds


def as_originally(splits: Splits, batch_size: int, *, augment: bool) -> DataLoader[tuple[Tensor, Tensor]]:
    """torchvision's dataset, PIL transforms, worker processes."""
    steps = [transforms.RandomRotation(10), transforms.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1))]
    normalise = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    dataset = MNIST.__new__(MNIST)
    dataset.data, dataset.targets = splits.train.images[:, 0], splits.train.labels
    dataset.transform, dataset.target_transform = transforms.Compose([*(steps if augment else []), *normalise]), None
    subset = Subset(dataset, range(batch_size * LOADER_BATCHES))
    return DataLoader(subset, batch_size=batch_size, shuffle=True, num_workers=2, drop_last=True)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["debug", "phase1"], default="debug")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3, help="stacked in this project's loop")
    options = parser.parse_args()

    settings = (DEBUG if options.size == "debug" else PHASE1).model_copy(update={"device": options.device})
    device = choose_device(options.device)
    splits = make_splits(load_images("mnist", FOLDER), val_fraction=0.1, split_seed=42)
    batch_size = settings.training.batch_size
    steps = len(splits.train) // batch_size
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(
        f"Collective, {options.size} size, MNIST, batch {batch_size}, {steps} steps an epoch; torch "
        f"{torch.__version__}, {device.type}, {threads}"
    )
    print(f"{'seconds an epoch and seed':<34}{'no augmentation':>18}{'augmentation':>16}")

    rows: dict[str, list[float]] = {"DataLoader and PIL, 2 workers": [], "plain, tensors in memory": []}
    ours = {1: "this project, 1 seed", options.seeds: f"this project, {options.seeds} seeds stacked"}
    for augment in (False, True):
        loader = as_originally(splits, batch_size, augment=augment)
        rows["DataLoader and PIL, 2 workers"].append(
            time_plain(settings, loader, LOADER_BATCHES, device) * steps / LOADER_BATCHES
        )
        training = settings.training.model_copy(update={"augmentation_strength": float(augment)})
        batches = Batches(splits.to(device), [0], batch_size=batch_size, augmentation_strength=float(augment))
        plain = ((x[0], y[0]) for x, y in batches)
        rows["plain, tensors in memory"].append(time_plain(settings, plain, steps, device))
        for num_seeds, label in ours.items():
            rows.setdefault(label, []).append(time_ours(settings, splits, training, num_seeds, "collective"))
    for label, values in rows.items():
        print(f"{label:<34}{values[0]:>18.2f}{values[1]:>16.2f}")
    best, slow = rows[ours[options.seeds]], rows["DataLoader and PIL, 2 workers"]
    print(f"{'DataLoader / this project stacked':<34}{slow[0] / best[0]:>17.1f}x{slow[1] / best[1]:>15.1f}x")


if __name__ == "__main__":
    main()
