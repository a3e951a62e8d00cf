"""Whose rate is looked for, and what comes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from collective_pipeline.config import Arm, Parameters, check_parameters
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import Splits
from collective_pipeline.data.streaming import StreamedSplits
from collective_pipeline.evaluation.rates import answer_rates, suggest_rate, tabulate_rates, write_rate_report
from collective_pipeline.pipelines import deepmoe, imagenet, tiny_imagenet
from collective_pipeline.pipelines.comparison.nodes import describe_run
from collective_pipeline.pipelines.data.nodes import read_settings as read_parameters
from collective_pipeline.pipelines.data.nodes import split_images
from collective_pipeline.training.rate_finder import find_rates
from collective_pipeline.training.tracking import log_series
from collective_pipeline.training.train import match_to_splits


def load_small_images(folder: Path, settings: Parameters) -> Splits:
    """Of the settings' data set, in its folder among those of all data sets; downloaded where it is not there."""
    return split_images(load_images(settings.dataset, folder / settings.dataset), settings)


def open_image_files(folder: Path, settings: Parameters) -> StreamedSplits:
    """Of the tree that `imagenet.folder` names, wherever that is; the files themselves, packed or not."""
    files = settings.model_copy(update={"imagenet": settings.imagenet.model_copy(update={"pack_side": None})})
    index, _ = imagenet.nodes.index_files(files, None)
    return imagenet.nodes.open_images(files, index, folder)


@dataclass(frozen=True)
class Subject:
    """An experiment, as far as its first arm needs it.

    Attributes:
        make: From its settings and its images to its arms; the first one is trained.
        load: From the folder of all raw images and its settings to its images.
    """

    make: Callable[[Parameters, Any], list[Arm]]
    load: Callable[[Path, Parameters], Splits | StreamedSplits] = load_small_images


# By the values of `lr_finder.experiment`.
SUBJECTS = {
    "single": Subject(lambda settings, splits: [match_to_splits(settings, splits)]),
    "deepmoe": Subject(deepmoe.nodes.make_arms),
    "tiny_imagenet": Subject(tiny_imagenet.nodes.make_arms),
    "imagenet": Subject(
        lambda settings, splits: [imagenet.nodes.make_network(settings, splits)],
        open_image_files,
    ),
}


def read_settings(parameters: dict[str, Any]) -> tuple[Parameters, torch.device]:
    """Those of the experiment that `lr_finder.experiment` names, and the device."""
    experiment = check_parameters(parameters).lr_finder.experiment
    return read_parameters(parameters, None if experiment == "single" else experiment)


def load_splits(folder: Path, settings: Parameters) -> Splits | StreamedSplits:
    """The experiment's images."""
    return SUBJECTS[settings.lr_finder.experiment].load(folder, settings)


def make_arm(settings: Parameters, splits: Splits | StreamedSplits) -> Arm:
    """The experiment's first arm."""
    return SUBJECTS[settings.lr_finder.experiment].make(settings, splits)[0]


def find(
    arm: Arm, splits: Splits | StreamedSplits, settings: Parameters, device: torch.device
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The loss at every rate, and what it says."""
    finder = settings.lr_finder
    rates, losses = find_rates(arm, splits, settings.training, finder, device=device)
    table = tabulate_rates(rates, losses, planned=finder.updates)
    log_series({f"lr_finder/{name}": table[name].tolist() for name in table})
    found = suggest_rate(table)
    told = answer_rates(found, table, name=arm.model_type, planned=finder.updates)
    parameter = (
        "training.learning_rate" if finder.experiment == "single" else f"{finder.experiment}.training.learning_rate"
    )
    if found["suggested_rate"] is not None:
        scaled = ", which is multiplied with several GPUs" if finder.experiment == "imagenet" else ""
        told = f"{told} The parameter is {parameter}{scaled}."
    return table, {
        "answer": told,
        "experiment": finder.experiment,
        "model_type": arm.model_type,
        "parameter": parameter,
        **found,
    }


def report(
    settings: Parameters,
    splits: Splits | StreamedSplits,
    device: torch.device,
    table: pd.DataFrame,
    summary: dict[str, Any],
) -> str:
    """The page that says which rate to try."""
    return write_rate_report(
        title=f"Which learning rate for {summary['model_type']} on {settings.dataset}?",
        table=table,
        found=summary,
        facts=describe_run(settings, splits, device, "lr_finder"),
    )
