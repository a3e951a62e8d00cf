"""Groups of classes, a sub-model for each, and the mixture that is merged from them."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from collective_pipeline.config import (
    ARM_NAME_WIDTH,
    Arm,
    MergedMoeConfig,
    MixtureArchitecture,
    Parameters,
    TrainingConfig,
    UserError,
)
from collective_pipeline.data.batches import check_batches
from collective_pipeline.data.class_groups import GROUPS, ClassGroups, resolve_groups, restrict
from collective_pipeline.data.splits import Splits
from collective_pipeline.evaluation.gpu import add_costs
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.merging import check_submodels, merge
from collective_pipeline.models.mixture import Mixture
from collective_pipeline.models.mixture_arms import (
    conv_collective_arm,
    dense_arm,
    mixture_arm,
    single_expert_arm,
    sub_model_arm,
)
from collective_pipeline.pipelines.arm.nodes import clear, evaluate, train
from collective_pipeline.training.snapshots import Snapshots, digest_of
from collective_pipeline.training.tracking import nested_run
from collective_pipeline.training.train import snapshots_at

logger = logging.getLogger(__name__)

# Part of what a run that goes on must share with the one before it, and known only once the sub-models are trained.
SUB_MODELS = "sub_models"


@dataclass(frozen=True)
class SubModelPlan:
    """What the sub-model of one group is trained as."""

    name: str
    arm: Arm
    splits: Splits


def group_classes(settings: Parameters, all_classes: Splits) -> tuple[Splits, ClassGroups]:
    """The images of the grouped classes alone, and the groups.

    Raises:
        UserError: If the groups do not fit the data set, or have too few images for a batch.
    """
    own = settings.merged_moe
    groups = resolve_groups(own.class_groups, all_classes)
    if own.initialise == "copy" and own.copy_of > len(groups.groups):
        raise UserError(f"merged_moe.copy_of={own.copy_of} is no group: choose from 1 to {len(groups.groups)}")
    splits = all_classes
    if len(groups.labels) < all_classes.num_classes:
        splits = restrict(all_classes, groups.labels, remeasure=True)
    training = own.training
    check_batches(splits, training.batch_size, training.cutout, section="merged_moe.training")
    for plan in plan_sub_models(own, splits, groups):
        check_batches(
            plan.splits,
            own.sub_models.batch_size,
            own.sub_models.cutout,
            section="merged_moe.sub_models",
            whose=f" of {plan.name}, {_told(plan.splits)}",
        )
    return splits, groups


def plan_sub_models(config: MergedMoeConfig, splits: Splits, groups: ClassGroups) -> list[SubModelPlan]:
    """One for each group in their order; none where the mixture begins without them."""
    if config.initialise == "fresh":
        return []
    architecture = config.architecture(splits.image_shape)
    return [
        SubModelPlan(
            f"sub_model_{number}",
            sub_model_arm(architecture, num_classes=len(group)),
            restrict(splits, group, remeasure=False),
        )
        for number, group in enumerate(groups.groups, start=1)
    ]


def set_baseline_epochs(settings: Parameters, splits: Splits, groups: ClassGroups) -> Parameters:
    """The settings of the networks beside the mixture: as many updates as it and all its sub-models have.

    Sub-models are part of what the mixture costs. An epoch of a group is shorter than one of all classes, so updates
    are counted, and their sum is rounded up to whole epochs; without sub-models all arms have the same.
    """
    own = settings.merged_moe
    plans = plan_sub_models(own, splits, groups)
    before = sum(own.sub_models.epochs * _updates_per_epoch(plan.splits, own.sub_models) for plan in plans)
    epochs = own.training.epochs + -(-before // _updates_per_epoch(splits, own.training))
    if plans:
        logger.info(_tell_epochs(own, epochs, len(plans)))
    return settings.model_copy(update={"training": own.training.model_copy(update={"epochs": epochs})})


def _tell_epochs(config: MergedMoeConfig, epochs: int, num_sub_models: int) -> str:
    return (
        f"dense, single_expert and conv_collective train for {epochs} epochs: the mixture's {config.training.epochs}, "
        f"and the updates of its {num_sub_models} sub-models"
    )


def describe_merging(
    settings: Parameters, baseline_settings: Parameters, splits: Splits, groups: ClassGroups
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The classes that each expert's sub-model tells apart; and for the report, what the mixture is made of."""
    own = settings.merged_moe
    plans = plan_sub_models(own, splits, groups)
    classes = {f"expert {number}": _told(plan.splits) for number, plan in enumerate(plans[: own.n_experts], start=1)}
    experts = {
        f"expert {number}": f"the sub-model of group {number}, {classes[f'expert {number}']}"
        if number <= len(plans)
        else "drawn"
        for number in range(1, own.n_experts + 1)
    }
    left = {
        f"group {number}": f"its sub-model becomes no expert, {_told(plan.splits)}"
        for number, plan in enumerate(plans, start=1)
        if number > own.n_experts
    }
    extractor = {
        "fresh": "drawn, without sub-models",
        "average": f"the mean of those of all {len(plans)} sub-models",
        "copy": f"that of the sub-model of group {own.copy_of}",
    }
    epochs = f"{own.training.epochs} of all arms"
    if plans:
        epochs = _tell_epochs(own, baseline_settings.training.epochs, len(plans))
    made = {"shared extractor": extractor[own.initialise], **experts, **left, "epochs": epochs}
    return classes, {"What the mixture began as": made}


def _updates_per_epoch(splits: Splits, config: TrainingConfig) -> int:
    return -(-(len(splits.train) // config.batch_size) // config.accumulation_steps)


def make_arms(settings: Parameters, splits: Splits) -> list[Arm]:
    """The mixture, and as large as it is a network without experts, one with a single expert, and a collective.

    Raises:
        UserError: If the images are too small, or if there is no network of that size.
    """
    own = settings.merged_moe
    mixture = mixture_arm(own.architecture(splits.image_shape), num_classes=splits.num_classes)
    return [
        mixture,
        dense_arm(mixture, tolerance=own.tolerance),
        single_expert_arm(mixture, tolerance=own.tolerance),
        conv_collective_arm(mixture, own.collective, tolerance=own.tolerance),
    ]


def estimate_params(config: MergedMoeConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """About how many parameters a seed of all arms and sub-models has together."""
    architecture = config.architecture(image_shape)
    num_groups = (
        0 if config.initialise == "fresh" else len(config.class_groups.groups or GROUPS.get(config.dataset, ()))
    )
    return (
        4 * mixture_arm(architecture, num_classes=num_classes).params
        + num_groups * sub_model_arm(architecture, num_classes=num_classes).params
    )


def clear_for_training(
    splits: Splits,
    settings: Parameters,
    baseline_settings: Parameters,
    device: torch.device,
    groups: ClassGroups,
    folder: Path,
    *arms_and_files: Arm | Path,
) -> tuple[dict[str, Snapshots], *tuple[Snapshots, ...]]:
    """Where every training saves its state; with `resume`, what is there is refused here if it is of another run.

    Args:
        splits, settings, baseline_settings, device, groups: Of the experiment.
        folder: For the states of the sub-models.
        arms_and_files: The mixture and the networks beside it; the files of their states in the same order.

    Returns:
        Those of the sub-models by their names; those of the arms.
    """
    own = settings.merged_moe
    plans = plan_sub_models(own, splits, groups)
    of_sub_models = settings.model_copy(update={"training": own.sub_models})
    sub_models = {}
    for plan in plans:
        file = folder / f"{plan.name}.safetensors"
        sub_models[plan.name] = snapshots_at(file, plan.arm, plan.splits, of_sub_models, device, name=plan.name)
        sub_models[plan.name].identify(classes=plan.splits.class_names)
    arms = [item for item in arms_and_files if isinstance(item, Arm)]
    files = [item for item in arms_and_files if isinstance(item, Path)]
    of_arms = tuple(
        snapshots_at(file, arm, splits, settings if arm is arms[0] else baseline_settings, device)
        for file, arm in zip(files, arms, strict=True)
    )
    of_arms[0].identify(groups=[_names(splits, group) for group in groups.groups])
    clear([*sub_models.values(), *of_arms], apart_from={SUB_MODELS})
    return sub_models, *of_arms


def train_sub_models(
    splits: Splits,
    settings: Parameters,
    device: torch.device,
    groups: ClassGroups,
    snapshots: dict[str, Snapshots],
    *,
    num_arms: int,
) -> tuple[dict[str, Checkpoint], pd.DataFrame]:
    """A network for each group, one after another, each with all seeds; their histories.

    Raises:
        UserError: If they cannot be merged, because one diverged for example.
    """
    own = settings.merged_moe
    plans = plan_sub_models(own, splits, groups)
    with_training = settings.model_copy(update={"training": own.sub_models})
    checkpoints, histories = {}, [pd.DataFrame(columns=["model_type", "seed", "epoch", "seconds"])]
    is_alone = threading.current_thread() is threading.main_thread()
    for plan in plans:
        logger.info("%-*s  learns %s", ARM_NAME_WIDTH, plan.name, _told(plan.splits))
        tags = {"model_type": plan.arm.model_type, "dataset": settings.dataset}
        params = {"classes": _told(plan.splits), "params": plan.arm.params}
        with nested_run(plan.name, snapshots[plan.name].run_file, tags=tags, params=params):
            checkpoints[plan.name], history = train(
                plan.arm,
                plan.splits,
                with_training,
                device,
                snapshots[plan.name],
                1 if is_alone else num_arms,
                name=plan.name,
            )
        histories.append(history)
    if plans:
        check_submodels(
            list(checkpoints.values()),
            own.architecture(splits.image_shape),
            groups=groups.groups,
            images=splits.image_spec,
            seeds=own.seeds,
        )
    return checkpoints, pd.concat([history for history in histories if len(history)] or histories, ignore_index=True)


def train_mixture(
    arm: Arm,
    splits: Splits,
    settings: Parameters,
    device: torch.device,
    snapshots: Snapshots,
    groups: ClassGroups,
    sub_models: dict[str, Checkpoint],
    *,
    num_arms: int,
) -> tuple[Checkpoint, pd.DataFrame]:
    """Merge the sub-models and train what comes of it; a run goes on from a state only with the same sub-models.

    Raises:
        UserError: If what was saved began with others.
    """
    architecture = arm.architecture
    assert isinstance(architecture, MixtureArchitecture)
    found = [sub_models[plan.name] for plan in plan_sub_models(settings.merged_moe, splits, groups)]
    snapshots.identify(**{SUB_MODELS: _digest(found)})

    def prepare(model: nn.Module, seeds: Sequence[int]) -> None:
        assert isinstance(model, Mixture)
        merge(model, found, architecture, groups=groups.groups, seeds=seeds)

    return train(arm, splits, settings, device, snapshots, num_arms, prepare=prepare)


def evaluate_mixture(
    checkpoint: Checkpoint,
    history: pd.DataFrame,
    splits: Splits,
    settings: Parameters,
    device: torch.device,
    sub_model_history: pd.DataFrame,
) -> pd.DataFrame:
    """As any arm; its time, energy and cost are those of its sub-models as well, its images a second its own."""
    results = evaluate(checkpoint, history, splits, settings, device)
    spends = ["seconds", "joules", "gpu_seconds"]
    costs = sub_model_history.reindex(columns=["model_type", *spends]).groupby("model_type").max().sum()
    spent = costs.astype(float) / len(checkpoint.seeds)
    results = results.assign(
        train_seconds=results["train_seconds"] + spent["seconds"], joules=results["joules"] + spent["joules"]
    )
    gpu_hours = results["gpu_hours"] + spent["gpu_seconds"] / 3600
    return add_costs(results, gpu_hours, settings.price_per_gpu_hour)


def _digest(sub_models: Sequence[Checkpoint]) -> str:
    weights = {f"{i}/{name}": tensor for i, one in enumerate(sub_models) for name, tensor in one.weights.items()}
    return digest_of(weights, {})


def _names(splits: Splits, labels: Sequence[int]) -> list[str]:
    return [splits.class_names[label] for label in labels]


def _told(splits: Splits) -> str:
    return ", ".join(splits.class_names)
