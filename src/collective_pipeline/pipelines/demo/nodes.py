"""Which checkpoint is served, and where."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from collective_pipeline.config import Parameters, UserError
from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint, read_header
from collective_pipeline.pipelines.demo.app import Responder, listen, make_app, run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A checkpoint, where it lies, and its validation accuracy in percent, the mean over seeds; NaN: not known."""

    checkpoint: Checkpoint
    path: Path
    accuracy: float

    @property
    def rank(self) -> tuple[bool, int, float, str]:
        """The higher, the better: networks on images first, those of most classes, then by accuracy, then the newest.

        Accuracies on other data cannot be compared: digits are easier than a thousand things.
        """
        known = -1.0 if math.isnan(self.accuracy) else self.accuracy
        arm = self.checkpoint.arm
        return arm.is_convolutional, arm.num_classes, known, self.path.parent.name


def choose_checkpoint(settings: Parameters, models: Path, outputs: Path) -> Served:
    """The checkpoint that the parameters name, or the best of those that experiments have left here.

    The best has the highest validation accuracy among the newest checkpoints of all arms whose network is
    convolutional and knows the most classes; where there is none, of all others.

    Args:
        settings: Of the run.
        models: A folder for each arm, with a folder for each version of its checkpoint.
        outputs: A folder for each arm, with the results of its last run.

    Raises:
        UserError: If there is none.
    """
    if settings.checkpoint is not None:
        path = Path(settings.checkpoint).expanduser()
        if not path.is_file():
            raise UserError(
                f"checkpoint={settings.checkpoint} is no file: name a checkpoint, a .safetensors file, or leave it out "
                "for the best there is"
            )
        return Served(load_checkpoint(path), path, math.nan)
    found = []
    for arm in sorted(models.glob("*/best.safetensors")):
        versions = sorted(arm.glob(f"*/{arm.name}"))
        if versions:
            found += _describe(versions[-1], outputs / arm.parent.name / "results.csv")
    if not found:
        raise UserError(
            f"there is no trained network in {models}: train one first, kedro run --env debug or kedro run --pipeline "
            "deepmoe --env debug, or name a file with --params checkpoint=<file>"
        )
    best = max(found, key=lambda one: one.rank)
    if len(found) > 1:
        logger.info("The best of %d checkpoints is %s; others by checkpoint=<file>", len(found), best.path)
    return Served(load_checkpoint(best.path), best.path, best.accuracy)


def _describe(path: Path, results: Path) -> list[Served]:
    """The checkpoint, without its weights; none, which is told, if it cannot be read."""
    try:
        checkpoint = read_header(path)
    except UserError as error:
        logger.warning("Left out: %s", error)
        return []
    return [Served(checkpoint, path, _find_accuracy(checkpoint, results))] if checkpoint.good_seeds else []


def _find_accuracy(checkpoint: Checkpoint, results: Path) -> float:
    """From the arm's table, unless that is of another training: one that goes on, or was not evaluated."""
    if not results.is_file():
        return math.nan
    table = pd.read_csv(results)
    epochs = dict(zip(table["seed"], table["best_epoch"], strict=True))
    is_same = epochs == dict(zip(checkpoint.seeds, checkpoint.best_epochs, strict=True))
    is_same &= set(table["params"]) == {checkpoint.arm.params}
    return float(table["val_accuracy"].mean()) if is_same else math.nan


def serve(served: Served, settings: Parameters, device: torch.device) -> None:
    """Answer until the run is told to stop."""
    host, port = settings.demo.host, settings.demo.port
    checkpoint = served.checkpoint
    with listen(host, port) as address:
        respond = Responder(checkpoint, device, seed=settings.checkpoint_seed)
        seeds = respond.seeds
        accuracy = "" if math.isnan(served.accuracy) else f", validation accuracy {served.accuracy:.2f} %"
        who = f"seed {seeds[0]}" if len(seeds) == 1 else f"the mean of {len(seeds)} seeds"
        about = f"{checkpoint.arm.model_type} for {checkpoint.dataset}, {who}{accuracy}"
        logger.info("Serving %s, from %s", about, served.path)
        if host not in {"127.0.0.1", "::1", "localhost"}:
            logger.warning("demo.host=%s: other machines can reach the page as well, without a password.", host)
        run(make_app(respond, about=about), address)
    logger.info("The demo has ended.")
