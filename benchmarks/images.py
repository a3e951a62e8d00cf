"""How far a convolutional network gets in how many seconds, and whether a plain PyTorch loop gets as far.

    python benchmarks/images.py [--model resnet18] [--dataset cifar10] [--epochs 45 90] [--compile] [--plain]

One network alone on the device, trained as `deepmoe.training` says but for the epochs; gates, if it has some, are
frozen for the second half. With `--plain` torchvision's ResNet-18 with a 3x3 stem is trained on the same images by a
loop of torch's own parts: its optimiser, its schedule, its initialisation, its random generators, crops and mirror
images by indexing. Seconds are of training, validation and compilation; images are read before.
"""

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from collective_pipeline.config import IMAGE_MODEL_TYPES, DeepMoeConfig, GateConfig, TrainingConfig
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import Images, Splits, make_splits
from collective_pipeline.models.image_arms import image_architecture, make_image_arm
from collective_pipeline.training.runtime import choose_device
from collective_pipeline.training.train import score, train_arm
from conditions import ROOT, describe, make_parser

CROP = 4


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=IMAGE_MODEL_TYPES, default="resnet18")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--epochs", type=int, nargs="+", default=[45])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="what trains, by torch.compile")
    parser.add_argument("--plain", action="store_true", help="torchvision's ResNet-18 and a plain loop as well")
    options = parser.parse_args()
    device = choose_device(options.device)
    splits = make_splits(
        load_images(options.dataset, ROOT / "data" / "01_raw" / options.dataset), val_fraction=0.1, split_seed=42
    )
    print(f"{describe(device)}\n{options.dataset}, {len(splits.train):,} training images, {options.model}")
    print(f"{'loop':>10}{'epochs':>8}{'seed':>6}{'seconds':>9}{'s/epoch':>9}{'val %':>8}{'test %':>8}")
    for epochs in options.epochs:
        config = DeepMoeConfig().training.model_copy(update={"epochs": epochs, "compile": options.compile})
        for seed in range(42, 42 + options.seeds):
            tell("ours", seed, *train_ours(options.model, splits, config, seed, device))
            if options.plain:
                tell("plain", seed, *train_plain(splits, config, seed, device))


def tell(loop: str, seed: int, seconds: Sequence[float], val: float, test: float) -> None:
    """One row; `seconds` are the ends of all epochs. The first one compiles and is not part of the time an epoch."""
    each = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
    print(f"{loop:>10}{len(seconds):>8}{seed:>6}{seconds[-1]:>9.1f}{each:>9.3f}{val:>8.2f}{test:>8.2f}", flush=True)


def train_ours(
    model: str, splits: Splits, config: TrainingConfig, seed: int, device: torch.device
) -> tuple[list[float], float, float]:
    """This project's loop: the end of every epoch in seconds, and the accuracies of the epoch that validation chose."""
    architecture = image_architecture(model, splits.image_shape, GateConfig(freeze_epochs=config.epochs // 2))  # type: ignore[arg-type]
    arm = make_image_arm(model, architecture, num_classes=splits.num_classes)  # type: ignore[arg-type]
    seconds: list[float] = []
    checkpoint, fit = train_arm(
        arm, splits, config, seeds=[seed], device=device, callbacks=[lambda epoch: seconds.append(epoch.seconds)]
    )
    test = score(checkpoint, splits.test, splits, config, device=device)["accuracy"][0]
    return seconds, fit.best_accuracies[0], test


def train_plain(
    splits: Splits, config: TrainingConfig, seed: int, device: torch.device
) -> tuple[list[float], float, float]:
    """The same figures of torchvision's network and a loop as torch's documentation would have it."""
    torch.manual_seed(seed)
    network = torchvision.models.resnet18(num_classes=splits.num_classes)
    network.conv1, network.maxpool = nn.Conv2d(splits.image_shape[0], 64, 3, padding=1, bias=False), nn.Identity()
    network = network.to(device, memory_format=torch.channels_last)
    step_network = torch.compile(network) if config.compile and device.type == "cuda" else network
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    train, val, test = (part.to(device) for part in (splits.train, splits.val, splits.test))
    steps = len(train) // config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * steps, cycle_momentum=False
    )
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in (splits.mean, splits.std))
    padded = F.pad(train.images, [CROP] * 4)
    seconds, best, of_best = [], -1.0, 0.0
    started = time.perf_counter()
    for _ in range(config.epochs):
        network.train()
        for index in torch.randperm(len(train), device=device)[: steps * config.batch_size].split(config.batch_size):
            x = cut((crop_and_mirror(padded[index], train.images.shape[-1]).float() - mean) / std, config.cutout)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = step_network(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), train.labels[index], label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracy = accuracy_of(network, val, mean, std, config)
        seconds.append(time.perf_counter() - started)
        if accuracy > best:
            best, of_best = accuracy, accuracy_of(network, test, mean, std, config)
    return seconds, best, of_best


def crop_and_mirror(padded: Tensor, side: int) -> Tensor:
    """A window of every padded image `(n, C, H + 8, W + 8)`, half of them mirrored."""
    images = torch.arange(len(padded), device=padded.device)[:, None, None]
    down, right = torch.randint(0, 2 * CROP + 1, (2, len(padded), 1, 1), device=padded.device)
    place = torch.arange(side, device=padded.device)
    columns = torch.where(torch.rand(len(padded), 1, device=padded.device) < 0.5, place, place.flip(0))
    return padded.permute(0, 2, 3, 1)[images, down + place[:, None], right + columns[:, None]].permute(0, 3, 1, 2)


def cut(images: Tensor, side: int) -> Tensor:
    """A square of every image set to 0."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)[:, None] - torch.randint(
        0, height, (len(images), 1, 1, 1), device=images.device
    )
    x = torch.arange(width, device=images.device) - torch.randint(
        0, width, (len(images), 1, 1, 1), device=images.device
    )
    inside = (y >= -side // 2) & (y < side // 2) & (x >= -side // 2) & (x < side // 2)
    return images.masked_fill(inside, 0.0)


@torch.inference_mode()
def accuracy_of(network: nn.Module, images: Images, mean: Tensor, std: Tensor, config: TrainingConfig) -> float:
    """In percent."""
    network.eval()
    right = 0
    for pixels, labels in zip(images.images.split(1000), images.labels.split(1000), strict=True):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = network(((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last))
        right += int((logits.argmax(dim=1) == labels).sum())
    return 100 * right / len(images)


if __name__ == "__main__":
    main()
