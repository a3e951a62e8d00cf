"""Kill a training run at random moments, let it go on, and compare the end with that of a run nobody touched.

    python benchmarks/interrupted.py [--kills 30] [--signal KILL|TERM] [--device cpu] [--seed 0]

Trains two arms on a part of MNIST with everything that has a state (augmentation, dropout, averaged weights,
a schedule, gradient accumulation, early stopping) and saves many times a second. Compared are SHA-256 digests of the
last snapshot's tensors (weights, optimiser, averages, best weights), the history without its clock, and the test
results. Prints a line for each kill, and fails if one of them ends otherwise.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from collective_pipeline.config import DEBUG, Parameters, TrainingConfig
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import RawImages, make_splits
from collective_pipeline.evaluation.gpu import USAGE_COLUMNS
from collective_pipeline.training import interrupt, snapshots
from collective_pipeline.training.runtime import choose_device
from collective_pipeline.training.train import match_to_splits, score, snapshots_at, train_arm

FOLDER = Path(__file__).parents[1] / "data" / "01_raw" / "mnist"
ARMS = ("collective", "deep_resnet")
NUM_IMAGES = 12_000
CLOCKS = {"seconds", *USAGE_COLUMNS}


def settings_for(device: str, *, resume: bool) -> Parameters:
    """A short training in which everything has a state."""
    training = TrainingConfig(
        epochs=4,
        batch_size=128,
        accumulation_steps=3,
        optimizer="adamw",
        schedule="cosine",
        warmup_epochs=1,
        clip_norm=1.0,
        ema_decay=0.99,
        early_stopping_patience=3,
    )
    return DEBUG.model_copy(
        update={
            "seeds": (1, 2),
            "training": training,
            "device": device,
            "resume": resume,
        }
    )


def train(folder: Path, device_name: str) -> None:
    """Train both arms, going on from what `folder` holds, and write the digest of how it ended."""
    snapshots.SECONDS_BETWEEN, snapshots.SHARE = 0.1, 0.5
    settings, device = settings_for(device_name, resume=True), choose_device(device_name)
    raw = load_images("mnist", FOLDER)
    part = torch.arange(NUM_IMAGES)
    raw = RawImages(raw.name, raw.train[part], raw.test[part[:1000]], raw.class_names)
    splits = make_splits(raw, val_fraction=settings.data.val_fraction, split_seed=settings.data.split_seed)
    ends = {}
    (folder / "started").touch()
    with interrupt.listen():
        for name in ARMS:
            arm, last = match_to_splits(settings, splits, name), folder / name / "last.safetensors"
            saved = snapshots_at(last, arm, splits, settings, device)
            try:
                checkpoint, result = train_arm(
                    arm, splits, settings.training, seeds=settings.seeds, device=device, snapshots=saved
                )
            except interrupt.Interrupted as stopped:
                sys.exit(str(stopped))
            tensors = snapshots.read_snapshot(last).tensors
            history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in result.history]
            tested = score(checkpoint, splits.test, splits, settings.training, device=device)
            ends[name] = {
                "tensors": hashlib.sha256(
                    b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
                ).hexdigest(),
                "history": hashlib.sha256(json.dumps(history).encode()).hexdigest(),
                "results": hashlib.sha256(json.dumps([tested, result.best_epochs]).encode()).hexdigest(),
            }
    (folder / "end.json").write_text(json.dumps(ends))


def start(folder: Path, device: str) -> subprocess.Popen[bytes]:
    """A process that trains; it gets here once it is about to."""
    (folder / "started").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, __file__, "--train", str(folder), "--device", device],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    while not (folder / "started").exists() and process.poll() is None:
        time.sleep(0.01)
    return process


def finish(folder: Path, device: str) -> tuple[dict[str, dict[str, str]], float]:
    """Train to the end; how it ended, and the seconds from when training was about to begin."""
    process, started = start(folder, device), time.perf_counter()
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())
    return json.loads((folder / "end.json").read_text()), time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        torch.set_num_threads(1)
        train(options.train, options.device)
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def new_folder(trial: int) -> Path:
            made = folder / str(trial)
            made.mkdir()
            return made

        expected, seconds = finish(new_folder(0), options.device)
        print(f"Unbroken: {seconds:.1f} s of training on {options.device}, torch {torch.__version__}", flush=True)
        moments = [random.Random(f"{options.seed}/{i}").uniform(0, seconds) for i in range(options.kills)]

        def interrupted(trial: int) -> str:
            place, moment = new_folder(trial), moments[trial - 1]
            process = start(place, options.device)
            time.sleep(moment)
            sent = time.perf_counter()
            process.send_signal(signal.Signals[f"SIG{options.signal}"])
            process.communicate()
            stopped_after = time.perf_counter() - sent
            found = sorted(str(path.relative_to(place)) for path in place.rglob("*.safetensors"))
            end, _ = finish(place, options.device)
            differing = [f"{arm} {what}" for arm in ARMS for what in end[arm] if end[arm][what] != expected[arm][what]]
            verdict = f"DIFFERS in {', '.join(differing)}" if differing else "identical"
            print(
                f"kill {trial:>2} after {moment:5.1f} s, dead {stopped_after:4.1f} s later; "
                f"found {', '.join(found) or 'nothing'}: {verdict}",
                flush=True,
            )
            return verdict

        with ThreadPoolExecutor(options.at_once) as pool:
            verdicts = list(pool.map(interrupted, range(1, options.kills + 1)))
        counts = Counter(verdicts)
        print(f"{counts['identical']} of {options.kills} interrupted runs ended identical to the unbroken one")
        sys.exit(counts["identical"] != options.kills)


if __name__ == "__main__":
    main()
