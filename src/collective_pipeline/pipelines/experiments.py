"""What is known of every pipeline before it runs: which parameters it reads, and how many weights it saves."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from collective_pipeline.config import (
    HOW_TO_PLAN,
    MODEL_TYPES,
    PLANNED,
    DatasetName,
    Parameters,
    TrainingConfig,
    UserError,
    parameter_names,
)
from collective_pipeline.models.matching import parameter_budget
from collective_pipeline.pipelines.deepmoe import list_arms
from collective_pipeline.pipelines.imagenet import make_arm
from collective_pipeline.pipelines.merged_moe import estimate_params
from collective_pipeline.pipelines.tiny_imagenet import list_arms as list_techniques
from collective_pipeline.training.runtime import choose_device
from collective_pipeline.tuning.work import count_side_by_side, estimate_largest

# Copies of a trained arm: the best weights, and MLflow's.
KEPT = 2


@dataclass(frozen=True)
class Experiment:
    """A pipeline, as seen from the command line.

    Attributes:
        reads: Its parameters: whole sections, or names in them.
        ignores: Names in those sections that it does not read.
        count_weights: About how many weights may be on the disk at once with these settings, states of training among
            them.
    """

    reads: tuple[str, ...]
    count_weights: Callable[[Parameters], int]
    ignores: tuple[str, ...] = ()

    def is_reader_of(self, name: str) -> bool:
        """Whether it reads the parameter of this dotted name."""
        return name not in self.ignores and any(name == read or name.startswith(f"{read}.") for read in self.reads)


def _count_matched(settings: Parameters) -> int:
    """Of one arm."""
    in_dim, num_classes = _flat(settings.dataset)
    target = parameter_budget(settings.collective, settings.baselines, in_dim=in_dim, num_classes=num_classes)
    return len(settings.seeds) * target * (KEPT + _saved(settings.training))


def _count_deepmoe(settings: Parameters) -> int:
    own = settings.deepmoe
    params = sum(arm.params for arm in list_arms(own, *_about(own.dataset)))
    return len(own.seeds) * params * (KEPT + _saved(own.training))


def _count_merged_moe(settings: Parameters) -> int:
    own = settings.merged_moe
    params = estimate_params(own, *_about(own.dataset))
    return len(own.seeds) * params * (KEPT + max(_saved(own.training), _saved(own.sub_models)))


def _count_tiny_imagenet(settings: Parameters) -> int:
    own = settings.tiny_imagenet
    params = sum(arm.params for arm in list_techniques(own, *_about(own.dataset)))
    return len(own.seeds) * params * (KEPT + _saved(own.training.model_copy(update={"ema_decay": own.ema_decay})))


def _count_imagenet(settings: Parameters) -> int:
    own = settings.imagenet
    return len(own.seeds) * make_arm(own, num_classes=1000).params * (KEPT + _saved(own.training))


def _count_sweep(settings: Parameters) -> int:
    """States of as many trainings as there are at once, and what a search keeps; a grid keeps no weights."""
    sweep, (in_dim, num_classes) = settings.sweep, _flat(settings.dataset)
    largest = estimate_largest(settings, in_dim=in_dim, num_classes=num_classes)
    at_once = sweep.workers * count_side_by_side(sweep, choose_device(settings.device))
    kept = KEPT * sweep.retrain * len(sweep.model_types) if sweep.mode == "search" else 0
    return len(settings.seeds) * largest * (at_once * _saved(settings.training) + kept)


def _saved(training: TrainingConfig) -> int:
    """Copies in the states of a training: the last one, the one before it, and the one that is being written.

    Each has the weights, the best ones, two moments, and averages where there are some.
    """
    return 3 * (4 + (training.ema_decay is not None))


def _about(dataset: DatasetName) -> tuple[tuple[int, int, int], int]:
    """The shape of its images and how many classes it has at most."""
    if "mnist" in dataset:
        return (1, 28, 28), 10
    return ((3, 64, 64), 200) if dataset in {"tiny_imagenet", "imagenet64"} else ((3, 32, 32), 100)


def _flat(dataset: DatasetName) -> tuple[int, int]:
    """The features of its images, and its classes."""
    shape, num_classes = _about(dataset)
    return math.prod(shape), num_classes


MATCHED = (
    "dataset", "seeds", "resume", "device", "price_per_gpu_hour", "data", "collective", "baselines", "training",
    "comparison",
)  # fmt: skip
# Of experiments that have a data set, seeds, a training and a reference of their own.
SHARED = ("resume", "device", "price_per_gpu_hour", "data", "comparison.confidence", "comparison.resamples")
# What only matters to a training that ends.
UNUSED_BY_FINDER = (
    "epochs", "learning_rate", "schedule", "warmup_epochs", "milestones", "decay_factor", "lr_decay", "ema_decay",
    "early_stopping_patience", "early_stopping_metric", "expert_analysis_interval",
)  # fmt: skip
SUBJECTS = ("deepmoe", "tiny_imagenet", "imagenet")
FINDER = ("lr_finder", "device", "data", "model_type", "dataset", "collective", "baselines", "training", *SUBJECTS)
PREDICT = ("images", "arm", "model_type", "dataset", "checkpoint", "checkpoint_seed", "device")

# The one that `kedro run` alone runs.
DEFAULT = "single"
# By their names in the registry.
EXPERIMENTS = {
    "single": Experiment((*MATCHED, "model_type"), _count_matched),
    "phase1": Experiment(MATCHED, lambda settings: len(MODEL_TYPES) * _count_matched(settings)),
    "sweep": Experiment((*MATCHED, "sweep"), _count_sweep, ignores=("training.expert_analysis_interval",)),
    "deepmoe": Experiment((*SHARED, "deepmoe"), _count_deepmoe),
    "merged_moe": Experiment((*SHARED, "merged_moe"), _count_merged_moe),
    "tiny_imagenet": Experiment(
        (*SHARED, "tiny_imagenet"), _count_tiny_imagenet, ignores=("tiny_imagenet.training.expert_analysis_interval",)
    ),
    "imagenet": Experiment(
        (*SHARED, "imagenet", "num_gpus"),
        _count_imagenet,
        ignores=(
            "data.val_fraction",
            *(f"imagenet.training.{name}" for name in ("augmentation_strength", "cutout", "expert_analysis_interval")),
        ),
    ),
    "lr_finder": Experiment(
        FINDER,
        lambda settings: 0,
        ignores=(
            *(f"{section}.seeds" for section in SUBJECTS),
            *(f"imagenet.{name}" for name in ("pack_side", "pack_quality", "rate_scaling", "sync_norm")),
            *(f"imagenet.training.{name}" for name in ("augmentation_strength", "cutout")),
            *(f"{name}training.{unused}" for name in ("", *(f"{s}." for s in SUBJECTS)) for unused in UNUSED_BY_FINDER),
        ),
    ),
    "predict": Experiment(PREDICT, lambda settings: 0),
    "demo": Experiment(("demo", "checkpoint", "checkpoint_seed", "device"), lambda settings: 0),
}


def check_read(given: Iterable[str], pipelines: Iterable[str]) -> None:
    """Refuse parameters on the command line that would change nothing.

    Args:
        given: Their dotted names.
        pipelines: Those that are run.

    Raises:
        UserError: Naming each that none of them reads, and what to use instead.
    """
    pipelines = list(pipelines)
    unread = [name for name in given if not any(EXPERIMENTS[pipeline].is_reader_of(name) for pipeline in pipelines)]
    if unread:
        raise UserError("; ".join(_sentence(name, pipelines) for name in unread))


def _sentence(name: str, pipelines: list[str]) -> str:
    known = [
        known
        for known in parameter_names(Parameters)
        if any(EXPERIMENTS[pipeline].is_reader_of(known) for pipeline in pipelines)
    ]
    # What is called so in the pipeline's own section; or without the section of another pipeline.
    own = [found for tail in (name, name.partition(".")[2]) for found in known if f".{found}".endswith(f".{tail}")]
    readers = [other for other, experiment in EXPERIMENTS.items() if experiment.is_reader_of(name)]
    elsewhere = f"it is a parameter of --pipeline {', '.join(readers)}" if readers else "nothing reads it: leave it out"
    advice = f"use `{own[0]}`" + f"; {HOW_TO_PLAN}" * (own[0] in PLANNED) if own else elsewhere
    return f"`{name}` is not read by --pipeline {','.join(pipelines)}: {advice}"
