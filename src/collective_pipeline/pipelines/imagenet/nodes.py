"""From a tree of image files to a trained network."""

import logging
import shutil
from pathlib import Path

import pandas as pd
import torch

from collective_pipeline.config import Arm, GateConfig, ImageNetConfig, Parameters, UserError, count_of
from collective_pipeline.data.image_index import ImageIndex, compare_index, index_images
from collective_pipeline.data.packed import claim_folder, pack_images
from collective_pipeline.data.streaming import Share, StreamedBatches, StreamedSplits, list_files, stream_index
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.image_arms import image_architecture, make_image_arm
from collective_pipeline.pipelines.arm.nodes import clear, tabulate_history
from collective_pipeline.training import interrupt
from collective_pipeline.training.launch import count_ranks, is_launched, launch
from collective_pipeline.training.rank import Job, lead, scale_rate, work
from collective_pipeline.training.ranks import ALONE
from collective_pipeline.training.snapshots import Snapshots
from collective_pipeline.training.tracking import run_environment

logger = logging.getLogger(__name__)

# About what JPEG of quality 90 takes for photographs.
PACKED_BYTES_A_PIXEL = 0.5
FEW = 100  # images, of which each is a whole point of accuracy or more


def index_files(settings: Parameters, known: ImageIndex | None) -> tuple[ImageIndex, pd.DataFrame]:
    """All images below `imagenet.folder` with their labels, and a table of what was found.

    The tree is listed each time, its folders in parallel; what an earlier run found serves to tell what has changed.

    Args:
        settings: Of the run.
        known: The index that an earlier run left, to compare with; None: there is none.

    Raises:
        UserError: If the folder is in no known layout, or half extracted, or without labels.
    """
    own = settings.imagenet
    root = Path(own.folder).expanduser()
    if not root.is_dir():
        what = "a file" if root.exists() else "not there"
        raise UserError(f"{root} is {what}: give the folder of the images, --params imagenet.folder=<path>")
    index = index_images(root, subset_size=own.subset_size, subset_seed=settings.data.split_seed)
    is_same = known is not None and (known.root, known.subset) == (index.root, index.subset)
    if known is not None and is_same and known.digest != index.digest:
        logger.warning("%s is not as it was when it was last indexed: %s", root, compare_index(known, index))
    logger.info("%s\n%s", root, index.tell())
    return index, index.describe()


def open_images(settings: Parameters, index: ImageIndex, folder: Path) -> StreamedSplits:
    """The images as training reads them: the files, or a packed copy, which is made or completed first.

    Each tree, by its name, and each size of packed images has a folder of its own in `folder`; a copy of all images
    serves any subset of them.

    Raises:
        UserError: If a class has too few, or too many cannot be read.
    """
    own, packed = settings.imagenet, None
    if own.pack_side is not None:
        folder = folder / index.root.resolve().name / str(own.pack_side)
        packed = (folder / "train", folder / "val")
        check_room(index, folder, own.pack_side)
        claims = [  # of all parts before any is packed: one may be of another copy
            claim_folder(list_files(index, part.name), part, side=own.pack_side, quality=own.pack_quality)
            for part in packed
        ]
        for claim in claims:
            pack_images(claim, num_threads=own.threads, look_around=_stop_packing_if_told)
    splits = stream_index(index, own, split_seed=settings.data.split_seed, packed=packed)
    if len(splits.val) < FEW:
        logger.warning(
            "The epoch is chosen by only %s, %.3g points of accuracy each: a larger imagenet.val_fraction may choose "
            "better.",
            count_of(len(splits.val), "image"),
            100 / len(splits.val),
        )
    return splits


def _stop_packing_if_told() -> None:
    if interrupt.requested():
        interrupt.stop("the same command goes on with what is packed")


def check_room(index: ImageIndex, folder: Path, side: int) -> None:
    """Raise a `UserError` if the disk has too little room for a packed copy with this shorter side, in `folder`."""
    largest = PACKED_BYTES_A_PIXEL * side * side * 4 / 3
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = int(index.table["num_bytes"].clip(upper=largest).sum()) - there
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB of room and a packed copy with imagenet.pack_side={side} may take "
            f"{needed / 1e9:.1f} GB: free some, choose a smaller side, or leave it out to read the files as they are"
        )


def make_network(settings: Parameters, splits: StreamedSplits) -> Arm:
    """The network of these settings for these images."""
    return make_arm(settings.imagenet, splits.num_classes)


def make_arm(config: ImageNetConfig, num_classes: int) -> Arm:
    """The network for as many classes.

    Raises:
        UserError: If the images are too small for it in one of the stages.
    """
    sizes = {stage.image_size or config.image_size for stage in config.training.plan()}
    *_, arm = (_arm_at(size, config, num_classes) for size in (*sorted(sizes), config.image_size))
    return arm


def _arm_at(size: int, config: ImageNetConfig, num_classes: int) -> Arm:
    architecture = image_architecture(
        config.model,
        (3, size, size),
        GateConfig(),
        stem=config.stem,
        width=config.width,
        blur=config.blur,
        drop_path=config.drop_path,
        head=config.head,
        zero_init_residual=config.zero_init_residual,
    )
    return make_image_arm(config.model, architecture, num_classes=num_classes)


def clear_for_training(
    splits: StreamedSplits, settings: Parameters, device: torch.device, arm: Arm, state: Path
) -> Snapshots:
    """Where training saves its state; one of another run is refused here.

    A run that goes on has batches and a learning rate for as many GPUs as the one that was interrupted.

    Raises:
        UserError: If there are fewer GPUs than wanted, or fewer images than a batch needs.
    """
    number = count_ranks(settings.num_gpus, device)
    if number > 1 and device.type == "cpu":
        logger.warning("No GPU is used: %d processes train on the CPU.", number)
    snapshots = Job(arm, splits, settings, state, number, device.type).snapshots(device, number)
    planned = snapshots.recall("num_gpus") or number
    snapshots.identify(num_gpus=planned)
    few = min(len(splits.val), len(splits.test))
    if few < number:
        raise UserError(
            f"num_gpus={number}: each of them evaluates a part of the images, and there are {few} in the smaller of "
            f"validation and test: choose at most {few}, or a larger imagenet.val_fraction"
        )
    splits = splits.for_share(Share(0, number, planned))
    for stage in settings.training.plan():  # refuses what it cannot cut into batches
        StreamedBatches(splits, settings.seeds[:1], settings.training, stage)
    clear([snapshots])
    return snapshots


def describe_updates(settings: Parameters, snapshots: Snapshots) -> dict[str, dict[str, str]]:
    """For the report, the images and the learning rate of an update, on as many GPUs as training was begun on."""
    number, steps = snapshots.identity["num_gpus"], settings.training.accumulation_steps
    factors = f" x {number} GPUs" * (number > 1) + f" x {steps} accumulated" * (steps > 1)
    stages, first = {}, 1
    for stage in settings.training.plan():
        size, last = stage.batch_size or settings.training.batch_size, first + stage.epochs - 1
        stages[f"epochs {first} to {last}" if last > first else f"epoch {first}"] = (
            f"{stage.image_size} px, {size * number * steps:,} images an update"
            + (f" ({size:,}{factors})" if factors else "")
        )
        first = last + 1
    rate = f"{scale_rate(settings, number).learning_rate:g} at most"
    if number > 1:
        rate += f" ({settings.training.learning_rate:g}, scaled for {number} GPUs: {settings.imagenet.rate_scaling})"
    return {"Plan": {**stages, "learning rate": rate}}


def train(
    arm: Arm, splits: StreamedSplits, settings: Parameters, device: torch.device, snapshots: Snapshots
) -> tuple[Checkpoint, pd.DataFrame]:
    """Train in this process, in several that are started here, or with those that torchrun has started."""
    number = count_ranks(settings.num_gpus, device)
    job = Job(arm, splits, settings, snapshots.path, snapshots.identity["num_gpus"], device.type)
    if is_launched():
        checkpoint, fit, unreadable = lead(job)
    elif number > 1:
        checkpoint, fit, unreadable = launch(job, number=number, environment=run_environment())
    else:
        checkpoint, fit, unreadable = work(job, ALONE, device)
    splits.note_unreadable(unreadable)
    return checkpoint, tabulate_history(arm.model_type, fit)
