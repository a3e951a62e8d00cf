"""From an arm and its data to trained weights: what a pipeline's node and a script both call."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

import collective_pipeline
from collective_pipeline.config import Arm, ModelType, Parameters, TrainingConfig, flatten
from collective_pipeline.data.batches import Batches, Normalise
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import Images, Splits, digest_images, make_splits
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.matching import match_arm
from collective_pipeline.randomness import make_generator
from collective_pipeline.training.loop import Callback, Fit, evaluate, fit, to_host
from collective_pipeline.training.runtime import choose_device, describe_device, set_matmul_precision, side_stream
from collective_pipeline.training.snapshots import Snapshots
from collective_pipeline.training.strategies import plan_phases

logger = logging.getLogger(__name__)


def train_model(
    settings: Parameters,
    folder: Path | str,
    *,
    model_type: ModelType | None = None,
    callbacks: Iterable[Callback] = (),
) -> tuple[Checkpoint, Fit]:
    """Everything from the raw files in `folder` to a trained model, without Kedro or MLflow.

    Args:
        settings: For example `config.DEBUG`, or what `config.check_parameters` makes of a dictionary.
        folder: Where the files of `settings.dataset` are; absent ones are downloaded into it.
        model_type: Overrides that of `settings`.
        callbacks: Called with a `training.loop.Epoch` after each epoch.
    """
    raw = load_images(settings.dataset, Path(folder))
    splits = make_splits(raw, val_fraction=settings.data.val_fraction, split_seed=settings.data.split_seed)
    arm = match_to_splits(settings, splits, model_type)
    device = choose_device(settings.device)
    return train_arm(arm, splits, settings.training, seeds=settings.seeds, device=device, callbacks=callbacks)


def match_to_splits(settings: Parameters, splits: Splits, model_type: ModelType | None = None) -> Arm:
    """The arm of this type, by default of `settings.model_type`, at the settings' parameter budget for these images."""
    return match_arm(
        model_type or settings.model_type,
        settings.collective,
        settings.baselines,
        in_dim=splits.in_dim,
        num_classes=splits.num_classes,
    )


def train_arm(
    arm: Arm,
    splits: Splits,
    config: TrainingConfig,
    *,
    seeds: Sequence[int],
    device: torch.device,
    callbacks: Iterable[Callback] = (),
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
    snapshots: Snapshots | None = None,
) -> tuple[Checkpoint, Fit]:
    """Build the arm once for all `seeds`, draw each seed's weights, train, and return what validation chose.

    The checkpoint's weights are on the CPU, every tensor with the seeds as its first dimension.

    Raises:
        Interrupted: If the run was told to stop, after its state was saved in `snapshots`.
    """
    set_matmul_precision(config, device)
    with side_stream(device):
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
        result = fit(phases, batches, splits.val, config, callbacks=callbacks, watch=watch, snapshots=snapshots)
        weights = {name: tensor.cpu() for name, tensor in result.weights.items()}
    for seed, diverged, epoch, best in zip(seeds, result.diverged, result.num_epochs, result.best_epochs, strict=True):
        if diverged:
            logger.warning(
                "%s, seed %d: the loss was no longer finite in epoch %d; %s: a smaller training.learning_rate or a "
                "training.clip_norm may help",
                arm.model_type,
                seed,
                epoch,
                f"its weights after epoch {best} are kept" if best else "there were no good weights before",
            )
    return Checkpoint(arm, splits.name, tuple(seeds), tuple(result.best_epochs), weights), result


def snapshots_at(path: Path, arm: Arm, splits: Splits, settings: Parameters, device: torch.device) -> Snapshots:
    """Where this arm's training is saved, and what must be the same for another run to go on from there."""
    identity = {f"architecture.{name}": value for name, value in flatten(arm.architecture).items()}
    identity |= {"model_type": arm.model_type, "dataset": splits.name, "images": digest_images(splits)}
    identity |= {"seeds": settings.seeds, "code version": _code_version()}
    identity |= {f"data.{name}": value for name, value in flatten(settings.data).items()}
    identity |= {f"training.{name}": value for name, value in flatten(settings.training).items()}
    circumstances = {"device": describe_device(device), "torch": torch.__version__}
    return Snapshots(path, name=arm.model_type, identity=identity, circumstances=circumstances, resume=settings.resume)


def _code_version() -> str:
    """The version and a digest of the code that decides what training does."""
    package = Path(collective_pipeline.__file__).parent
    parts = ("config.py", "randomness.py", "data", "models", "training")
    files = sorted(
        file for part in parts for file in package.glob(f"{part}" if part.endswith(".py") else f"{part}/*.py")
    )
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{collective_pipeline.__version__} ({digest[:12]})"


def score(
    checkpoint: Checkpoint, images: Images, splits: Splits, config: TrainingConfig, *, device: torch.device
) -> dict[str, list[float]]:
    """Loss and accuracies in percent of trained weights on `images`, one number for each seed."""
    set_matmul_precision(config, device)
    scores = evaluate(checkpoint.build().to(device), images.to(device), Normalise(splits, device), config)
    return to_host(scores)
