"""From an arm and its data to trained weights: what a pipeline's node and a script both call."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from collective_pipeline.config import Arm, TrainingConfig
from collective_pipeline.data.batches import Batches, Normalise
from collective_pipeline.data.splits import Images, Splits
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.randomness import make_generator
from collective_pipeline.training.loop import Callback, Fit, evaluate, fit
from collective_pipeline.training.runtime import set_matmul_precision
from collective_pipeline.training.strategies import plan_phases


def train_arm(
    arm: Arm,
    splits: Splits,
    config: TrainingConfig,
    *,
    seeds: Sequence[int],
    device: torch.device,
    callbacks: Iterable[Callback] = (),
    watch: Callable[[Batches], Iterable[tuple[Tensor, Tensor]]] = iter,
) -> Fit:
    """Build the arm once for all `seeds`, draw each seed's weights, train, and return what validation chose.

    The weights come back on the CPU, every tensor with the seeds as its first dimension.
    """
    set_matmul_precision(config, device)
    splits = splits.to(device)
    model = build_arm(arm, num_seeds=len(seeds))
    initialise(model, [make_generator(seed, "weights") for seed in seeds])
    phases = plan_phases(arm, model, config, num_seeds=len(seeds))
    for phase in phases:
        if phase.new is not None:
            initialise(phase.new, [make_generator(seed, f"weights/{phase.name}") for seed in seeds])
        phase.network.to(device)
    batches = Batches(
        splits, seeds, batch_size=config.batch_size, augmentation_strength=config.augmentation_strength
    )
    result = fit(phases, batches, splits.val, config, seeds=seeds, callbacks=callbacks, watch=watch)
    result.weights = {name: tensor.cpu() for name, tensor in result.weights.items()}
    return result


def score_arm(
    arm: Arm,
    weights: dict[str, Tensor],
    images: Images,
    splits: Splits,
    config: TrainingConfig,
    *,
    device: torch.device,
) -> dict[str, list[float]]:
    """Loss and accuracies in percent of an arm's trained weights on images, one for each seed."""
    set_matmul_precision(config, device)
    num_seeds = len(next(iter(weights.values())))
    model = build_arm(arm, num_seeds=num_seeds)
    model.load_state_dict(weights)
    model.to(device)
    scores = evaluate(model, images.to(device), Normalise(splits.to(device)), config)
    return {name: values.tolist() for name, values in scores.items()}
