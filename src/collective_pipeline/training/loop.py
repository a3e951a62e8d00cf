"""The training loop. Nothing in this file knows which model it trains, or on what.

All seeds of an arm train side by side: `S` is the first dimension of weights, batches and losses.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collective_pipeline.config import TrainingConfig, UserError, count_of
from collective_pipeline.data.batches import Batches, BatchSource, ImageSource, MixedLabels, Normalise
from collective_pipeline.models.convolution import Conv2d
from collective_pipeline.models.layers import ChannelNorm
from collective_pipeline.models.resnet import set_drop_path
from collective_pipeline.training import cuda, interrupt
from collective_pipeline.training.dropout_bits import DropoutBits
from collective_pipeline.training.gpu import Meter, Usage
from collective_pipeline.training.optim import (
    AveragedWeights,
    LossScaler,
    clip_by_seed,
    make_annealing,
    make_optimizer,
    make_schedule,
)
from collective_pipeline.training.ranks import ALONE, Ranks
from collective_pipeline.training.runtime import autocast
from collective_pipeline.training.snapshots import Snapshot, Snapshots
from collective_pipeline.training.strategies import Phase

TOP_K = 5
EPOCHS_SHUT = 3
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
        restored: Whether it is only told again: it was trained before the run was interrupted, or in groups of seeds.
        group: Which of how many groups of seeds it is of, where they train one after another.
        usage: Of the GPU since training began, as of its last reading.
        images: On which each seed was trained since training began, by all ranks together.
    """

    number: int
    num_epochs: int
    phase: str
    metrics: dict[str, list[float]]
    running: tuple[bool, ...]
    learning_rate: float
    seconds: float
    finished: bool = False
    restored: bool = False
    group: tuple[int, int] = (1, 1)
    usage: Usage = field(default_factory=Usage)
    images: int = 0

    @property
    def partial(self) -> bool:
        """Whether it is of some of the seeds only."""
        return self.group != (1, 1)

    def mean(self, name: str) -> float:
        """Of a metric over the seeds that are still trained and whose number is finite; NaN if there are none."""
        values = [
            value for value, runs in zip(self.metrics[name], self.running, strict=True) if runs and math.isfinite(value)
        ]
        return sum(values) / len(values) if values else math.nan


Callback = Callable[[Epoch], None]
Look = Callable[[Epoch, dict[str, Tensor]], None]


@dataclass
class Fit:
    """What training leaves of each seed: the weights that validation chose, and what happened on the way.

    Attributes:
        seeds: In their order in the stack.
        epochs: All of them.
        best_epochs: The epoch that validation chose; 0 where there is none, because the loss was never finite.
        num_epochs: How many epochs the seed was trained.
        diverged: Whether its loss was no longer finite.
        running: Whether it is still trained.
        best_accuracies: On the validation images, in percent.
        best_losses: Likewise; None before there is a finite one.
        waited_since: The epoch of what early stopping last found better.
        weights: State of the network with the seeds as first dimension, each seed's as after its best epoch.
    """

    seeds: tuple[int, ...]
    epochs: list[Epoch]
    best_epochs: list[int]
    num_epochs: list[int]
    diverged: list[bool]
    running: list[bool]
    best_accuracies: list[float]
    best_losses: list[float | None]
    waited_since: list[int]
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, seeds: Sequence[int]) -> "Fit":
        """Before the first epoch."""
        n = len(seeds)
        return cls(tuple(seeds), [], [0] * n, [0] * n, [False] * n, [True] * n, [-1.0] * n, [None] * n, [0] * n)

    @property
    def history(self) -> list[dict[str, float | int | str]]:
        """One row for each seed and epoch in which it was trained."""
        return [
            {
                "seed": seed,
                "epoch": epoch.number,
                "phase": epoch.phase,
                **{name: values[s] for name, values in epoch.metrics.items()},
                "learning_rate": epoch.learning_rate,
                "seconds": epoch.seconds,
                "images": epoch.images,
                **epoch.usage.figures,
            }
            for epoch in self.epochs
            for s, seed in enumerate(self.seeds)
            if epoch.running[s]
        ]

    def record(self, epoch: Epoch) -> None:
        """Add an epoch."""
        self.epochs.append(epoch)
        self.num_epochs = [epoch.number if runs else n for n, runs in zip(self.num_epochs, self.running, strict=True)]

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
            chosen = torch.tensor(better, device=next(iter(state.values())).device)
            for name, tensor in state.items():
                kept = self.weights[name]
                kept.copy_(torch.where(chosen.view(-1, *[1] * (tensor.ndim - 1)), tensor, kept))
        for s, is_better in enumerate(better):
            if is_better:
                self.best_accuracies[s], self.best_epochs[s] = accuracies[s], epoch.number

    def stop(
        self, epoch: Epoch, *, patience: int | None, metric: Literal["accuracy", "loss"] | None, since: int
    ) -> None:
        """Stop the seeds that diverged, or whose `metric` was no better for `patience` epochs after epoch `since`.

        Without a metric the epoch is compared to none, neither now nor later.
        And those all of whose gates were shut throughout `EPOCHS_SHUT` epochs: few open again after that.
        """
        for s, loss in enumerate(epoch.metrics["train_loss"]):
            self.diverged[s] |= self.running[s] and not math.isfinite(loss)
            if metric == "accuracy":
                self.waited_since[s] = self.best_epochs[s]
            elif metric == "loss" and "val_loss" in epoch.metrics:
                self._note_loss(s, epoch.metrics["val_loss"][s], epoch.number)
            waited = epoch.number - max(self.waited_since[s], since)
            self.running[s] &= not self.diverged[s] and not self.is_shut(s) and (patience is None or waited < patience)

    def is_shut(self, s: int) -> bool:
        """Whether no gate of this seed was open in any of its last `EPOCHS_SHUT` epochs."""
        last = [epoch for epoch in self.epochs if epoch.running[s]][-EPOCHS_SHUT:]
        return len(last) == EPOCHS_SHUT and all(
            "train_open_gates" in epoch.metrics and epoch.metrics["train_open_gates"][s] == 0 for epoch in last
        )

    def _note_loss(self, s: int, loss: float, epoch: int) -> None:
        best = self.best_losses[s]
        if math.isfinite(loss) and (best is None or loss < best):
            self.best_losses[s], self.waited_since[s] = loss, epoch

    @classmethod
    def join(cls, fits: Sequence["Fit"]) -> "Fit":
        """Of several groups of seeds, trained one after another, as if all had trained at once."""
        if len(fits) == 1:
            return fits[0]
        names = (
            "best_epochs", "num_epochs", "diverged", "running", "best_accuracies", "best_losses", "waited_since"
        )  # fmt: skip
        joined: dict[str, Any] = {name: [value for fit in fits for value in getattr(fit, name)] for name in names}
        seeds = tuple(seed for fit in fits for seed in fit.seeds)
        weights = {name: torch.cat([fit.weights[name] for fit in fits]) for name in fits[0].weights}
        longest = max((fit.epochs for fit in fits), key=len)
        epochs = [_join_epochs(epoch, fits) for epoch in longest]
        return cls(seeds=seeds, epochs=epochs, weights=weights, **joined)

    def facts(self) -> dict[str, Any]:
        """Everything but the weights, as plain values."""
        return {name: value for name, value in vars(self).items() if name not in {"weights", "epochs"}} | {
            "epochs": [asdict(epoch) for epoch in self.epochs]
        }

    @classmethod
    def restore(cls, facts: Mapping[str, Any], weights: dict[str, Tensor]) -> "Fit":
        """From `facts` that were written as JSON."""
        epochs = [
            Epoch(
                **epoch
                | {"running": tuple(epoch["running"]), "group": tuple(epoch["group"])}
                | {"usage": Usage(**epoch["usage"]), "restored": True}
            )
            for epoch in facts["epochs"]
        ]
        return cls(**{**facts, "seeds": tuple(facts["seeds"]), "epochs": epochs, "weights": weights})


def _join_epochs(model: Epoch, fits: Sequence[Fit]) -> Epoch:
    """The epoch of this number in all groups; seeds of a group that ended before it are no longer running."""
    parts = [next((epoch for epoch in fit.epochs if epoch.number == model.number), None) for fit in fits]
    metrics: dict[str, list[float]] = {name: [] for name in model.metrics}
    running: list[bool] = []
    for fit, part in zip(fits, parts, strict=True):
        for name in metrics:
            metrics[name] += part.metrics[name] if part else [math.nan] * len(fit.seeds)
        running += part.running if part else [False] * len(fit.seeds)
    seconds = sum(part.seconds if part else fit.epochs[-1].seconds for fit, part in zip(fits, parts, strict=True))
    usage = sum((part.usage if part else fit.epochs[-1].usage for fit, part in zip(fits, parts, strict=True)), Usage())
    joined = replace(model, metrics=metrics, running=tuple(running), seconds=seconds, usage=usage)
    return replace(joined, group=(1, 1), restored=True)


def fit(
    phases: Sequence[Phase],
    batches: BatchSource,
    validation: ImageSource,
    config: TrainingConfig,
    *,
    callbacks: Iterable[Callback] = (),
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
    snapshots: Snapshots | None = None,
    going_on: Snapshot | None = None,
    look: Look | None = None,
    ranks: Ranks = ALONE,
) -> Fit:
    """Train through the phases, validate after every epoch, and keep each seed's best weights.

    A seed that has stopped early or diverged stays in the stack until the others are done, but nothing of it is kept.

    Args:
        phases: What to train, from `plan_phases`; the last one selects.
        batches: The training images of all seeds; their device is where the networks are.
        validation: Images for the same device.
        config: What all arms share.
        callbacks: Called with an `Epoch` after each one, and for those before an interruption that is resumed.
        watch: A wrapper around the stops of an epoch, the numbers of updates done, for progress within it.
        snapshots: Where to save the state of training now and then.
        going_on: From where to go on.
        look: Called every `config.expert_analysis_interval` epochs with a copy of the weights that were validated.
        ranks: The processes that train together; each calls this with its own batches and images, and the first one
            alone with callbacks, snapshots and looks.

    Raises:
        Interrupted: If the run was told to stop, after its state was saved.
    """
    fitting = _Fitting(phases, batches, validation, config, list(callbacks), watch, snapshots, look, ranks)
    return fitting.run(going_on)


@dataclass(frozen=True)
class _Place:
    """Where training stands: in which phase, after which epoch, and after how many updates of the next one.

    A process had played `ranks_played` ranks: so many batches an update it has counted.
    """

    phase: int = 0
    epoch: int = 0
    update: int = 0
    ranks_played: int = 1
    seconds: float = 0.0
    finished: bool = False
    usage: Usage = field(default_factory=Usage)


@dataclass
class _Fitting:
    """The arguments of `fit`, and what it knows on the way."""

    phases: Sequence[Phase]
    batches: BatchSource
    validation: ImageSource
    config: TrainingConfig
    callbacks: Sequence[Callback]
    watch: Callable[[Iterable[int]], Iterable[int]]
    snapshots: Snapshots | None
    look: Look | None
    ranks: Ranks
    training: "_PhaseTraining | None" = None  # of the phase before

    def run(self, saved: Snapshot | None) -> Fit:
        self.result, self.place = Fit.begin(self.batches.seeds), _Place()
        if saved is not None:
            self.result = Fit.restore(saved.facts["fit"], saved.part("best", self.batches.device))
            self.place = _Place(**saved.facts["place"] | {"usage": Usage(**saved.facts["place"]["usage"])})
            for epoch in self.result.epochs:
                self._tell(epoch)
        self.started = time.perf_counter() - self.place.seconds
        if self.place.finished:
            return self.result
        self.spans = spans = _lay_out(self.phases, self.batches, self.config)
        with Meter(self.batches.device, self.place.usage, number=self.ranks.number) as self.meter:
            try:
                for index, (phase, span) in enumerate(zip(self.phases, spans, strict=True)):
                    if index >= self.place.phase and any(self.result.running):
                        going_on = saved.tensors if saved is not None and index == self.place.phase else None
                        self._train(index, phase, span, going_on)
            finally:
                self._release()
        return self.result

    def _train(self, index: int, phase: Phase, span: "_Span", going_on: Mapping[str, Tensor] | None) -> None:
        """All epochs of a phase, or those that are left of it."""
        if not phase.goes_on:
            self._release()  # nobody reads it any more, and its memory is wanted
        before, batches = span.epochs_before, span.batches
        training = _PhaseTraining(phase, span, self.validation, self.config, self.ranks)
        first_epoch, first_update = before + 1, 0
        if going_on is not None:
            training.load_state(going_on, ranks_played=self.place.ranks_played)
            first_epoch, first_update = self.place.epoch + 1, self.place.update
        elif self.training is not None:
            training.carry_on(self.training)
        else:  # machines of other kinds may draw weights that differ in their last bit
            self.ranks.share_(list(phase.network.state_dict().values()))
        self._release()
        self.training = training
        for number in range(first_epoch, before + phase.epochs + 1):
            if not any(self.result.running):
                break
            training.begin(number, goes_on=first_update > 0)
            if batches.device.type == "cuda" and number < before + phase.epochs:
                batches.prepare(number + 1)
            for done in self.watch(training.stops(first_update)):
                training.update(first_update, done)
                first_update = done
                if done < training.num_updates:
                    self._pause(_Place(index, number - 1, done), training)
            first_update = 0
            self._end_epoch(number, index, training)
            finished = self.result.epochs[-1].finished
            self._pause(_Place(index, number, finished=finished), training)
        training.bits.release()

    def _release(self) -> None:
        """Let the training of the phase before go."""
        if self.training is not None:
            self.training.release()
        self.training = None

    def _end_epoch(self, number: int, index: int, training: "_PhaseTraining") -> None:
        result, config, phase = self.result, self.config, self.phases[index]
        metrics, rate = to_host(training.metrics()), training.learning_rate(number)
        seconds = time.perf_counter() - self.started
        images = (result.epochs[-1].images if result.epochs else 0) + training.images_of_epoch
        epoch = Epoch(number, config.epochs, phase.name, metrics, tuple(result.running), rate, seconds, images=images)
        result.record(epoch)
        if phase.selects:
            result.select(epoch, training.validated)
        # What is not chosen among is not waited for; nor is it before another training.
        waits = phase.selects and (phase.goes_on or phase is self.phases[-1])
        result.stop(
            epoch,
            patience=config.early_stopping_patience if waits else None,
            metric=config.early_stopping_metric if phase.selects else None,
            since=self._patient_since(index),
        )
        finished = number == config.epochs or not any(result.running)
        usage = self.meter.read() if finished else self.meter.usage
        result.epochs[-1] = replace(epoch, finished=finished, usage=usage)
        self._tell(result.epochs[-1])
        interval = config.expert_analysis_interval
        if self.look is not None and phase.selects and interval and number % interval == 0:
            self._show(self.look, result.epochs[-1], training.validated)

    def _patient_since(self, index: int) -> int:
        """The epoch before the first that this phase's are compared to: phases of one training have one patience."""
        while index and self.phases[index].goes_on and self.phases[index - 1].selects:
            index -= 1
        return self.spans[index].epochs_before

    def _show(self, look: Look, epoch: Epoch, network: nn.Module) -> None:
        """A copy of the network's weights: whatever is done with it, training is as it was."""
        began = time.perf_counter()
        with self.meter.paused():
            look(epoch, {name: tensor.clone() for name, tensor in network.state_dict().items()})
        self.started += time.perf_counter() - began  # which was no training

    def _tell(self, epoch: Epoch) -> None:
        for callback in self.callbacks:
            callback(epoch)

    def _pause(self, place: _Place, training: "_PhaseTraining") -> None:
        """Save if it is time to, or if there is no more time, and stop if the run is to stop."""
        # All ranks stop at the same update, or those that go on would wait for the others.
        stops = not place.finished and self.ranks.agree(self.snapshots is not None and interrupt.requested())
        if self.snapshots is not None and (stops or place.finished or self.snapshots.is_due()):
            seconds, played = time.perf_counter() - self.started, training.batches.ranks_played
            place = replace(place, ranks_played=played, seconds=seconds, usage=self.meter.read())
            best = {f"best/{name}": tensor for name, tensor in self.result.weights.items()}
            facts = {"place": asdict(place), "fit": self.result.facts()}
            self.snapshots.save(Snapshot(facts, training.state() | best), wait=stops or place.finished)
        if stops:
            part = f" and {100 * place.update / training.num_updates:.0f} % of the next" if place.update else ""
            name = "training" if self.snapshots is None else self.snapshots.name
            interrupt.stop(f"{name} is saved after epoch {place.epoch} of {self.config.epochs}{part}")


@dataclass(frozen=True)
class _Span:
    """Where a phase lies in the whole training, and in the schedule that it is a part of.

    Attributes:
        batches: Its batches.
        epochs_before: Those of the phases before it.
        steps_before: Their batches.
        schedule: The learning rate of each of its updates.
        start: How many updates of the same training were before it.
    """

    batches: BatchSource
    epochs_before: int
    steps_before: int
    schedule: Tensor
    start: int


def _lay_out(phases: Sequence[Phase], batches: BatchSource, config: TrainingConfig) -> list[_Span]:
    """The spans of all phases: the steps of every schedule are counted from the batches that there really are."""
    of_phases = [batches.for_stage(phase.stage) for phase in phases]
    updates = [count_updates(one, config) for one in of_phases]
    is_whole = [phase.goes_on or phase.epochs == config.epochs for phase in phases]
    whole = [(phase.epochs, n) for phase, n, goes_on in zip(phases, updates, is_whole, strict=True) if goes_on]
    of_whole = _make_schedule(whole, config, rate_factor=1.0, warmup_epochs=config.warmup_epochs)
    spans, epochs, steps, start = [], 0, 0, 0
    for phase, own, n, goes_on in zip(phases, of_phases, updates, is_whole, strict=True):
        schedule = (
            of_whole[start : start + phase.epochs * n] * phase.rate_factor
            if goes_on
            else _make_schedule(
                [(phase.epochs, n)],
                config,
                rate_factor=phase.rate_factor,
                warmup_epochs=min(config.warmup_epochs, phase.epochs / 2),
            )
        )
        spans.append(_Span(own, epochs, steps, schedule, start if goes_on else 0))
        epochs, steps = epochs + phase.epochs, steps + phase.epochs * len(own)
        start += phase.epochs * n if goes_on else 0
    return spans


def _make_schedule(
    parts: Sequence[tuple[int, int]], config: TrainingConfig, *, rate_factor: float, warmup_epochs: float
) -> Tensor:
    """The learning rate of every update of parts, each with its epochs and its updates an epoch."""
    warmup_updates, left = 0.0, warmup_epochs
    for epochs, updates in parts:
        warmup_updates += min(left, epochs) * updates
        left -= min(left, epochs)
    return make_schedule(
        config,
        rate=config.learning_rate * rate_factor,
        num_updates=sum(epochs * updates for epochs, updates in parts),
        warmup_updates=round(warmup_updates),
    )


def try_rates(
    phase: Phase, batches: BatchSource, validation: ImageSource, config: TrainingConfig, rates: Tensor
) -> Iterator[float]:
    """Train the beginning of a phase, one update at each of these learning rates, and give the loss of each.

    Args:
        phase: As for `fit`; its own number of epochs and the configured schedule do not matter here.
        batches: The training images of one seed.
        validation: Not looked at.
        config: As for `fit`.
        rates: `(updates,)`.
    """
    own = batches.for_stage(phase.stage)
    per_epoch = count_updates(own, config)
    span = _Span(own, epochs_before=0, steps_before=0, schedule=rates, start=0)
    training = _PhaseTraining(replace(phase, epochs=-(-len(rates) // per_epoch)), span, validation, config)
    try:
        for number in range(len(rates)):
            epoch, update = divmod(number, per_epoch)
            if update == 0:
                training.begin(epoch + 1, goes_on=False)
            for total in training.totals.values():
                total.zero_()
            training.update(update, update + 1)
            num_batches = min(training.batches_per_update, len(own) - update * training.batches_per_update)
            yield float(training.totals["loss"]) / num_batches
    finally:
        training.bits.release()


def count_updates(batches: BatchSource, config: TrainingConfig) -> int:
    """Of the weights, in an epoch."""
    return -(-len(batches) // (config.accumulation_steps * batches.ranks_played))


class _PhaseTraining:
    """The epochs of one phase: its optimiser, schedule, scaler and averaged weights.

    An update of the weights reads everything that changes from tensors at fixed addresses, its own number included,
    and tells the host nothing: on a CUDA device it is recorded once and replayed.
    """

    def __init__(
        self, phase: Phase, span: _Span, validation: ImageSource, config: TrainingConfig, ranks: Ranks = ALONE
    ) -> None:
        self.phase = phase
        self.first_epoch = span.epochs_before
        self.batches = batches = span.batches
        self.config = config
        self.ranks = ranks
        self.batches_per_update = config.accumulation_steps * batches.ranks_played
        self.images_of_epoch = len(batches) * batches.batch_size * ranks.number  # whole batches alone
        validated = validation if phase.stage is None else validation.for_stage(phase.stage)
        self.device = batches.device
        phase.network.requires_grad_(False)
        for module in phase.trained:
            module.requires_grad_(True)
        self._set_modes()
        set_drop_path(phase.network, phase.stage is None or phase.stage.drop_path)
        trained = [(name, weight) for name, weight in phase.network.named_parameters() if weight.requires_grad]
        self.parameters = [weight for _, weight in trained]
        self.optimizer = make_optimizer(trained, config)
        self.num_updates = count_updates(batches, config)
        self.start, self.schedule = span.start, span.schedule
        self.rates = self.schedule.to(self.device)
        num_updates = phase.epochs * self.num_updates
        self.annealed = {
            annealing.buffer: make_annealing(annealing.start, annealing.end, num_updates=num_updates).to(self.device)
            for annealing in phase.annealed
        }
        self.scaler = LossScaler(len(batches.seeds), self.device, enabled=config.precision == "fp16")
        self.averaged = AveragedWeights(phase.network, config.ema_decay) if config.ema_decay else None
        # Of the epoch, of all epochs, and of the phase.
        self.step, self.steps_done, self.updates_done = torch.zeros(3, 1, dtype=torch.int64, device=self.device)
        self.steps_done += span.steps_before
        self.totals: Metrics = {}
        # Of norms, which every rank sees other images for.
        norms = [module for module in phase.network.modules() if isinstance(module, ChannelNorm)]
        self.statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        self.bits = DropoutBits(batches.seeds, self.device)
        self._update: Callable[[int, int], object] = self._run_updates
        self._validate: Callable[[], Metrics] = lambda: evaluate(
            self.validated, validated, batches.normalise, config, ranks=ranks
        )
        if self.device.type == "cuda":
            kernels = cuda.load_kernels(self.device)
            if kernels is not None:
                if not config.compile:  # which fuses them itself
                    kernels.fuse(phase.network)
                if isinstance(batches, Batches) and batches.cuts_alone:
                    kernels.fuse_batches(batches)
                self.bits = kernels.FusedBits(batches.seeds, self.device)
            if config.compile:
                cuda.compile_forward(phase.network)
            self._update = cuda.Recorded(self._run_updates, self.state)
            if validated.is_resident:
                self._validate = cuda.Recorded(self._validate, dict)
        self.bits.attach(phase.network, batches.batch_size)

    def release(self) -> None:
        """Let recorded steps and threads go: they and what they work on refer to each other, and hold its memory."""
        self._update, self._validate = self._run_updates, dict
        self.batches.close()
        if self.device.type == "cuda":
            gc.collect()

    @property
    def validated(self) -> nn.Module:
        """The network whose weights are validated and kept."""
        return self.phase.network if self.averaged is None else self.averaged.network

    def state(self) -> dict[str, Tensor]:
        """Every tensor that an update changes: to go on from here, no other is needed."""
        state = {f"network/{name}": tensor for name, tensor in self.phase.network.state_dict().items()}
        if self.averaged is not None:
            state |= {f"averaged/{name}": tensor for name, tensor in self.averaged.network.state_dict().items()}
        for i, weight in enumerate(self.parameters):
            state |= {f"optimizer/{i}/{name}": tensor for name, tensor in self.optimizer.state[weight].items()}
        state |= {"scaler/scale": self.scaler.scale_S, "scaler/clean_steps": self.scaler.clean_steps_S}
        state |= {"step": self.step, "steps_done": self.steps_done, "updates_done": self.updates_done}
        return state | {f"totals/{name}": tensor for name, tensor in self.totals.items()}

    def load_state(self, saved: Mapping[str, Tensor], *, ranks_played: int) -> None:
        """Put every tensor of `state` back, of a process that played `ranks_played` ranks."""
        for name, tensor in saved.items():
            if name.startswith("totals/"):
                self.totals[name.removeprefix("totals/")] = torch.empty_like(tensor, device=self.device)
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
        if ranks_played != self.batches.ranks_played:
            for tensor in (self.step, self.steps_done, *self.totals.values()):
                tensor.copy_(tensor * self.batches.ranks_played / ranks_played)

    @torch.no_grad()
    def carry_on(self, before: "_PhaseTraining") -> None:
        """Begin with the averages, moments and counts of a phase that trained the same network, as if it was one.

        They are copied: an update reads from where it was recorded.
        """
        if self.averaged is not None and before.averaged is not None:
            self.averaged.network.load_state_dict(before.averaged.network.state_dict())
        for weight in self.parameters:
            for name, tensor in before.optimizer.state.get(weight, {}).items():
                self.optimizer.state[weight][name].copy_(tensor)
        self.scaler.scale_S.copy_(before.scaler.scale_S)
        self.scaler.clean_steps_S.copy_(before.scaler.clean_steps_S)

    def learning_rate(self, epoch: int) -> float:
        """At the start of the epoch."""
        return float(self.schedule[(epoch - 1 - self.first_epoch) * self.num_updates])

    def begin(self, epoch: int, *, goes_on: bool) -> None:
        """Begin an epoch, counted over all phases, or go on with one that was interrupted."""
        self.batches.begin(epoch)
        if not goes_on:
            for tensor in (self.step, *self.totals.values()):
                tensor.zero_()

    def stops(self, first: int) -> list[int]:
        """After how many of the epoch's updates the host looks around again, if `first` of them are done."""
        # An update of convolutions keeps the card busy for long, and to record one takes the host as long as to run it
        # unrecorded twice: ten ResNet-50 side by side on an H200 had a minute each for ten updates at once.
        are_short = not any(isinstance(module, Conv2d) for module in self.phase.network.modules())
        on_cuda = self.device.type == "cuda" and self.batches.is_resident
        stride = cuda.UPDATES_AT_ONCE if on_cuda and are_short else 1
        # The last group of batches in an epoch may be smaller than the others: its update is not like theirs.
        whole = len(self.batches) // self.batches_per_update
        stops = {*range(stride, whole, stride), whole, self.num_updates}
        return sorted(stop for stop in stops if stop > first)

    def update(self, first: int, last: int) -> None:
        """The epoch's updates from `first`, counted from 0, to before `last`, two of its `stops`."""
        group = self.batches_per_update
        num_batches = min(group, len(self.batches) - first * group)
        self.batches.load(first * group, num_batches)
        self._update(last - first, num_batches)

    def metrics(self) -> Metrics:
        """The epoch's means of all losses and the accuracies in percent, on the device, each `(S,)`."""
        # In an order of their own, or a run that goes on would have another one than its first epochs.
        metrics = {f"train_{name}": self.totals[name] / len(self.batches) for name in sorted(self.totals)}
        if self.phase.classifies:
            metrics |= {f"val_{name}": values for name, values in self._validate().items()}
            self._set_modes()
        return metrics

    def _run_updates(self, number: int, num_batches: int) -> None:
        for _ in range(number):
            self._run_update(num_batches)

    def _run_update(self, num_batches: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._anneal()
        statistics = _PlayedStatistics(self.statistics, self.batches.ranks_played)
        told: list[Metrics] = []
        for _ in range(num_batches):
            x, y = self.batches.take(self.step)
            # Ranks that train together have other bits each, as they have other images.
            self.bits.draw(self.steps_done * self.ranks.number + self.ranks.rank)
            with autocast(self.config, self.device):
                logits, parts = self.phase.network(x)
            # Losses in full precision: sums over many steps stall in 16 bits, and squares overflow.
            logits, parts = logits.float(), {name: part.float() for name, part in parts.items()}
            losses = _evaluate_terms(self.phase, logits, parts, y)
            self.scaler.scale(losses["loss"] / num_batches).sum().backward()
            told.append({name: value.detach() for name, value in losses.items()})
            self.step += 1
            self.steps_done += 1
            statistics.end_batch()
        gradients = [weight.grad for weight in self.parameters if weight.grad is not None]
        # With the losses, so that the state of every rank is that of all, and any of them can save it.
        self.ranks.average_([*gradients, *self.statistics, *(value for losses in told for value in losses.values())])
        self._add_up(told)
        self.scaler.unscale_(gradients)
        if self.config.clip_norm:
            clip_by_seed(gradients, self.config.clip_norm)
        rate = self.rates.index_select(0, self.updates_done)[0]
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update(self.phase.network, self.start + self.updates_done)
        self.updates_done += 1

    def _add_up(self, told: Sequence[Metrics]) -> None:
        """On the device: reading a number here would make the host wait at every step."""
        for losses in told:
            for name, value in losses.items():
                if name not in self.totals:
                    self.totals[name] = torch.zeros_like(value)
                self.totals[name] += value

    def _anneal(self) -> None:
        # In the averaged network too: an average would be of what it was long ago.
        networks = [self.phase.network] if self.averaged is None else [self.phase.network, self.averaged.network]
        for name, values in self.annealed.items():
            value = values.index_select(0, self.updates_done)
            for network in networks:
                network.get_buffer(name).copy_(value.expand_as(network.get_buffer(name)))

    def _set_modes(self) -> None:
        self.phase.network.eval()
        for module in self.phase.trained:
            module.train()


class _PlayedStatistics:
    """The running statistics of norms where one process plays several ranks, as if each had its own, and their mean.

    Every played rank begins where the batch before left all of them. For one rank there is nothing to do.
    """

    def __init__(self, statistics: Sequence[Tensor], number: int) -> None:
        self.statistics = statistics if number > 1 else ()
        self.number = number
        self.played = 0
        self._begin()

    def _begin(self) -> None:
        self.before = [tensor.clone() for tensor in self.statistics]
        self.means = [torch.zeros_like(tensor) for tensor in self.statistics]

    @torch.no_grad()
    def end_batch(self) -> None:
        """After the batch of one of the ranks."""
        self.played += 1
        for tensor, before, mean in zip(self.statistics, self.before, self.means, strict=True):
            mean.add_(tensor / self.number)
            tensor.copy_(mean if self.played % self.number == 0 else before)
        if self.played % self.number == 0:
            self._begin()


def _evaluate_terms(
    phase: Phase, logits_SBK: Tensor, parts: Mapping[str, Tensor], labels: Tensor | MixedLabels
) -> Metrics:
    """The phase's losses and, where it classifies, the accuracy in percent; of mixed images by their shares."""
    if isinstance(labels, MixedLabels):
        first = _evaluate_terms(phase, logits_SBK, parts, labels.labels_SB)
        other = _evaluate_terms(phase, logits_SBK, parts, labels.others_SB)
        return {name: other[name] + labels.share_S * (value - other[name]) for name, value in first.items()}
    losses = phase.objective(logits_SBK, parts, labels)
    if phase.classifies:
        with torch.no_grad():
            losses["accuracy"] = 100 * (logits_SBK.argmax(dim=-1) == labels).float().mean(dim=1)
    return losses


def evaluate(
    network: nn.Module,
    images: ImageSource,
    normalise: Normalise,
    config: TrainingConfig,
    *,
    measure: Callable[[Tensor, Tensor], Metrics] | None = None,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Cross-entropy and accuracies in percent of all seeds on the same images, each `(S,)`.

    Files that cannot be read count neither way.

    Args:
        network: Of all seeds.
        images: For the network's device.
        normalise: What stands between them.
        config: Of the training.
        measure: From logits `(S, B, K)` and labels `(S, B)` to other numbers whose means over images are wanted.
        ranks: Those that share the images, each with its part; the numbers are of all parts.

    Raises:
        UserError: If there is no image for this process.
    """
    network.eval()
    totals: Metrics = {}
    device, num_seen = images.device, 0
    with torch.inference_mode(), autocast(config, device):
        for pixels, labels in images.chunks(config.eval_batch_size):
            if not len(labels):
                continue
            num_seen += len(labels)
            logits = network(normalise(pixels).unsqueeze(0))[0].float()
            y = labels.expand(len(logits), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(dim=1)
            measured = {} if measure is None else measure(logits, y)
            for name, value in ({"loss": loss} | accuracies(logits, y) | measured).items():
                weighted = value * (len(labels) / len(images))
                totals[name] = totals[name] + weighted if name in totals else weighted
    if images.is_resident:
        return totals
    if not num_seen:
        raise UserError(
            f"of {count_of(len(images), 'image')} to evaluate there is none for one of {ranks.number} processes, or "
            "none that can be read: choose a larger imagenet.val_fraction, or a smaller num_gpus"
        )
    seen = ranks.sum({"seen": torch.tensor(float(num_seen), device=device)})["seen"].round()
    return {name: value * (len(images) / seen) for name, value in ranks.sum(totals).items()}


def to_host(metrics: Metrics) -> dict[str, list[float]]:
    """The numbers, one for each seed; the one moment of an epoch at which the host waits for the device."""
    numbers = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
    # Accuracies are counts over some thousand images: what float32 has beyond four decimals is noise.
    return {
        name: [round(value, 4) for value in values] if "accuracy" in name else values
        for name, values in numbers.items()
    }


def accuracies(logits: Tensor, labels: Tensor) -> Metrics:
    """Top-1 and top-5 accuracy in percent of logits `(S, B, K)`, each `(S,)`."""
    ranked = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
    return {
        "accuracy": 100 * ranked[..., 0].float().mean(dim=1),
        "top5_accuracy": 100 * ranked.any(dim=-1).float().mean(dim=1),
    }
