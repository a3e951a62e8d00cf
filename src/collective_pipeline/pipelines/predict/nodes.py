"""What the trained networks say of a user's own images."""

import logging
import time
from pathlib import Path

import pandas as pd
import torch

from collective_pipeline.config import Parameters, UserError
from collective_pipeline.data.image_files import ADVICE, ImageSource, find_images
from collective_pipeline.evaluation.predict import BATCH_SIZE, Predictor, choose_seeds, tabulate
from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint
from collective_pipeline.training import interrupt
from collective_pipeline.training.progress import SECONDS_BETWEEN_LINES, duration

logger = logging.getLogger(__name__)


def choose_checkpoint(settings: Parameters, saved: Path) -> Checkpoint:
    """The checkpoint that the parameters name, whichever arm and data set it is of, or the newest of theirs.

    Args:
        settings: Of the run.
        saved: The arm's checkpoints, a folder for each version.

    Raises:
        UserError: If there is none, if the newest is of another data set, or if it lacks the seed that is asked for.
    """
    if settings.images is None:
        raise UserError(f"images is not given: {ADVICE}, with --params images=<path>")
    if settings.checkpoint is not None:
        path = Path(settings.checkpoint).expanduser()
        if not path.is_file():
            raise UserError(
                f"checkpoint={settings.checkpoint} is no file: name a checkpoint, a .safetensors file, or leave it out "
                f"for the newest of {settings.model_type}"
            )
        checkpoint = load_checkpoint(path)
    else:
        versions = sorted(saved.glob(f"*/{saved.name}"))
        if not versions:
            raise UserError(
                f"there is no trained {settings.model_type} in {saved}: train it first, kedro run --params "
                f"model_type={settings.model_type},dataset={settings.dataset}, for minutes with --env debug"
            )
        path = versions[-1]
        checkpoint = load_checkpoint(path)
        if checkpoint.dataset != settings.dataset:
            raise UserError(
                f"{path} is of dataset={checkpoint.dataset} and not of {settings.dataset}: add "
                f"dataset={checkpoint.dataset} to --params, or name another file with checkpoint=<path>"
            )
    seeds = choose_seeds(checkpoint, settings.checkpoint_seed)
    who = f"seed {seeds[0]}" if len(seeds) == 1 else f"the mean of {len(seeds)} seeds"
    logger.info("Predicting with %s of %s for %s, from %s", who, checkpoint.arm.model_type, checkpoint.dataset, path)
    return checkpoint


def list_images(settings: Parameters, checkpoint: Checkpoint) -> ImageSource:
    """The images that the parameter `images` names, relative to where the command is typed."""
    return find_images(Path(settings.images or "").expanduser(), checkpoint.images)


def predict(images: ImageSource, checkpoint: Checkpoint, settings: Parameters, device: torch.device) -> pd.DataFrame:
    """One row an image: its file or index, the prediction, its probability, and every class's."""
    predictor = Predictor(checkpoint, device, seed=settings.checkpoint_seed)
    started = last_line = time.perf_counter()
    probabilities: list[torch.Tensor] = []
    done = 0
    for batch in images.batches(BATCH_SIZE):
        probabilities.append(predictor(batch))
        done += len(batch)
        now = time.perf_counter()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            left = duration((now - started) / done * (len(images) - done))
            logger.info("%s of %s images are predicted, %s left", f"{done:,}", f"{len(images):,}", left)
        if interrupt.requested():
            interrupt.stop(f"nothing is written of the {done:,} of {len(images):,} images that were predicted")
    logger.info("%s images predicted in %s", f"{done:,}", duration(time.perf_counter() - started))
    table = tabulate(torch.cat(probabilities), checkpoint.images.class_names)
    table.insert(0, images.kind, list(images.names))
    return table
