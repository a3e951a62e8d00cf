"""What shut gates save, and what gates cost: a ResNet-18 with gated channels against the same one without.

    python benchmarks/gates.py [--device cuda] [--width 64]

Answers: the network without gates, the one with gates as it trains, and the one that skips what is shut
(`models.packing`), for one image and for 32. Which channels are shut is drawn for each layer, the same for all images:
the best case for a group of images. Steps: forward and backward, of 128 images. The three take turns, so that whatever
else the machine does meets all alike; ratios are medians over the rounds.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from collective_pipeline.config import Arm, GateConfig
from collective_pipeline.evaluation.cost import count_layers, count_macs, executed_macs, open_shares
from collective_pipeline.evaluation.latency import take_turns
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.image_arms import image_architecture, make_image_arm
from collective_pipeline.models.image_classifier import ImageClassifier
from collective_pipeline.models.packing import PackedClassifier
from collective_pipeline.randomness import make_generator
from collective_pipeline.training.losses import make_objective
from collective_pipeline.training.runtime import choose_device
from conditions import describe

SHUT = (0.0, 0.25, 0.5, 0.75, 0.9)
OPEN, CLOSED = 1.0, -1e6


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    device = choose_device(options.device)
    dense, gated = (make_arm(name, options.width) for name in ("resnet18", "resnet18_moe"))
    print(f"{describe(device)}; ResNet-18 of width {options.width}, 32 pixels; {options.rounds} rounds")

    print("\nAnswers: ms without gates; with gates, and skipping what is shut, as a multiple of it")
    print(f"{'images':>6}{'shut %':>8}{'multiply-adds':>15}{'without':>10}{'with gates':>12}{'skipping':>10}")
    for batch_size in (1, 32):
        x = torch.randn(1, batch_size, dense.in_dim, device=device)
        for share in SHUT:
            whole = ready(dense, device)
            model = shut(ready(gated, device), share)
            with torch.inference_mode():
                open_L = open_shares(model(x)[1]["gates"][0, :1], model.gated_channels)[0]
                left = float(executed_macs(count_layers(gated), open_L)) / count_macs(dense)
                ways = {"without": whole, "gates": model, "skipping": PackedClassifier(model, group_size=batch_size)}
                calls = {name: partial(way, x) for name, way in ways.items()}
                times = take_turns(calls, device, rounds=options.rounds, warm_up=2)
            base = statistics.median(times["without"])
            print(
                f"{batch_size:>6}{100 * share:>8.0f}{left:>14.2f}x{base:>10.2f}"
                f"{ratio(times['gates'], times['without']):>11.2f}x{ratio(times['skipping'], times['without']):>9.2f}x"
            )

    print("\nSteps: ms without gates, and with gates as a multiple of it")
    x, y = torch.randn(1, 128, dense.in_dim, device=device), torch.randint(0, 10, (1, 128), device=device)
    steps = {arm.model_type: make_step(arm, x, y, device) for arm in (dense, gated)}
    times = take_turns(steps, device, rounds=options.rounds, warm_up=2)
    print(f"{statistics.median(times['resnet18']):.1f} ms, {ratio(times['resnet18_moe'], times['resnet18']):.2f}x")


def make_arm(name: str, width: int) -> Arm:
    """One of the two networks."""
    architecture = image_architecture(name, (3, 32, 32), GateConfig(), width=width)  # type: ignore[arg-type]
    return make_image_arm(name, architecture, num_classes=10)  # type: ignore[arg-type]


def ready(arm: Arm, device: torch.device) -> ImageClassifier:
    """To answer."""
    model = build_arm(arm)
    initialise(model, [make_generator(0, "weights")])
    assert isinstance(model, ImageClassifier)
    return model.to(device).eval()


def shut(model: ImageClassifier, share: float) -> ImageClassifier:
    """The same channels for every image: this share of each layer's, drawn at random."""
    assert model.gating is not None and model.gating.heads.bias is not None
    heads, generator = model.gating.heads, torch.Generator().manual_seed(0)
    nn.init.zeros_(heads.weight)
    heads.offset = OPEN
    drawn = [torch.randperm(channels, generator=generator) < share * channels for channels in model.gated_channels]
    heads.bias.data[0, 0, 0] = torch.cat(drawn).to(heads.bias) * CLOSED
    return model


def make_step(arm: Arm, x: torch.Tensor, y: torch.Tensor, device: torch.device) -> Callable[[], object]:
    """Forward and backward."""
    model, objective = ready(arm, device).train(), make_objective(arm.architecture, 0.0)

    def step() -> None:
        model.zero_grad()
        objective(*model(x), y)["loss"].sum().backward()

    return step


def ratio(times: list[float], base: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(own / other for own, other in zip(times, base, strict=True))


if __name__ == "__main__":
    main()
