"""What the trained networks say of a user's own images."""

import logging
import time
from pathlib import Path
from typing import get_args

import pandas as pd
import torch

from collective_pipeline.config import DATASETS, ArmName, DatasetName, Parameters, UserError, count_of, suggest
from collective_pipeline.data.image_files import ADVICE, ImageSource, find_images
from collective_pipeline.evaluation.predict import BATCH_SIZE, Predictor, choose_seeds, tabulate
from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint, read_header
from collective_pipeline.training import interrupt
from collective_pipeline.training.progress import SECONDS_BETWEEN_LINES, duration

logger = logging.getLogger(__name__)

FILE_NAME = "best.safetensors"


def choose_checkpoint(settings: Parameters, models: Path) -> Checkpoint:
    """The checkpoint that the parameters name, whichever arm and data set it is of, or the newest of theirs.

    Args:
        settings: Of the run.
        models: A folder for each arm, with a folder for each version of its checkpoint.

    Raises:
        UserError: If there is none, if the newest is of another data set, or if it lacks the seed that is asked for.
    """
    if settings.images is None:
        raise UserError(f"images is not given: {ADVICE}, with --params images=<path>")
    if settings.checkpoint is not None:
        path = Path(settings.checkpoint).expanduser()
        if settings.arm is not None:
            raise UserError(f"arm={settings.arm} and checkpoint={path} both say which network answers: give one")
        if not path.is_file():
            raise UserError(
                f"checkpoint={settings.checkpoint} is no file: name a checkpoint, a .safetensors file, or leave it out "
                f"for the newest of {settings.model_type}"
            )
        checkpoint = load_checkpoint(path)
    elif settings.arm is not None:
        path = _find_arm(settings.arm, settings.dataset, models)
        checkpoint = load_checkpoint(path)
    else:
        saved = models / settings.model_type / FILE_NAME
        versions = sorted(saved.glob(f"*/{FILE_NAME}"))
        if not versions:
            raise UserError(
                f"there is no trained {settings.model_type} in {saved}: train it first, kedro run --params "
                f"model_type={settings.model_type},dataset={settings.dataset}, for minutes with --env debug; or name "
                "an arm of another experiment with arm=<name>"
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


def _find_arm(arm: str, dataset: DatasetName, models: Path) -> Path:
    """The newest checkpoint of an arm or in a folder of this name, and of `dataset` if there are several."""
    newest, unreadable = _list_newest(models)
    of_arm = {trained: path for (name, trained), path in newest.items() if name == arm}
    if len(of_arm) == 1:
        return next(iter(of_arm.values()))
    if dataset in of_arm:
        return of_arm[dataset]
    if of_arm:
        # The name of what was in a folder of image files is no data set that can be asked for.
        ways = [
            f"dataset={trained}" if trained in DATASETS else f"checkpoint={path} in place of arm, for {trained}"
            for trained, path in of_arm.items()
        ]
        raise UserError(
            f"{arm} was trained for {', '.join(of_arm)} and not for dataset={dataset}: choose with --params "
            f"{', or '.join(ways)}"
        )
    there = sorted({name for name, _ in newest})
    left_out = f" (left out: {len(unreadable)} that cannot be read, the first: {unreadable[0]})" if unreadable else ""
    advice = f"{suggest(arm, there)}, or train it first" if there else ": train it first"
    raise UserError(f"there is no trained {arm} in {models}{left_out}{advice}")


def _list_newest(models: Path) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """The newest checkpoint of every arm or folder and data set; what is wrong with those that cannot be read.

    A folder's name counts where no arm is called so.
    """
    newest: dict[tuple[str, str], Path] = {}
    unreadable: list[str] = []
    for path in sorted(models.glob(f"*/{FILE_NAME}/*/{FILE_NAME}"), key=lambda path: path.parent.name):
        try:
            header = read_header(path)
        except UserError as error:
            unreadable.append(str(error))
            continue
        model_type, folder = header.arm.model_type, path.parents[2].name
        # A folder that a user gave the name of another network does not answer for that one.
        for name in (model_type,) if folder in get_args(ArmName) else (model_type, folder):
            newest[name, header.dataset] = path
    return newest, unreadable


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
            logger.info("%s of %s are predicted, %s left", f"{done:,}", count_of(len(images), "image"), left)
        if interrupt.requested():
            interrupt.stop(f"nothing is written of the {done:,} of {count_of(len(images), 'image')} predicted")
    logger.info("%s predicted in %s", count_of(done, "image"), duration(time.perf_counter() - started))
    table = tabulate(torch.cat(probabilities), checkpoint.images.class_names)
    table.insert(0, images.kind, list(images.names))
    return table
