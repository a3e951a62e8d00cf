"""A study: units of work in an Optuna storage that any number of workers share, each seed of each done exactly once.

Who takes a unit holds a lock that all workers know, reads what there is, and marks the unit as taken by itself before
it lets go. A unit that is taken by a worker that is no longer alive is taken again, with the same hyperparameters.
"""

import contextlib
import logging
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from collective_pipeline.config import ModelType, Space, SweepConfig, UserError, hide_password
from collective_pipeline.randomness import key
from collective_pipeline.tuning.locks import KEEP_ALIVE, FileLocks, Locks, PostgresLocks
from collective_pipeline.tuning.space import suggest

logger = logging.getLogger(__name__)

Stage = Literal["grid", "search", "final"]
Direction = Literal["maximize", "minimize"]

# Trials at random before the sampler has something to learn from; TPE's own default.
STARTUP_TRIALS = 10
# Hyperband's smallest budget, as a part of the largest: four brackets that differ by a factor of three.
SMALLEST_BUDGET = 1 / 27
REDUCTION_FACTOR = 3
# Before the name of a worker that the study knows; its value is how much it takes at once.
WORKER = "worker/"
# A unit that ends its process again and again is not to take down one worker after the other.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Unit:
    """What is trained and told as one: an arm of this type with all its seeds.

    Attributes:
        stage: Of the sweep.
        model_type: Of the arm.
        name: A size in the grid, a number in the search, and after it the number of the trial that is trained anew.
        seeds: That are wanted. Those that the study has already are not trained again.
    """

    stage: Stage
    model_type: ModelType
    name: str
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.stage} {self.model_type} {int(self.name):,}"


@dataclass(frozen=True)
class Claim:
    """A unit that this worker has taken, with the seeds that it lacks; its trial in Optuna, and the trial's values."""

    unit: Unit
    study: optuna.Study
    trial: optuna.Trial
    values: dict[str, Any]


class Study:
    """The trials of all units, in one Optuna study for each stage and model type.

    Args:
        name: Of the study in its storage.
        storage: Optuna's.
        locks: Of all its workers.
        config: What is searched, and for what.
    """

    def __init__(self, name: str, storage: BaseStorage, locks: Locks, config: SweepConfig) -> None:
        self.name = name
        self.storage = storage
        self.locks = locks
        self.config = config
        self.worker = uuid.uuid4().hex
        self.root = self._study(name, ["maximize"])
        self._parts: dict[tuple[Stage, ModelType], optuna.Study] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept about the study as a whole."""
        return dict(self.root.user_attrs)

    @property
    def folder_name(self) -> str:
        """Of what is kept beside the storage: another storage's study of the same name has another one."""
        return f"{self.name}-{self.keep('key', uuid.uuid4().hex[:8])}"

    def keep(self, name: str, fact: Any) -> Any:
        """Keep a fact about the whole study unless there is one of this name; return the one that is kept."""
        with self.locks.hold(f"{self.name}.facts"):
            if name not in self.facts:
                self.root.set_user_attr(name, fact)
            return self.facts[name]

    @contextlib.contextmanager
    def at_work(self, capacity: int = 1) -> Iterator[None]:
        """While this lasts, what this worker has taken is its own; it takes up to `capacity` units at once."""
        with self.locks.hold(self.worker):
            self.root.set_user_attr(f"{WORKER}{self.worker}", capacity)
            yield

    def claim(self, units: Iterable[Unit], space: Mapping[ModelType, Space]) -> Claim | None:
        """Take the first unit that nobody has done or is doing.

        None if there is none, or if this worker has its share of what is left: others would stand idle at the end.
        What is searched is chosen here, so that a sampler knows of everything that was chosen before.
        """
        with self.locks.hold(f"{self.name}.claims"):
            attempts = self.attempts(units)
            alive = {unit: [trial for trial in trials if self._is_alive(trial)] for unit, trials in attempts.items()}
            num_own = sum(trial.user_attrs["worker"] == self.worker for trials in alive.values() for trial in trials)
            lacking = {unit: _lacking(unit, [t for t in attempts[unit] if is_done(t)]) for unit in attempts}
            if num_own >= self._share(sum(unit is not None for unit in lacking.values())):
                return None
            for unit, trials in attempts.items():
                free = lacking[unit] and _lacking(unit, [*alive[unit], *(t for t in trials if is_done(t))])
                if free is None:
                    continue
                study = self.part(unit.stage, unit.model_type)
                self._give_up(study)
                dead = [
                    t for t in trials if not is_done(t) and t not in alive[unit] and set(_seeds(t)) <= {*free.seeds}
                ]
                if dead and _seeds(dead[-1]):  # as it was left: its saved state is of these seeds
                    free = replace(free, seeds=_seeds(dead[-1]))
                left = [trial for trial in dead if _seeds(trial) == free.seeds]
                if len(left) >= MAX_ATTEMPTS:
                    trial = study.ask()
                    self._mark(trial, free)
                    trial.set_user_attr("failure", f"its worker died {MAX_ATTEMPTS} times")
                    study.tell(trial, state=TrialState.FAIL)
                    logger.warning("%s is given up: its worker died %d times", unit, MAX_ATTEMPTS)
                    continue
                return self._take(study, free, left, space)
        return None

    def _share(self, num_open: int) -> int:
        """How many of the open units this worker may work on at once, beside the others that are alive."""
        capacities: dict[str, int] = {}
        for name, capacity in self.root.user_attrs.items():
            worker = name.removeprefix(WORKER)
            if worker == name or not capacity:
                continue
            if worker == self.worker or self.locks.is_held(worker):
                capacities[worker] = capacity
            else:
                self.root.set_user_attr(name, 0)  # it has left, and need not be asked for again
        own = capacities.get(self.worker, 1)
        return math.ceil(num_open * own / max(own, sum(capacities.values())))

    def _give_up(self, study: optuna.Study) -> None:
        """Whatever nobody works on any more is failed, also what a worker left between two of its own steps."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._is_alive(trial):
                study.tell(trial.number, state=TrialState.FAIL)
        for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.tell(study.ask(), state=TrialState.FAIL)  # whose values would be taken for the next one's

    def _take(
        self, study: optuna.Study, unit: Unit, attempts: Sequence[FrozenTrial], space: Mapping[ModelType, Space]
    ) -> Claim:
        if attempts:
            logger.info("%s was left unfinished by another worker: it is taken again", unit)
            study.enqueue_trial(attempts[-1].params)
        study.sampler = self._sampler(unit)
        trial = study.ask()
        try:
            self._mark(trial, unit)
            trial.set_user_attr("worker", self.worker)
            values = suggest(trial, space[unit.model_type]) if unit.stage == "search" else {}
        except BaseException:  # or this worker would seem to be at work on it
            study.tell(trial, state=TrialState.FAIL)
            raise
        return Claim(unit, study, trial, values)

    @staticmethod
    def _mark(trial: optuna.Trial, unit: Unit) -> None:
        trial.set_user_attr("unit", unit.name)
        trial.set_user_attr("seeds", unit.seeds)

    def attempts(self, units: Iterable[Unit]) -> dict[Unit, list[FrozenTrial]]:
        """All trials of each unit, of whichever seeds, the first one first."""
        attempts: dict[Unit, list[FrozenTrial]] = {unit: [] for unit in units}
        named = {(unit.stage, unit.model_type, unit.name): unit for unit in attempts}
        for stage, model_type in dict.fromkeys((unit.stage, unit.model_type) for unit in attempts):
            for trial in self.part(stage, model_type).get_trials(deepcopy=False):
                unit = named.get((stage, model_type, trial.user_attrs.get("unit", "")))
                if unit is not None:
                    attempts[unit].append(trial)
        return attempts

    def outcomes(self, units: Iterable[Unit]) -> dict[Unit, list[FrozenTrial]]:
        """The trials that are the result of each unit that is done, which together have all its seeds."""
        done = {unit: _first_of_each_seed(trials) for unit, trials in self.attempts(units).items()}
        return {unit: trials for unit, trials in done.items() if _lacking(unit, trials) is None}

    def part(self, stage: Stage, model_type: ModelType) -> optuna.Study:
        """Optuna's study of this stage and model type."""
        part = stage, model_type
        if part not in self._parts:
            both = stage == "search" and self.config.objective == "accuracy_and_params"
            directions: list[Direction] = ["maximize", "minimize"] if both else ["maximize"]
            self._parts[part] = self._study(f"{self.name}/{stage}/{model_type}", directions)
        return self._parts[part]

    def _study(self, name: str, directions: list[Direction]) -> optuna.Study:
        epochs = self.config.trial_epochs
        pruner = optuna.pruners.HyperbandPruner(
            min_resource=max(1, round(epochs * SMALLEST_BUDGET)), max_resource=epochs, reduction_factor=REDUCTION_FACTOR
        )
        return optuna.create_study(
            storage=self.storage, study_name=name, directions=directions, pruner=pruner, load_if_exists=True
        )

    def _sampler(self, unit: Unit) -> optuna.samplers.BaseSampler:
        """Seeded by the unit: workers that begin together do not begin with the same values."""
        return optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=key(0, str(unit)) % 2**32
        )

    def _is_alive(self, trial: FrozenTrial) -> bool:
        if trial.state != TrialState.RUNNING:
            return False
        worker = trial.user_attrs.get("worker")
        return worker == self.worker or (worker is not None and self.locks.is_held(worker))


def is_done(trial: FrozenTrial) -> bool:
    """Whether this trial is the result of its unit; one that its worker left is not."""
    return trial.state in {TrialState.COMPLETE, TrialState.PRUNED} or "failure" in trial.user_attrs


def _seeds(trial: FrozenTrial) -> tuple[int, ...]:
    return tuple(trial.user_attrs.get("seeds", ()))


def _first_of_each_seed(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those that are done and add a seed to those before them.

    A worker whose connection to the server was cut for a while has lost its lock, and another may have done the same.
    """
    firsts: list[FrozenTrial] = []
    had: set[int] = set()
    for trial in trials:
        if is_done(trial) and not had.issuperset(_seeds(trial)):
            firsts.append(trial)
            had.update(_seeds(trial))
    return firsts


def _lacking(unit: Unit, trials: Iterable[FrozenTrial]) -> Unit | None:
    """The unit with the seeds that these trials do not have, or None if they have all."""
    had = {seed for trial in trials for seed in _seeds(trial)}
    seeds = tuple(seed for seed in unit.seeds if seed not in had)
    return replace(unit, seeds=seeds) if seeds else None


def open_study(config: SweepConfig, name: str, identity: Mapping[str, Any], default: Path) -> Study:
    """The study of this name, made if there is none.

    Args:
        config: Its storage, and what is searched.
        name: Of the study; with `config.fork` that of another beside it, if it is of other settings.
        identity: The settings that all its results have in common, by the names that a user knows.
        default: The file that it is kept in if the configuration names none.

    Raises:
        UserError: If the storage cannot be reached, or the study is of other settings, naming what differs.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage, locks = _connect(config.storage or str(default), name)
    for number in range(1, 1000):
        study = Study(name if number == 1 else f"{name}-{number}", storage, locks, config)
        kept = study.keep("identity", dict(identity))
        differing = [part for part in kept | identity if kept.get(part) != identity.get(part)]
        if not differing:
            return study
        if not config.fork:
            was = "; ".join(f"{part} was {kept.get(part)!r} and is {identity.get(part)!r}" for part in differing)
            raise UserError(
                f"the study '{study.name}' is of other settings: {was}; give the command that began it, another name "
                "(sweep.study), or sweep.fork=true to begin another beside it"
            )
    raise UserError(f"there are a thousand studies beside '{name}': choose another name (sweep.study)")


def _connect(place: str, study: str) -> tuple[BaseStorage, Locks]:
    scheme, separator, rest = place.partition("://")
    try:
        if not separator:
            path = Path(place)
            locks: Locks = FileLocks(path.with_name(f"{path.name}.locks"))
            with locks.hold("storage"):
                return JournalStorage(JournalFileBackend(str(path))), locks
        if scheme == "sqlite" and rest.strip("/"):
            path = Path(rest.removeprefix("/"))
            locks = FileLocks(path.with_name(f"{path.name}.locks"))
            with locks.hold("storage"):
                # Workers that write at the same time wait for each other.
                return RDBStorage(place, engine_kwargs={"connect_args": {"timeout": 60}}), locks
        if scheme.split("+")[0] in {"postgresql", "postgres"}:
            url = f"postgresql+psycopg://{rest}"
            locks = PostgresLocks(url, study)
            with PostgresLocks(url, "").hold("storage"):  # the first worker of any study makes the tables
                # Nothing is left open that a worker would have to close; a study asks little.
                arguments = {"connect_args": KEEP_ALIVE, "poolclass": sqlalchemy.NullPool}
                return RDBStorage(url, engine_kwargs=arguments), locks
    except ModuleNotFoundError as error:
        raise UserError("sweep.storage: PostgreSQL needs psycopg: install collective-pipeline[postgres]") from error
    except (OSError, ValueError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = hide_password(str(error).strip().splitlines()[0])
        raise UserError(
            f"sweep.storage={hide_password(place)} cannot be used ({reason}): start the server, or choose another place"
        ) from error
    raise UserError(
        f"sweep.storage={hide_password(place)!r}: choose a file for the processes of one machine, sqlite:///file, or "
        "postgresql://user@host/database for several machines"
    )
