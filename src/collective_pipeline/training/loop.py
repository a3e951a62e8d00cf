"""The training loop. Nothing in this file knows which model it trains, or on what.

All seeds of an arm train side by side: `S` is the first dimension of weights, batches and losses.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collective_pipeline.config import TrainingConfig
from collective_pipeline.data.batches import Batches, Normalise
from collective_pipeline.data.splits import Images
from collective_pipeline.training.dropout_bits import DropoutBits
from collective_pipeline.training.optim import (
    AveragedWeights,
    LossScaler,
    clip_by_seed,
    make_optimizer,
    make_schedule,
)
from collective_pipeline.training.runtime import autocast
from collective_pipeline.training.strategies import Phase

TOP_K = 5
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Epoch:
    """What a callback sees after each epoch: numbers on the host.

    Attributes:
        number: Counted from 1 over all phases.
        num_epochs: Of the whole training.
        metrics: `train_loss`, `val_accuracy`, ...: one number for each seed.
        running: Whether each seed was still trained in this epoch; the numbers of the others mean nothing.
        learning_rate: At the start of the epoch.
        seconds: Since training began.
        finished: Whether it was the last one.
    """

    number: int
    num_epochs: int
    phase: str
    metrics: dict[str, list[float]]
    running: tuple[bool, ...]
    learning_rate: float
    seconds: float
    finished: bool = False

    def mean(self, name: str) -> float:
        """Of a metric over the seeds that are still trained and whose number is finite; NaN if there are none."""
        values = [
            value for value, runs in zip(self.metrics[name], self.running, strict=True) if runs and math.isfinite(value)
        ]
        return sum(values) / len(values) if values else math.nan


Callback = Callable[[Epoch], None]


class Fit:
    """What training leaves of each seed: the weights that validation chose, and what happened on the way.

    Attributes:
        weights: State of the network with the seeds as first dimension, each seed's as after its best epoch.
        history: One row for each seed and epoch.
        best_epochs: The epoch that validation chose.
        num_epochs: How many epochs the seed was trained.
        diverged: Whether its loss was no longer finite.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self.weights: dict[str, Tensor] = {}
        self.history: list[dict[str, float | int | str]] = []
        self.best_epochs = [0] * len(seeds)
        self.num_epochs = [0] * len(seeds)
        self.diverged = [False] * len(seeds)
        self.running = [True] * len(seeds)
        self.best_accuracies = [-1.0] * len(seeds)

    def record(self, epoch: Epoch) -> None:
        """Add the epoch's row for every seed that still runs."""
        for s, seed in enumerate(self.seeds):
            if self.running[s]:
                self.num_epochs[s] = epoch.number
                row: dict[str, float | int | str] = {"seed": seed, "epoch": epoch.number, "phase": epoch.phase}
                row |= {name: values[s] for name, values in epoch.metrics.items()}
                self.history.append(row | {"learning_rate": epoch.learning_rate, "seconds": epoch.seconds})

    def select(self, epoch: Epoch, network: nn.Module) -> None:
        """Keep the weights of the seeds whose validation accuracy is their best so far, and whose loss is finite."""
        accuracies = epoch.metrics["val_accuracy"]
        better = [
            self.running[s] and accuracies[s] > self.best_accuracies[s] and math.isfinite(loss)
            for s, loss in enumerate(epoch.metrics["train_loss"])
        ]
        state = network.state_dict()
        if not self.weights:
            self.weights = {name: tensor.clone() for name, tensor in state.items()}
        elif any(better):
            chosen = torch.tensor(better)
            for name, tensor in state.items():
                self.weights[name][chosen] = tensor[chosen]
        for s, is_better in enumerate(better):
            if is_better:
                self.best_accuracies[s], self.best_epochs[s] = accuracies[s], epoch.number

    def stop(self, epoch: Epoch, *, patience: int | None, since: int) -> None:
        """Stop the seeds that diverged, or have been no better for `patience` epochs after epoch `since`."""
        for s, loss in enumerate(epoch.metrics["train_loss"]):
            self.diverged[s] |= self.running[s] and not math.isfinite(loss)
            waited = epoch.number - max(self.best_epochs[s], since)
            self.running[s] &= not self.diverged[s] and (patience is None or waited < patience)


def fit(
    phases: Sequence[Phase],
    batches: Batches,
    validation: Images,
    config: TrainingConfig,
    *,
    seeds: Sequence[int],
    callbacks: Iterable[Callback] = (),
    watch: Callable[[Batches], Iterable[tuple[Tensor, Tensor]]] = iter,
) -> Fit:
    """Train through the phases, validate after every epoch, and keep each seed's best weights.

    A seed that has stopped early or diverged stays in the stack until the others are done, but nothing of it is kept.

    Args:
        phases: What to train, from `plan_phases`; the last one selects.
        batches: The training images of all `seeds`; their device is where the networks are.
        validation: Images on the same device.
        config: What all arms share.
        seeds: Named in the history.
        callbacks: Called with an `Epoch` after each one.
        watch: A wrapper around the batches of an epoch, for progress within it.
    """
    result = Fit(seeds)
    bits = DropoutBits(seeds, validation.images.device)
    started = time.perf_counter()
    number = 0
    for phase in phases:
        training = _PhaseTraining(phase, batches, config, bits)
        first = number
        for _ in range(phase.epochs):
            if not any(result.running):
                break
            number += 1
            rate = training.learning_rate
            metrics = {f"train_{name}": values for name, values in training.train(watch(batches)).items()}
            if phase.classifies:
                scores = evaluate(training.validated, validation, batches.normalise, config)
                metrics |= {f"val_{name}": values for name, values in scores.items()}
            numbers, seconds = to_host(metrics), time.perf_counter() - started
            epoch = Epoch(number, config.epochs, phase.name, numbers, tuple(result.running), rate, seconds)
            result.record(epoch)
            if phase.selects:
                result.select(epoch, training.validated)
            result.stop(epoch, patience=config.early_stopping_patience if phase is phases[-1] else None, since=first)
            epoch = replace(epoch, finished=number == config.epochs or not any(result.running))
            for callback in callbacks:
                callback(epoch)
        bits.release()
    return result


class _PhaseTraining:
    """The epochs of one phase: its optimiser, schedule, scaler and averaged weights."""

    def __init__(self, phase: Phase, batches: Batches, config: TrainingConfig, bits: DropoutBits) -> None:
        self.phase = phase
        self.config = config
        self.bits = bits
        self.steps = len(batches)
        self.device = batches.train.images.device
        phase.network.requires_grad_(False)
        for module in phase.trained:
            module.requires_grad_(True)
        self._set_modes()
        trained = [(name, weight) for name, weight in phase.network.named_parameters() if weight.requires_grad]
        self.parameters = [weight for _, weight in trained]
        self.optimizer = make_optimizer(trained, config, rate_factor=phase.rate_factor)
        is_only_phase = phase.epochs == config.epochs
        warmup_epochs = config.warmup_epochs if is_only_phase else min(config.warmup_epochs, phase.epochs / 2)
        updates_per_epoch = -(-self.steps // config.accumulation_steps)
        self.schedule = make_schedule(
            self.optimizer,
            config,
            num_updates=phase.epochs * updates_per_epoch,
            warmup_updates=round(warmup_epochs * updates_per_epoch),
        )
        self.scaler = LossScaler(len(bits.generators), self.device, enabled=config.precision == "fp16")
        self.averaged = AveragedWeights(phase.network, config.ema_decay) if config.ema_decay else None
        bits.attach(phase.network, batches.batch_size)

    @property
    def validated(self) -> nn.Module:
        """The network whose weights are validated and kept."""
        return self.phase.network if self.averaged is None else self.averaged.network

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Metrics:
        """One pass over the batches; the means of all losses and the accuracies in percent, each `(S,)`."""
        self._set_modes()
        totals: Metrics = {}
        accumulation = self.config.accumulation_steps
        for step, (x, y) in enumerate(batches):
            self.bits.draw()
            with autocast(self.config, self.device):
                logits, parts = self.phase.network(x)
            # Losses in full precision: sums over many steps stall in 16 bits, and squares overflow.
            logits, parts = logits.float(), {name: part.float() for name, part in parts.items()}
            losses = self.phase.objective(logits, parts, y)
            # The last group of an epoch may be smaller than the others: its gradient is the mean of what it has.
            group = min(accumulation, self.steps - step // accumulation * accumulation)
            self.scaler.scale(losses["loss"] / group).sum().backward()
            if (step + 1) % accumulation == 0 or step + 1 == self.steps:
                self._update()
            # Kept on the device: reading a number here would make the host wait at every step.
            with torch.no_grad():
                if self.phase.classifies:
                    losses["accuracy"] = 100 * (logits.argmax(dim=-1) == y).float().mean(dim=1)
                for name, value in losses.items():
                    totals[name] = totals[name] + value if name in totals else value.detach()
        return {name: total / self.steps for name, total in totals.items()}

    def _update(self) -> None:
        gradients = [weight.grad for weight in self.parameters if weight.grad is not None]
        self.scaler.unscale_(gradients)
        if self.config.clip_norm:
            clip_by_seed(gradients, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.averaged is not None:
            self.averaged.update(self.phase.network)

    def _set_modes(self) -> None:
        self.phase.network.eval()
        for module in self.phase.trained:
            module.train()


def evaluate(network: nn.Module, images: Images, normalise: Normalise, config: TrainingConfig) -> Metrics:
    """Cross-entropy and accuracies in percent of all seeds on the same images, each `(S,)`."""
    network.eval()
    totals: Metrics = {}
    device = images.images.device
    chunks = zip(images.images.split(config.eval_batch_size), images.labels.split(config.eval_batch_size), strict=True)
    with torch.inference_mode(), autocast(config, device):
        for pixels, labels in chunks:
            logits = network(normalise(pixels).unsqueeze(0))[0].float()
            y = labels.expand(len(logits), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(dim=1)
            for name, value in ({"loss": loss} | accuracies(logits, y)).items():
                weighted = value * (len(labels) / len(images))
                totals[name] = totals[name] + weighted if name in totals else weighted
    return totals


def to_host(metrics: Metrics) -> dict[str, list[float]]:
    """The numbers, one for each seed; the one moment of an epoch at which the host waits for the device."""
    numbers = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
    # Accuracies are counts over some thousand images: what float32 has beyond four decimals is noise.
    return {
        name: [round(value, 4) for value in values] if name.endswith("accuracy") else values
        for name, values in numbers.items()
    }


def accuracies(logits: Tensor, labels: Tensor) -> Metrics:
    """Top-1 and top-5 accuracy in percent of logits `(S, B, K)`, each `(S,)`."""
    ranked = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
    return {
        "accuracy": 100 * ranked[..., 0].float().mean(dim=1),
        "top5_accuracy": 100 * ranked.any(dim=-1).float().mean(dim=1),
    }
