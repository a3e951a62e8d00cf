"""Let workers share a study, kill one of them at a random moment, and look whether anything was lost or done twice.

    python benchmarks/shared_study.py [--runs 20] [--workers 3] [--mode grid] [--storage sqlite] [--seed 0]

Each run is a study of its own on a part of MNIST: as many processes as `--workers` begin together, one of them gets
SIGKILL at a random moment between the first one's start and its likely end, and the others finish. Then every unit must
have exactly one result, no unit may have been trained to its end twice, and in a grid all test accuracies must be those
of a study that one worker did alone. Prints a line for each run, and fails if one of them ends otherwise.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from optuna.trial import TrialState

from collective_pipeline.config import Parameters, check_parameters
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import RawImages, make_splits
from collective_pipeline.tuning.outcome import collect_runs
from collective_pipeline.tuning.study import is_done
from collective_pipeline.tuning.work import Task, list_finals, list_units, work
from conditions import describe

FOLDER = Path(__file__).parents[1] / "data" / "01_raw" / "mnist"
NUM_IMAGES = 4000
CPU = torch.device("cpu")


def settings_for(mode: str, storage: str, study: str) -> Parameters:
    """A short study of two model types."""
    return check_parameters(
        {
            "seeds": [1, 2],
            "device": "cpu",
            "training": {"epochs": 3, "batch_size": 64, "augmentation_strength": 0.0},
            "sweep": {
                "mode": mode,
                "study": study,
                "storage": storage,
                "model_types": ["shallow", "deep"],
                "sizes": [40_000, 60_000, 80_000, 100_000],
                "trials": 6,
                "trial_epochs": 3,
                "space": {
                    "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
                    "baselines.target_params": [40_000, 80_000],
                },
            },
        }
    )


def task_for(mode: str, storage: str, folder: Path) -> Task:
    """What every worker of a study is given."""
    settings = settings_for(mode, storage, f"{folder.parent.name}-{folder.name}")
    raw = load_images("mnist", FOLDER)
    raw = RawImages(raw.name, raw.train[torch.arange(NUM_IMAGES)], raw.test[torch.arange(1000)], raw.class_names)
    splits = make_splits(raw, val_fraction=settings.data.val_fraction, split_seed=settings.data.split_seed)
    return Task(settings, splits, folder / "unused.journal", folder / "states")


def work_once(mode: str, storage: str, folder: Path) -> None:
    """One worker, until the study is done."""
    torch.set_num_threads(1)
    (folder / "started").touch()
    work(task_for(mode, storage, folder), CPU)


def begin_worker(mode: str, storage: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--work", str(folder), "--mode", mode, "--storage", storage])


def check(mode: str, storage: str, folder: Path) -> tuple[str, dict[tuple[str, int, int], float]]:
    """What is wrong with a finished study, or nothing; and the test accuracies by model type, size and seed."""
    task = task_for(mode, storage, folder)
    study = task.open()
    units = [*list_units(task.settings), *(unit for unit, _ in list_finals(study, task.settings))]
    attempts = study.attempts(units)
    lost = [str(unit) for unit, trials in attempts.items() if not any(map(is_done, trials))]
    doubled = [str(unit) for unit, trials in attempts.items() if sum(map(is_done, trials)) > 1]
    left = [str(unit) for unit, trials in attempts.items() if any(t.state == TrialState.RUNNING for t in trials)]
    retried = [str(unit) for unit, trials in attempts.items() if len(trials) > 1]
    problems = {"lost": lost, "doubled": doubled, "left running": left}
    told = "; ".join(f"{name}: {', '.join(names)}" for name, names in problems.items() if names)
    runs, _ = collect_runs(study, task.settings)
    keys = zip(runs["model_type"], runs["target_params"], runs["seed"], strict=True)
    print(f"{len(units)} units, {len(retried)} taken again ({', '.join(retried) or 'none'})", end="; ", flush=True)
    return told, dict(zip(keys, runs["test_accuracy"], strict=True))


def place_of(kind: str, folder: Path) -> str:
    if kind == "journal":
        return str(folder / "study.journal")
    return f"sqlite:///{folder}/study.db" if kind == "sqlite" else kind


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--mode", choices=["grid", "search"], default="grid")
    parser.add_argument("--storage", default="journal", help="journal, sqlite, or a PostgreSQL address")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work_once(options.mode, options.storage, options.work)
        return

    print(describe(CPU))
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        alone = root / "alone"
        alone.mkdir()
        began = time.perf_counter()
        work_once(options.mode, place_of(options.storage, alone), alone)
        usual = time.perf_counter() - began
        _, expected = check(options.mode, place_of(options.storage, alone), alone)
        print(f"one worker alone: {usual:.1f} s")
        failures = 0
        for number in range(1, options.runs + 1):
            folder = root / str(number)
            folder.mkdir()
            place = place_of(options.storage, folder)
            workers = [begin_worker(options.mode, place, folder) for _ in range(options.workers)]
            while not (folder / "started").exists():
                time.sleep(0.05)
            moment = moments.uniform(0, usual)
            time.sleep(moment)
            victim = moments.choice(workers)
            was_at_work = victim.poll() is None
            victim.kill()
            statuses = [worker.wait() for worker in workers]
            print(f"run {number:2}: SIGKILL after {moment:4.1f} s{'' if was_at_work else ', too late'}", end="; ")
            told, results = check(options.mode, place, folder)
            if any(status for worker, status in zip(workers, statuses, strict=True) if worker is not victim):
                told = f"{told}; another worker failed"
            if options.mode == "grid" and results != expected:
                told = f"{told}; other results than one worker's"
            failures += bool(told)
            print(told or "nothing lost, nothing doubled", flush=True)
    print(f"{options.runs - failures} of {options.runs} runs as they should be")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
