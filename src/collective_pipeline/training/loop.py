"""The training loop. Nothing in this file knows which model it trains, or on what.

All seeds of an arm train side by side: `S` is the first dimension of weights, batches and losses.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

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
    """What a callback sees after each epoch: numbers on the host, one for each seed.

    Attributes:
        number: Counted from 1 over all phases.
        num_epochs: Of the whole training.
        metrics: `train_loss`, `val_accuracy`, ...: one number for each seed, NaN where it is not defined.
        seconds: Since training began.
    """

    number: int
    num_epochs: int
    phase: str
    metrics: dict[str, list[float]]
    seconds: float


Callback = Callable[[Epoch], None]


@dataclass
class Fit:
    """What training leaves: the weights that validation chose for each seed, and what happened on the way."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float | int | str]] = field(default_factory=list)
    best_epochs: list[int] = field(default_factory=list)
    num_epochs: list[int] = field(default_factory=list)
    seconds: float = 0.0


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

    A seed whose validation accuracy has not risen for `early_stopping_patience` epochs, or whose loss is no longer
    finite, is stopped: its row of the stack computes on until the others are done, but nothing of it is kept.

    Args:
        phases: What to train, from `plan_phases`; the last one selects.
        batches: The training images of all `seeds`; its device is where the networks are.
        validation: Images on the same device.
        config: What all arms share.
        seeds: Named in the history.
        callbacks: Called with an `Epoch` after each one.
        watch: A wrapper around the batches of an epoch, for progress within it.
    """
    result = Fit(best_epochs=[0] * len(seeds), num_epochs=[0] * len(seeds))
    best_accuracy = [-1.0] * len(seeds)
    running = [True] * len(seeds)
    bits = DropoutBits(seeds, validation.images.device)
    started = time.perf_counter()
    number = 0
    for phase in phases:
        epochs = _PhaseTraining(phase, batches, config, bits)
        for _ in range(phase.epochs):
            number += 1
            rate = epochs.learning_rate
            metrics = {f"train_{name}": values for name, values in epochs.train(watch(batches)).items()}
            if phase.classifies:
                scores = evaluate(epochs.validated, validation, batches.normalise, config)
                metrics |= {f"val_{name}": values for name, values in scores.items()}
            # The one moment of an epoch at which the host waits for the device.
            rows = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            seconds = time.perf_counter() - started

            for s, seed in enumerate(seeds):
                if not running[s]:
                    continue
                row = {name: values[s] for name, values in rows.items()}
                result.num_epochs[s] = number
                result.history.append(
                    {"seed": seed, "epoch": number, "phase": phase.name}
                    | row
                    | {"learning_rate": rate, "seconds": seconds}
                )
            if phase.selects:
                improved = [
                    running[s] and accuracy > best_accuracy[s] for s, accuracy in enumerate(rows["val_accuracy"])
                ]
                result.weights = _keep(epochs.validated, improved, result.weights)
                for s, is_better in enumerate(improved):
                    if is_better:
                        best_accuracy[s], result.best_epochs[s] = rows["val_accuracy"][s], number
            for callback in callbacks:
                callback(Epoch(number, config.epochs, phase.name, rows, seconds))

            for s, loss in enumerate(rows["train_loss"]):
                running[s] = running[s] and loss - loss == 0
                if config.early_stopping_patience and phase is phases[-1]:
                    best_or_start = max(result.best_epochs[s], config.epochs - phase.epochs)
                    running[s] = running[s] and number - best_or_start < config.early_stopping_patience
            if not any(running):
                break
        bits.release()
        if not any(running):
            break
    result.seconds = time.perf_counter() - started
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
        updates_per_epoch = -(-self.steps // config.accumulation_steps)
        self.schedule = make_schedule(
            self.optimizer,
            config,
            num_updates=phase.epochs * updates_per_epoch,
            warmup_updates=round(min(config.warmup_epochs, phase.epochs / 2) * updates_per_epoch),
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
            logits = logits.float()
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
    chunks = zip(
        images.images.split(config.eval_batch_size), images.labels.split(config.eval_batch_size), strict=True
    )
    with torch.inference_mode(), autocast(config, device):
        for pixels, labels in chunks:
            logits = network(normalise(pixels).unsqueeze(0))[0].float()
            y = labels.expand(len(logits), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(dim=1)
            for name, value in ({"loss": loss} | accuracies(logits, y)).items():
                weighted = value * (len(labels) / len(images))
                totals[name] = totals[name] + weighted if name in totals else weighted
    return totals


def accuracies(logits: Tensor, labels: Tensor) -> Metrics:
    """Top-1 and top-5 accuracy in percent of logits `(S, B, K)`, each `(S,)`."""
    ranked = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
    return {
        "accuracy": 100 * ranked[..., 0].float().mean(dim=1),
        "top5_accuracy": 100 * ranked.any(dim=-1).float().mean(dim=1),
    }


def _keep(network: nn.Module, improved: Sequence[bool], best: dict[str, Tensor]) -> dict[str, Tensor]:
    """The seeds of `network` that improved, the others as they were in `best`."""
    state = network.state_dict()
    if not best:
        return {name: tensor.clone() for name, tensor in state.items()}
    chosen = torch.tensor(improved)
    if chosen.any():
        for name, tensor in state.items():
            best[name][chosen] = tensor[chosen]
    return best
