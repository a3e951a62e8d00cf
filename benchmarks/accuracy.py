"""Does this project's loop train as well as a plain PyTorch loop? One arm, the same plan, as many seeds each.

    python benchmarks/accuracy.py [--arm collective] [--size phase1] [--epochs 200] [--seeds 10] [--augmentation 0]
    python benchmarks/accuracy.py [--arm collective] [--size phase1] --runs data/08_reporting/phase1/runs.csv

The plain loop is torch's own modules, optimiser, initialisation, dropout and random generators, one network a seed, its
batches gathered and moved by torch's own `affine_grid` and `grid_sample`. On a CUDA device each network's step is
recorded in the way of torch's documentation, and all networks run side by side: eagerly it would take an hour. Both
sides keep the epoch that is best on the same validation images and then read the test images. As no draw is shared, the
difference is that of two independent samples, with Welch's interval and p value. With `--runs`, this project's side is
what a run with the same plan has left, and only the plain loop trains.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from collective_pipeline.config import MODEL_TYPES, Arm, TrainingConfig
from collective_pipeline.data.augment import RECIPES
from collective_pipeline.data.splits import Images, Splits
from collective_pipeline.models.matching import match_arm
from collective_pipeline.training.runtime import choose_device, set_matmul_precision
from collective_pipeline.training.train import score, train_arm
from conditions import describe, make_parser, settings_of, split_mnist
from training import build_plain

WARM_UP_STEPS = 3


class PlainTraining:
    """One network, trained as the documentation of torch would have it."""

    def __init__(self, arm: Arm, splits: Splits, config: TrainingConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.splits, self.config = splits, config
        self.device = splits.train.images.device
        self.model = build_plain(arm)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        self.model.to(self.device)
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.model.parameters() if weight.ndim == 1]
        self.optimizer = torch.optim.Adam(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
            lr=config.learning_rate,
            capturable=self.device.type == "cuda",
        )
        self.num_steps = len(splits.train) // config.batch_size
        self.index = torch.zeros(config.batch_size, dtype=torch.int64, device=self.device)
        self.best, self.best_accuracy, self.test_accuracy = -1, -1.0, math.nan
        self.step: Callable[[], object] = self._step
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream()
            self.step = self._record()

    def _step(self) -> None:
        x = self._augment(self.splits.train.images[self.index].float() / 255)
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self._normalise(x)), self.splits.train.labels[self.index]).backward()
        self.optimizer.step()

    def _record(self) -> Callable[[], object]:
        self.model.train()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        return graph.replay

    def _augment(self, x: Tensor) -> Tensor:
        strength, recipe = self.config.augmentation_strength, RECIPES[self.splits.name]
        if not strength:
            return x
        turn, shift_x, shift_y, zoom = (2 * torch.rand(4, len(x), device=x.device) - 1) * strength
        angle, scale = math.radians(recipe.degrees) * turn, 1 + recipe.scale * zoom
        cos, sin = angle.cos() / scale, angle.sin() / scale
        shift_x, shift_y = 2 * recipe.translate * shift_x, 2 * recipe.translate * shift_y
        theta = torch.stack([torch.stack([cos, sin, shift_x], dim=1), torch.stack([-sin, cos, shift_y], dim=1)], dim=1)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)

    def _normalise(self, x: Tensor) -> Tensor:
        return ((x - self.splits.mean[0]) / self.splits.std[0]).flatten(1)

    def order(self) -> Tensor:
        """Of an epoch, one row a step."""
        size = self.config.batch_size
        order = torch.randperm(len(self.splits.train), device=self.device)[: self.num_steps * size]
        return order.view(self.num_steps, size)

    @torch.no_grad()
    def accuracy(self, images: Images) -> float:
        """In percent."""
        self.model.eval()
        right = torch.zeros((), device=self.device)
        size = self.config.eval_batch_size
        for pixels, labels in zip(images.images.split(size), images.labels.split(size), strict=True):
            right += (self.model(self._normalise(pixels.float() / 255)).argmax(dim=1) == labels).sum()
        self.model.train()
        return 100 * right.item() / len(images)


def train_plain(arm: Arm, splits: Splits, config: TrainingConfig, num_seeds: int, device: torch.device) -> list[float]:
    """Test accuracies of all seeds, side by side on a CUDA device."""
    set_matmul_precision(config, device)
    splits = splits.to(device)
    trainings = [PlainTraining(arm, splits, config, seed) for seed in range(num_seeds)]
    for epoch in range(config.epochs):
        orders = [training.order() for training in trainings]
        wait(device)
        for step in range(trainings[0].num_steps):
            for training, order in zip(trainings, orders, strict=True):
                if device.type == "cuda":
                    with torch.cuda.stream(training.stream):
                        training.index.copy_(order[step])
                        training.step()
                else:
                    training.index.copy_(order[step])
                    training.step()
        wait(device)
        for training in trainings:
            accuracy = training.accuracy(splits.val)
            if accuracy > training.best_accuracy:
                training.best, training.best_accuracy = epoch, accuracy
                training.test_accuracy = training.accuracy(splits.test)
    return [training.test_accuracy for training in trainings]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--arm", choices=MODEL_TYPES, default="collective")
    parser.add_argument("--epochs", type=int, help="as the size has them")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--runs", type=Path, help="runs.csv of a run with this plan, instead of training here")
    parser.add_argument("--augmentation", type=float, help="strength, as the size has it; 0: off")
    options = parser.parse_args()

    settings, device = settings_of(options.size), choose_device(options.device)
    changes = {"epochs": options.epochs, "augmentation_strength": options.augmentation}
    config = settings.training.model_copy(update={name: value for name, value in changes.items() if value is not None})
    splits = split_mnist(settings)
    shape = {"in_dim": splits.in_dim, "num_classes": splits.num_classes}
    arm = match_arm(options.arm, settings.collective, settings.baselines, **shape)
    print(
        f"{arm.model_type}, {arm.params:,} parameters, MNIST, {config.epochs} epochs, batch {config.batch_size}, "
        f"augmentation {config.augmentation_strength:g}, {options.seeds} seeds; {describe(device)}"
    )
    print(f"{'test accuracy, percent':<26}{'mean':>9}{'deviation':>11}{'95 % interval':>20}{'seconds':>9}", flush=True)

    def row(label: str, train: Callable[[], list[float]]) -> np.ndarray:
        started = time.perf_counter()
        values = np.array(train())
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        interval = f"{values.mean() - half:.3f} to {values.mean() + half:.3f}"
        seconds = time.perf_counter() - started
        print(f"{label:<26}{values.mean():>9.3f}{values.std(ddof=1):>11.3f}{interval:>20}{seconds:>9.0f}", flush=True)
        return values

    def ours() -> list[float]:
        if options.runs:
            runs = pd.read_csv(options.runs)
            return [float(value) for value in runs.loc[runs["model_type"] == arm.model_type, "test_accuracy"]]
        checkpoint, _ = train_arm(arm, splits, config, seeds=range(options.seeds), device=device)
        return score(checkpoint, splits.test, splits, config, device=device)["accuracy"]

    here = row("this project", ours)
    plain = row("plain PyTorch", lambda: train_plain(arm, splits, config, options.seeds, device))
    test = stats.ttest_ind(here, plain, equal_var=False)
    low, high = test.confidence_interval(0.95)
    print(f"difference {here.mean() - plain.mean():+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, p {test.pvalue:.3f}")


if __name__ == "__main__":
    main()
