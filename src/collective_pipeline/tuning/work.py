"""The work of a study: claim a unit, train it, tell what came of it, until all of them are done."""

import contextlib
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
from optuna.trial import TrialState

from collective_pipeline.config import (
    LOOKS_ON,
    MODEL_TYPES,
    Arm,
    Parameters,
    Range,
    SweepConfig,
    UserError,
    count_of,
    flatten,
    with_values,
)
from collective_pipeline.data.splits import Splits
from collective_pipeline.evaluation.results import final_metrics, tabulate
from collective_pipeline.models.checkpoint import Checkpoint, save_checkpoint
from collective_pipeline.models.matching import OutOfReach, count_collective, match_arm, match_size
from collective_pipeline.randomness import key
from collective_pipeline.training import interrupt
from collective_pipeline.training.loop import Epoch
from collective_pipeline.training.progress import Progress, duration
from collective_pipeline.training.runtime import choose_device
from collective_pipeline.training.snapshots import Snapshots
from collective_pipeline.training.tracking import Curves, log_model
from collective_pipeline.training.train import score, snapshots_at, train_arm
from collective_pipeline.tuning.space import space_of
from collective_pipeline.tuning.study import Claim, Study, Unit, open_study
from collective_pipeline.tuning.tracking import Tracking, log_outcome

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0
# What the commands that share a study have in common: what every training of it reads,
READ = ("data.", "collective.", "baselines.", "training.")
# and of the sweep itself, or of a search.
OF_ALL = ("dataset", "sweep.mode")
OF_SEARCH = ("sweep.trial_epochs", "sweep.trial_seeds", "sweep.objective")


@dataclass(frozen=True)
class Task:
    """Everything that a worker needs, on this machine or as a process of its own.

    Attributes:
        settings: Of the run.
        splits: The images.
        file: The study's, if the settings name no storage.
        folder: For the state of trials that are interrupted.
        tracking: Where the trials are tracked, if they are.
    """

    settings: Parameters
    splits: Splits
    file: Path
    folder: Path
    tracking: Tracking | None = None

    def open(self) -> Study:
        """The study; see `open_study`."""
        settings = self.settings
        name = settings.sweep.study or f"{settings.sweep.mode}-{settings.dataset}"
        return open_study(settings.sweep, name, identify(settings, self.splits), self.file)


def identify(settings: Parameters, splits: Splits) -> dict[str, Any]:
    """The settings that all results of a study have in common.

    More sizes, model types, trials or seeds only add to a study, so they are not among them.
    """
    search = settings.sweep.mode == "search"
    kept = OF_ALL + OF_SEARCH * search

    def is_shared(name: str) -> bool:
        return (
            (name.startswith(READ) and name not in LOOKS_ON)
            or name in kept
            or (search and name.startswith("sweep.space."))
        )

    shared = {name: value for name, value in flatten(settings).items() if is_shared(name)}
    return shared | {"images": splits.digest}


def list_units(settings: Parameters) -> list[Unit]:
    """The units of the sweep's first stage, all model types of a size or number before the next."""
    sweep = settings.sweep
    if sweep.mode == "grid":
        seeds = settings.seeds
        return [Unit("grid", name, str(size), seeds) for size in sorted(sweep.sizes) for name in sweep.model_types]
    return [Unit("search", name, str(n), sweep.trial_seeds) for n in range(sweep.trials) for name in sweep.model_types]


def list_finals(study: Study, settings: Parameters) -> list[tuple[Unit, optuna.trial.FrozenTrial]]:
    """The best trials of each model type, which are trained anew; nothing unless the search is all done.

    Of several objectives the Pareto front counts, the most accurate first.
    """
    units = list_units(settings)
    if settings.sweep.mode == "grid" or len(study.outcomes(units)) < len(units):
        return []
    finals = []
    for model_type in settings.sweep.model_types:
        part, own = study.part("search", model_type), {unit.name for unit in units}
        done = [trial for trial in part.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
        # Another command may ask for more trials; which of them are the best here must not depend on how far it is.
        done = [trial for trial in done if trial.user_attrs["unit"] in own]
        if settings.sweep.objective == "accuracy_and_params":
            front = {trial.number for trial in part.best_trials}
            done = [trial for trial in done if trial.number in front]
        done.sort(key=lambda trial: (-trial.values[0], trial.number))
        # By the trial, not by its rank: more trials later may change the ranks.
        finals += [
            (Unit("final", model_type, trial.user_attrs["unit"], settings.seeds), trial)
            for trial in done[: settings.sweep.retrain]
        ]
    return finals


def all_units(study: Study, settings: Parameters) -> list[Unit]:
    """Those of the first stage, and those that follow from its results as far as they are known."""
    return list_units(settings) + [unit for unit, _ in list_finals(study, settings)]


def check_sizes(settings: Parameters, splits: Splits) -> None:
    """Every size of the grid can be met by every model type, in a search every size of the single networks.

    Raises:
        UserError: Naming the first that cannot.
    """
    sweep = settings.sweep
    searched = sweep.space.get("baselines.target_params", ())
    if sweep.mode == "grid":
        tried, where = [(unit, settings) for unit in list_units(settings)], "sweep.sizes"
    else:
        sizes = (searched.low, searched.high) if isinstance(searched, Range) else searched
        sized = [with_values(settings, {"baselines.target_params": size}) for size in sizes]
        units = [unit for unit in list_units(settings)[: len(sweep.model_types)] if unit.model_type != "collective"]
        tried, where = list(itertools.product(units, sized)), "baselines.target_params in sweep.space"
    for unit, with_size in tried:
        try:
            _arm_of(unit, with_size, splits)
        except OutOfReach as error:
            raise UserError(f"{error.what}; change {where}") from None


def estimate_largest(settings: Parameters, *, in_dim: int, num_classes: int) -> int:
    """About how many parameters the largest network of the sweep has, one seed of it.

    Of a search: that of the largest number that each name of the space may have.
    """
    sweep = settings.sweep
    if sweep.mode == "grid":
        return max(sweep.sizes)
    largest = {}
    for name, values in sweep.space.items():
        numbers = [values.high] if isinstance(values, Range) else [x for x in values if isinstance(x, int | float)]
        if name.startswith(("collective.", "baselines.")) and numbers:
            largest[name] = max(numbers)
    with contextlib.suppress(UserError):  # all of them together may be no collective; then as it is configured
        settings = with_values(settings, largest)
    collective = count_collective(settings.collective, in_dim=in_dim, num_classes=num_classes)
    return max(collective, settings.baselines.target_params or 0)


def count_side_by_side(config: SweepConfig, device: torch.device) -> int:
    """How many trainings a worker has at once on this device."""
    return config.side_by_side or (len(MODEL_TYPES) if device.type == "cuda" else 1)


def run_workers(task: Task, device: torch.device) -> None:
    """Work until the study is done, with as many processes as `sweep.workers` says, this one included.

    Each takes a CUDA device of its own as long as there are enough.
    """
    study = task.open()
    units = all_units(study, task.settings)
    if len(study.outcomes(units)) == len(units):
        logger.info("Nothing is left of the %s of the study '%s'", count_of(len(units), "training"), study.name)
        return
    num_workers = task.settings.sweep.workers
    context = multiprocessing.get_context("spawn")  # a fork would share what torch and the locks hold
    others = [context.Process(target=_work_as_process, args=(task, i)) for i in range(1, num_workers)]
    try:
        for other in others:
            other.start()
        work(task, _device_of(device, 0, num_workers), num_workers=num_workers)
    except BaseException:
        for other in (other for other in others if other.pid is not None):
            other.terminate()  # SIGTERM: they save what they have
        raise
    finally:
        for other in (other for other in others if other.pid is not None):
            other.join()
    # Only here is all of the work done: one that is stopped leaves it to whoever goes on.
    for other in others:
        if other.exitcode:
            logger.warning("A worker ended early (exit status %d): the others have done its work", other.exitcode)


def _work_as_process(task: Task, index: int) -> None:
    num_workers = task.settings.sweep.workers
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s  worker {index}  %(message)s", datefmt="%H:%M:%S")
    for name in ("mlflow", "alembic", "optuna"):
        logging.getLogger(name).setLevel(logging.WARNING)
    parent = multiprocessing.parent_process()
    if parent is not None:  # whoever ends the command with SIGKILL does not want its workers to go on unseen
        watch = threading.Thread(target=_stop_after, args=(parent,), daemon=True)
        watch.start()
    with interrupt.listen(patient=True):
        try:
            device = _device_of(choose_device(task.settings.device), index, num_workers)
            work(task, device, num_workers=num_workers)
        except interrupt.Interrupted as stopped:
            raise SystemExit(stopped.exit_code) from None
        except UserError as error:
            raise SystemExit(str(error)) from None


def _stop_after(parent: multiprocessing.process.BaseProcess) -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _device_of(device: torch.device, index: int, num_workers: int) -> torch.device:
    """A card of its own as long as there are enough, unless the user has named one."""
    if device.type == "cuda" and device.index is None and num_workers > 1:
        return torch.device("cuda", index % torch.cuda.device_count())
    return device


def work(task: Task, device: torch.device, *, num_workers: int = 1) -> None:
    """Work as one worker until all units are done, whoever does them.

    Args:
        task: What is to be done.
        device: Where.
        num_workers: That share this machine's cores, and its memory or cards.
    """
    side_by_side = count_side_by_side(task.settings.sweep, device)
    num_devices = torch.cuda.device_count() if device.type == "cuda" and task.settings.device in {"auto", "cuda"} else 1
    with _threads(device, num_workers * side_by_side):
        worker = Worker(task, task.open(), device, side_by_side * math.ceil(num_workers / num_devices))
        with worker.study.at_work(side_by_side), ThreadPoolExecutor(side_by_side) as pool:
            running = [pool.submit(worker.run) for _ in range(side_by_side)]
            for future in running:
                future.result()


@contextlib.contextmanager
def _threads(device: torch.device, num_trainings: int) -> Iterator[None]:
    """Cores are divided: torch's threads of several workers would wait for each other."""
    usual = torch.get_num_threads()
    own = 1 if device.type == "cuda" else max(1, usual // num_trainings)
    torch.set_num_threads(own)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


class Worker:
    """One process's part of the work; its threads share it.

    Args:
        task: What is to be done.
        study: Where it is shared.
        device: Where to train.
        num_beside: How many trainings share the device at the same time.
    """

    def __init__(self, task: Task, study: Study, device: torch.device, num_beside: int) -> None:
        self.task = task
        self.settings = task.settings
        self.study = study
        self.device = device
        self.num_beside = num_beside
        self.folder = task.folder / study.folder_name
        self.started = time.perf_counter()
        self.num_done_before = self.num_done(self.units())
        model_types = self.settings.sweep.model_types
        self.space = {model_type: space_of(self.settings.sweep.space, model_type) for model_type in model_types}

    def run(self) -> None:
        """Claim and do units until all are done; wait for those of others, which may be left to this one."""
        try:
            while not interrupt.requested():
                units = self.units()
                claim = self.study.claim(units, self.space)
                if claim is not None:
                    self._do(claim)
                elif self.num_done(units) == len(units) == len(self.units()):
                    return
                else:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        except interrupt.Interrupted:
            raise
        except BaseException as error:  # or the threads beside would work, or wait, on and on
            interrupt.request(error)
            raise
        interrupt.stop("the study is saved; give the same command again to go on from there")

    def units(self) -> list[Unit]:
        """All that are known by now."""
        return all_units(self.study, self.settings)

    def num_done(self, units: Sequence[Unit]) -> int:
        """How many of these have a result, whoever has found it."""
        return len(self.study.outcomes(units))

    def _do(self, claim: Claim) -> None:
        """Train a unit, and tell what came of it: a result, that it was pruned, or why there is none."""
        unit = claim.unit
        try:
            settings = self._settings_of(claim)
            arm = _arm_of(unit, settings, self.task.splits)
        except UserError as error:  # these hyperparameters cannot be used; others can
            if unit.stage != "search":
                raise
            self._fail(claim, str(error))
            return
        chosen = {"params": arm.params, "target_params": arm.target_params}
        tracked = flatten(settings) | {f"arm.{name}": value for name, value in flatten(arm).items()} | chosen
        snapshots, tracking = self._snapshots(unit, arm, settings), self.task.tracking
        with tracking.trial(unit, snapshots.run_file, tracked) if tracking else contextlib.nullcontext():
            self._train(claim, arm, settings, snapshots)

    def _settings_of(self, claim: Claim) -> Parameters:
        """What this unit is trained with."""
        settings, unit = self.settings, claim.unit
        values: dict[str, Any] = {}
        if unit.stage == "search":
            values = claim.values | {"training.epochs": settings.sweep.trial_epochs}
        elif unit.stage == "final":
            [found] = self.study.outcomes(
                [Unit("search", unit.model_type, unit.name, settings.sweep.trial_seeds)]
            ).values()
            values = found[0].user_attrs["values"]
        return with_values(settings, values).model_copy(update={"seeds": unit.seeds})

    def _train(self, claim: Claim, arm: Arm, settings: Parameters, snapshots: Snapshots) -> None:
        unit, splits = claim.unit, self.task.splits
        claim.trial.set_user_attr("values", claim.values)
        claim.trial.set_user_attr("params", arm.params)
        search = unit.stage == "search"
        prunes = search and self.settings.sweep.objective == "accuracy"
        pruner = _Pruner(claim, num_seeds=len(settings.seeds), prunes=prunes)
        name = str(unit)
        progress = Progress(
            name, num_epochs=settings.training.epochs, num_arms=1, device_type=self.device.type, brief=search
        )
        try:
            checkpoint, fit = train_arm(
                arm,
                splits,
                settings.training,
                seeds=settings.seeds,
                device=self.device,
                callbacks=[progress, Curves(), pruner],
                watch=progress.watch,
                snapshots=snapshots,
                num_beside=self.num_beside,
            )
        except optuna.TrialPruned:
            log_outcome(TrialState.PRUNED, {"final/val_accuracy": pruner.best})
            self._tell(claim, pruner, state=TrialState.PRUNED)
            return
        if search:
            if not all(fit.best_epochs):
                self._fail(claim, "the loss of a seed diverged before it had good weights", pruner)
                return
            accuracy = sum(fit.best_accuracies) / len(fit.best_accuracies)
            values = [accuracy, arm.params] if self.settings.sweep.objective == "accuracy_and_params" else [accuracy]
            log_outcome(TrialState.COMPLETE, {"final/val_accuracy": accuracy, "final/model_params": arm.params})
            self._tell(claim, pruner, values=values)
            return
        test = score(checkpoint, splits.test, splits, settings.training, device=self.device)
        history = pd.DataFrame(fit.history)
        rows = tabulate(
            checkpoint,
            history,
            test,
            settings.training,
            price_per_gpu_hour=settings.price_per_gpu_hour,
        )
        claim.trial.set_user_attr("arm", arm.model_dump(mode="json"))
        claim.trial.set_user_attr("rows", _as_json(rows))
        if not any(fit.best_epochs):  # its rows say so, and the comparison reports it
            self._fail(claim, "the loss of every seed diverged before it had good weights", pruner)
            return
        log_outcome(TrialState.COMPLETE, final_metrics(rows))
        # Before the study is told: whoever is killed in between keeps it again, in its place, and nothing is lost.
        if unit.stage == "final":
            self._keep(unit, checkpoint)
        self._tell(claim, pruner, values=[float(rows["val_accuracy"].mean())])

    def _keep(self, unit: Unit, checkpoint: Checkpoint) -> None:
        """What the search found best, trained: a model to take away."""
        folder = self._folder(unit)
        path = folder.with_name(f"{folder.name}.safetensors")
        save_checkpoint(checkpoint, path)
        if self.task.tracking:
            log_model(checkpoint, path, self.task.splits.test.images[:2])

    def _snapshots(self, unit: Unit, arm: Arm, settings: Parameters) -> Snapshots:
        """Where the unit's state is saved; what another code or other values left there is given up."""
        folder = self._folder(unit)
        resuming = settings.model_copy(update={"resume": folder.exists()})
        snapshots = snapshots_at(folder / "last.safetensors", arm, self.task.splits, resuming, self.device)
        try:
            snapshots.check()
        except UserError:
            shutil.rmtree(folder)
            return self._snapshots(unit, arm, settings)
        return snapshots

    def _folder(self, unit: Unit) -> Path:
        # Others may train other seeds of the same at this moment.
        digest = f"{key(0, str(unit.seeds)):x}"[:8]
        name = f"{unit.name}.seeds-{unit.seeds[0]}-{unit.seeds[-1]}-{digest}"
        return self.folder / unit.stage / unit.model_type / name

    def _fail(self, claim: Claim, reason: str, pruner: "_Pruner | None" = None) -> None:
        logger.warning("%s has no result: %s", claim.unit, reason)
        log_outcome(TrialState.FAIL, {}, reason)
        claim.trial.set_user_attr("failure", reason)
        self._end(claim, pruner, state=TrialState.FAIL)

    def _end(self, claim: Claim, pruner: "_Pruner | None", **outcome: Any) -> None:
        if pruner is not None:
            claim.trial.set_user_attr("epochs", pruner.epochs)
            claim.trial.set_user_attr("seconds", pruner.seconds)
        claim.study.tell(claim.trial, **outcome)
        shutil.rmtree(self._folder(claim.unit), ignore_errors=True)

    def _tell(self, claim: Claim, pruner: "_Pruner", **outcome: Any) -> None:
        self._end(claim, pruner, **outcome)
        units = self.units()
        done = self.num_done(units)
        elapsed = time.perf_counter() - self.started
        left = elapsed / max(1, done - self.num_done_before) * (len(units) - done)
        what = "pruned at" if outcome.get("state") == TrialState.PRUNED else "done,"
        logger.info(
            "%s %s %.2f %% validation accuracy; %d of %s, about %s left",
            claim.unit,
            what,
            pruner.best,
            done,
            count_of(len(units), "unit"),
            duration(left),
        )


class _Pruner:
    """A callback that reports the mean of the best accuracies so far, and stops a trial that Hyperband gives up."""

    def __init__(self, claim: Claim, *, num_seeds: int, prunes: bool) -> None:
        self.claim = claim
        self.prunes = prunes
        self.bests = [0.0] * num_seeds
        self.epochs = 0
        self.seconds = 0.0

    @property
    def best(self) -> float:
        """The mean of every seed's best accuracy, as the result of a trial is."""
        return sum(self.bests) / len(self.bests)

    def __call__(self, epoch: Epoch) -> None:
        if epoch.partial:
            return
        for s, accuracy in enumerate(epoch.metrics.get("val_accuracy", [])):
            if epoch.running[s] and math.isfinite(accuracy):
                self.bests[s] = max(self.bests[s], accuracy)
        self.epochs, self.seconds = epoch.number, epoch.seconds
        if not self.prunes:
            return
        self.claim.trial.report(self.best, epoch.number)
        if not epoch.finished and self.claim.trial.should_prune():
            raise optuna.TrialPruned


def _arm_of(unit: Unit, settings: Parameters, splits: Splits) -> Arm:
    about = {"in_dim": splits.in_dim, "num_classes": splits.num_classes}
    if unit.stage == "grid":
        return match_size(unit.model_type, int(unit.name), settings.collective, settings.baselines, **about)
    return match_arm(unit.model_type, settings.collective, settings.baselines, **about)


def _as_json(rows: pd.DataFrame) -> list[Any]:
    return rows.astype(object).where(rows.notna(), None).to_dict(orient="records")
