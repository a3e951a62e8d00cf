"""Training throughput on MNIST: this project's loop against a plain PyTorch loop, alternating, in one process.

    python benchmarks/training.py [--arms all] [--seeds "1 3 10"] [--augmentation 0] [--size phase1] [--device cuda]

The numbers are training images a second; where seeds are stacked, every seed's images count. `DataLoader` is the same
network made of torch's own modules, each member by itself, fed by torchvision's dataset, its transforms on PIL images
and worker processes, the way the originals did it; it is timed on some batches, and on a CPU with as many threads as
its workers leave. `in memory` is that network fed with this project's batches. This project's loop is timed by its own
clock over whole epochs after the first (on a CPU, of a quarter of all images), with validation, which the plain loop
is spared. Medians over the rounds; behind the ratio its smallest and largest.
"""

import contextlib
import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from collective_pipeline.config import MODEL_TYPES, Arm, CollectiveConfig, MlpArchitecture, TrainingConfig
from collective_pipeline.data.batches import Batches
from collective_pipeline.data.splits import Images, Splits
from collective_pipeline.models.matching import match_arm
from collective_pipeline.training.runtime import choose_device, set_matmul_precision
from collective_pipeline.training.train import train_arm
from conditions import describe, make_parser, settings_of, split_mnist

WARM_UP_BATCHES = 10
PLAIN_BATCHES = 80


class Residual(nn.Module):
    """relu(norm(W x + b) + skip(x)), then dropout."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.norm = nn.BatchNorm1d(out_dim)
        self.skip = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(self.norm(self.linear(x)) + self.skip(x)))
        return y


def hidden_layers(dims: Sequence[int], dropout: Sequence[float], *, residual: bool = False) -> list[nn.Module]:
    """One or four modules for each pair of widths."""
    layers: list[nn.Module] = []
    for (in_dim, out_dim), rate in zip(itertools.pairwise(dims), dropout, strict=True):
        if residual:
            layers.append(Residual(in_dim, out_dim, rate))
        else:
            layers += [nn.Linear(in_dim, out_dim), nn.BatchNorm1d(out_dim), nn.ReLU(), nn.Dropout(rate)]
    return layers


class PlainCollective(nn.Module):
    """The collective, member by member."""

    def __init__(self, config: CollectiveConfig, in_dim: int, num_classes: int) -> None:
        super().__init__()
        joined, encoded, width = config.num_experts * config.expert_output, config.encoded_dim, config.head_input_dim
        between = int((joined * encoded) ** 0.5)

        def member(in_dim: int, hidden: Sequence[int], out_dim: int) -> nn.Sequential:
            dropout = [*[config.member_dropout] * (len(hidden) - 1), 0.0]
            return nn.Sequential(*hidden_layers([in_dim, *hidden], dropout), nn.Linear(hidden[-1], out_dim))

        self.experts = nn.ModuleList(
            member(in_dim, config.expert_hidden, config.expert_output) for _ in range(config.num_experts)
        )
        self.encoder = nn.Sequential(
            *hidden_layers([joined, between], [config.encoder_dropout]), nn.Linear(between, encoded)
        )
        self.analysts = nn.ModuleList(
            member(in_dim + encoded, config.analyst_hidden, config.analyst_output) for _ in range(config.num_analysts)
        )
        hidden = max(int(width * config.collective_hidden_scale), 2 * num_classes)
        self.head = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.head_dropout), nn.Linear(hidden, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(torch.cat([expert(x) for expert in self.experts], dim=1))
        xh = torch.cat([x, h], dim=1)
        logits: Tensor = self.head(torch.cat([analyst(xh) for analyst in self.analysts], dim=1))
        return logits


def build_plain(arm: Arm) -> nn.Module:
    """The arm's network out of torch's own modules."""
    match arm.architecture:
        case CollectiveConfig() as config:
            plain: nn.Module = PlainCollective(config, arm.in_dim, arm.num_classes)
        case MlpArchitecture(hidden_dims=hidden, dropout=rate, residual=residual):
            layers = hidden_layers([arm.in_dim, *hidden], [rate] * len(hidden), residual=residual)
            plain = nn.Sequential(*layers, nn.Linear(hidden[-1], arm.num_classes))
    params = sum(weight.numel() for weight in plain.parameters())
    assert params == arm.params, f"{arm.model_type}: {params:,} parameters in plain modules, {arm.params:,} in the arm"
    return plain


def time_plain(
    arm: Arm, batches: Iterator[tuple[Tensor, Tensor]], num_batches: int, config: TrainingConfig, device: torch.device
) -> float:
    """Images a second of the plain loop over `num_batches`, after a few to warm up."""
    set_matmul_precision(config, device)
    model = build_plain(arm).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    def train(number: int) -> None:
        for _ in range(number):
            x, y = next(batches)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(device).flatten(1)), y.to(device))
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    train(WARM_UP_BATCHES)
    started = time.perf_counter()
    train(num_batches)
    return num_batches * config.batch_size / (time.perf_counter() - started)


def time_ours(arm: Arm, splits: Splits, config: TrainingConfig, num_seeds: int, device: torch.device) -> float:
    """Training images a second of this project's loop, all seeds together; the median of all epochs but the first."""
    clock: list[float] = []
    train_arm(
        arm,
        splits,
        config,
        seeds=range(num_seeds),
        device=device,
        callbacks=[lambda epoch: clock.append(epoch.seconds)],
    )
    seconds = statistics.median(after - before for before, after in itertools.pairwise(clock))
    return len(splits.train) // config.batch_size * config.batch_size * num_seeds / seconds


def as_originally(
    splits: Splits, batch_size: int, num_workers: int, *, augment: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """torchvision's dataset, PIL transforms, worker processes."""
    moves = [transforms.RandomRotation(10), transforms.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1))]
    normalise = [transforms.ToTensor(), transforms.Normalize(splits.mean, splits.std)]
    # Without its constructor, which wants the files unpacked.
    dataset = MNIST.__new__(MNIST)
    dataset.data, dataset.targets = splits.train.images[:, 0], splits.train.labels
    dataset.transform, dataset.target_transform = transforms.Compose([*(moves if augment else []), *normalise]), None
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=num_workers, drop_last=True)


@contextlib.contextmanager
def threads_beside(num_workers: int, device: torch.device) -> Iterator[None]:
    """Leave the workers their cores: with all threads the DataLoader's loop took twice as long on two cores."""
    usual = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, usual - num_workers))
    yield
    torch.set_num_threads(usual)


def in_memory(splits: Splits, config: TrainingConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """This project's batches of one seed, for as many epochs as are asked for."""
    batches = Batches(splits, [0], batch_size=config.batch_size, augmentation_strength=config.augmentation_strength)
    for epoch in itertools.count(1):
        yield from ((x_SBI[0], y_SB[0]) for x_SBI, y_SB in batches.epoch(epoch))


def every_fourth(images: Images) -> Images:
    """A quarter of them."""
    return images[torch.arange(0, len(images), 4)]


def print_row(name: str, params: str, speeds: Iterable[str], ratio: str) -> None:
    print(f"{name:<17}{params:>11}" + "".join(f"{speed:>12}" for speed in speeds) + f"  {ratio}", flush=True)


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--arms", default="collective shallow very_deep_resnet", help="names, or 'all'")
    parser.add_argument("--seeds", default="1 3", help="numbers of seeds stacked")
    parser.add_argument("--augmentation", type=float, choices=[0, 1], default=1, help="0: none; 1: as in phase 1")
    parser.add_argument("--epochs", type=int, help="of this project's loop, the first not timed; 3, on a GPU 20")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two sides take turns")
    parser.add_argument(
        "--workers", type=int, default=min(6, os.cpu_count() or 1), help="of the DataLoader; the originals had 6 or 8"
    )
    options = parser.parse_args()

    device = choose_device(options.device)
    settings = settings_of(options.size)
    epochs = options.epochs or (20 if device.type == "cuda" else 3)
    config = settings.training.model_copy(update={"epochs": epochs, "augmentation_strength": options.augmentation})
    arms = MODEL_TYPES if options.arms == "all" else options.arms.split()
    stacks = sorted(int(number) for number in options.seeds.split())
    splits = split_mnist(settings)
    timed = splits
    if device.type == "cpu":
        timed = replace(splits, train=every_fourth(splits.train), val=every_fourth(splits.val))
    on_device = splits.to(device)

    print(
        f"{describe(device)}\nMNIST, {options.size} size, batch {config.batch_size}, "
        f"{'with' if options.augmentation else 'without'} augmentation, {options.workers} DataLoader "
        f"workers, {options.rounds} rounds"
    )
    print_row(
        "training images/s",
        "parameters",
        ["DataLoader", "in memory", *(f"{number} seed{'s' if number > 1 else ''}" for number in stacks)],
        f"{stacks[-1]} / DataLoader",
    )
    for name in arms:
        arm = match_arm(
            name, settings.collective, settings.baselines, in_dim=splits.in_dim, num_classes=splits.num_classes
        )
        speeds: dict[str | int, list[float]] = defaultdict(list)
        for _ in range(options.rounds):
            loader = as_originally(splits, config.batch_size, options.workers, augment=bool(options.augmentation))
            with threads_beside(options.workers, device):
                speeds["loader"].append(time_plain(arm, iter(loader), PLAIN_BATCHES, config, device))
            speeds["memory"].append(time_plain(arm, in_memory(on_device, config), PLAIN_BATCHES, config, device))
            for number in stacks:
                speeds[number].append(time_ours(arm, timed, config, number, device))
        ratios = [ours / plain for ours, plain in zip(speeds[stacks[-1]], speeds["loader"], strict=True)]
        print_row(
            name,
            f"{arm.params:,}",
            [f"{statistics.median(values):,.0f}" for values in speeds.values()],
            f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})",
        )


if __name__ == "__main__":
    main()
