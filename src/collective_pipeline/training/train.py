"""From an arm and its data to trained weights: what a pipeline's node and a script both call."""

import gc
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import collective_pipeline
from collective_pipeline.config import (
    ARM_NAME_WIDTH,
    LOOKS_ON,
    Arm,
    ModelType,
    NotEnoughMemory,
    Parameters,
    TrainingConfig,
    UserError,
    count_of,
    flatten,
)
from collective_pipeline.data.batches import Batches, BatchSource, Normalise
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import Images, Splits, make_splits
from collective_pipeline.data.streaming import StreamedBatches, StreamedImages, StreamedSplits
from collective_pipeline.models.build import build_arm, count_products, initialise
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.matching import match_arm
from collective_pipeline.randomness import make_generator
from collective_pipeline.training import cuda
from collective_pipeline.training.loop import EPOCHS_SHUT, Callback, Epoch, Fit, evaluate, fit, to_host
from collective_pipeline.training.memory import Need, advise, estimate_need, free_bytes, groups_that_fit, split
from collective_pipeline.training.ranks import ALONE, Ranks
from collective_pipeline.training.runtime import choose_device, describe_device, set_matmul_precision, side_stream
from collective_pipeline.training.snapshots import Snapshot, Snapshots
from collective_pipeline.training.strategies import Phase, plan_phases

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
    splits: Splits | StreamedSplits,
    config: TrainingConfig,
    *,
    seeds: Sequence[int],
    device: torch.device,
    callbacks: Iterable[Callback] = (),
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
    snapshots: Snapshots | None = None,
    num_beside: int = 1,
    prepare: Callable[[nn.Module, Sequence[int]], None] | None = None,
    look: Callable[[int, Checkpoint], None] | None = None,
    name: str | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Checkpoint, Fit]:
    """Build the arm once for all `seeds`, draw each seed's weights, train, and return what validation chose.

    Seeds that are too many for the memory train in groups, one after another. The checkpoint's weights are on the
    CPU, every tensor with the seeds as its first dimension.

    Args:
        arm: What to train.
        splits: On what.
        config: How.
        seeds: Each a training of its own.
        device: Where.
        callbacks: Called with a `training.loop.Epoch` after each epoch.
        watch: A wrapper around the stops of an epoch, the numbers of updates done, for progress within it.
        snapshots: Where to save the state of training now and then, and where to go on from.
        num_beside: How many arms share the device at the same time, this one included.
        prepare: Called with the network, whose weights are drawn, and its seeds, to give it other ones.
        look: Called every `config.expert_analysis_interval` epochs with the number of the epoch and what its weights
            are then, of the seeds that are still trained; of a group alone where not all seeds train at once.
        name: What messages call it; None: the arm's type.
        ranks: The processes that train it together, each with its own `splits`; all go on from what `snapshots` has,
            and the first one alone saves.

    Raises:
        Interrupted: If the run was told to stop, after its state was saved in `snapshots`.
        UserError: If there is no memory for one seed, naming what would fit.
    """
    name = name or arm.model_type
    set_matmul_precision(config, device)
    need = estimate_need(arm, config, num_images=len(splits.train) if isinstance(splits, Splits) else 0)
    saved = snapshots.load() if snapshots else None
    _check_alike(name, saved, ranks)
    free = free_bytes(device) // num_beside
    if saved is not None:
        groups = saved.facts["groups"]
    elif arm.is_convolutional:
        # One network fills the device, and grouped convolutions are slower than one after another (three mixtures on an
        # H200: 3.9 s an epoch at once, 3.3 s in turn).
        groups = [group for seed in seeds for group in groups_that_fit([seed], need, config, free=free)]
    else:
        groups = groups_that_fit(seeds, need, config, free=free)
    if saved is not None and not saved.facts["place"]["finished"]:
        place = saved.facts["place"]
        within = f" and {count_of(place['update'], 'update')} of the next" if place["update"] else ""
        logger.info("%-*s  goes on after epoch %d/%d%s", ARM_NAME_WIDTH, name, place["epoch"], config.epochs, within)
    training = _ArmTraining(name, arm, splits, config, device, list(callbacks), watch, snapshots, prepare, look, ranks)
    fits = training.run(groups, need, saved)
    result = Fit.join(fits)
    if len(fits) > 1:
        for epoch in result.epochs:
            training.tell(epoch)
    _tell_diverged(name, result)
    _tell_shut(name, result)
    return _checkpoint(arm, splits, result.seeds, result.best_epochs, result.weights), result


@dataclass(frozen=True)
class _ArmTraining:
    """The arguments of `train_arm` that all groups of seeds share."""

    name: str
    arm: Arm
    splits: Splits | StreamedSplits
    config: TrainingConfig
    device: torch.device
    callbacks: Sequence[Callback]
    watch: Callable[[Iterable[int]], Iterable[int]]
    snapshots: Snapshots | None
    prepare: Callable[[nn.Module, Sequence[int]], None] | None
    look: Callable[[int, Checkpoint], None] | None
    ranks: Ranks

    def run(self, groups: Sequence[Sequence[int]], need: Need, saved: Snapshot | None) -> list[Fit]:
        """Train one group after another, but for those that `saved` has done; halve those that do not fit."""
        groups = [list(group) for group in groups]
        done = [] if saved is None else _restore_done(saved)
        if len(groups) > 1 and not self.arm.is_convolutional:
            self._tell_groups(groups)
        while len(done) < len(groups):
            if self.snapshots is not None:
                self.snapshots.before = _describe_done(groups, done)
            group = groups[len(done)]
            epochs: list[int] = []
            trained = self._try(group, saved, epochs, (len(done) + 1, len(groups)))
            if trained is not None:
                done.append(trained)
            elif saved is not None or epochs:
                raise NotEnoughMemory(
                    f"{self.name}: memory was enough when training began and is not any more: end what else "
                    "uses it and give the same command with --params resume=true"
                )
            elif len(group) == 1:
                raise NotEnoughMemory(f"{self.name}: {advise(need, self.config, free=free_bytes(self.device))}")
            else:
                groups[len(done) : len(done) + 1] = split(group, 2)
                self._tell_groups(groups)
            saved = None
        return done

    def _tell_groups(self, groups: Sequence[Sequence[int]]) -> None:
        logger.warning(
            "%s: memory is too small for all %d seeds at once; they train in %d groups, one after another.",
            self.name,
            sum(map(len, groups)),
            len(groups),
        )

    def _try(
        self, seeds: Sequence[int], saved: Snapshot | None, epochs: list[int], number: tuple[int, int]
    ) -> Fit | None:
        """Train these seeds, noting each of their `epochs`; None if the memory was not enough."""

        def note(epoch: Epoch) -> None:
            epochs.append(epoch.number)
            self.tell(replace(epoch, group=number))

        try:
            return self._train(seeds, saved, note)
        except torch.OutOfMemoryError:
            return None
        finally:
            if self.device.type == "cuda":
                gc.collect()  # recorded steps and what they work on refer to each other
                torch.cuda.empty_cache()

    def _train(self, seeds: Sequence[int], saved: Snapshot | None, callback: Callback) -> Fit:
        config = self.config
        depth = count_products(self.arm) if isinstance(self.splits, Splits) else 0
        with side_stream(self.device, depth=depth):
            splits = self.splits.to(self.device)
            model = draw_network(self.arm, seeds)
            if self.prepare is not None:
                self.prepare(model, seeds)
            phases = draw_phases(self.arm, model, seeds, config, self.device)
            batches = make_batches(splits, seeds, config)
            result = fit(
                phases, batches, splits.val, config,
                callbacks=[callback], watch=self.watch, going_on=saved, ranks=self.ranks,
                snapshots=self.snapshots if self.ranks.is_first else None,
                look=None if self.look is None else partial(self._show, self.look, seeds),
            )  # fmt: skip
            # Without any epoch to choose from there are no weights, whichever the network has now.
            none = {name: torch.full_like(tensor, torch.nan) for name, tensor in model.state_dict().items()}
            return replace(result, weights={name: tensor.cpu() for name, tensor in (result.weights or none).items()})

    def _show(
        self, look: Callable[[int, Checkpoint], None], seeds: Sequence[int], epoch: Epoch, weights: dict[str, Tensor]
    ) -> None:
        running = [seed for seed, runs in zip(seeds, epoch.running, strict=True) if runs]
        on_host = {name: tensor.cpu() for name, tensor in weights.items()}
        checkpoint = _checkpoint(self.arm, self.splits, seeds, [epoch.number] * len(seeds), on_host)
        look(epoch.number, checkpoint.of_seeds(running))

    def tell(self, epoch: Epoch) -> None:
        """Every callback."""
        for callback in self.callbacks:
            callback(epoch)


def draw_network(arm: Arm, seeds: Sequence[int]) -> nn.Module:
    """The arm's network for all seeds, each seed's weights drawn from it alone."""
    model = build_arm(arm, num_seeds=len(seeds))
    initialise(model, [make_generator(seed, "weights") for seed in seeds])
    return model


def draw_phases(
    arm: Arm, model: nn.Module, seeds: Sequence[int], config: TrainingConfig, device: torch.device
) -> list[Phase]:
    """The phases of its training, on the device, with the weights drawn of what they bring along."""
    phases = plan_phases(arm, model, config, num_seeds=len(seeds))
    for phase in phases:
        if phase.new is not None:
            initialise(phase.new, [make_generator(seed, f"weights/{phase.name}") for seed in seeds])
        phase.network.to(device)
    return phases


def _check_alike(name: str, saved: Snapshot | None, ranks: Ranks) -> None:
    """Refuse to go on from other states on other ranks: on each machine the file may be another, or damaged."""
    own = None if saved is None else saved.facts["place"]
    if ranks.tell(own) != own:
        raise UserError(
            f"{name}: rank {ranks.rank} has another saved state than the first one: give all machines the same "
            "data/06_models, or start without resume=true"
        )


def make_batches(splits: Splits | StreamedSplits, seeds: Sequence[int], config: TrainingConfig) -> BatchSource:
    """The training batches of these seeds, before any stage of the plan."""
    if isinstance(splits, StreamedSplits):
        on_cuda = splits.train.device.type == "cuda"
        return StreamedBatches(splits, seeds, config, fuse=cuda.Compiled if config.compile and on_cuda else None)
    return Batches(
        splits,
        seeds,
        batch_size=config.batch_size,
        augmentation_strength=config.augmentation_strength,
        cutout=config.cutout,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
    )


def _checkpoint(
    arm: Arm, splits: Splits | StreamedSplits, seeds: Sequence[int], epochs: Sequence[int], weights: dict[str, Tensor]
) -> Checkpoint:
    spec = splits.image_spec
    if arm.image_shape is not None:  # it may read the images at another size than theirs
        spec = spec.model_copy(update={"shape": arm.image_shape})
    return Checkpoint(arm, splits.name, spec, tuple(seeds), tuple(epochs), weights)


def _describe_done(groups: Sequence[Sequence[int]], done: Sequence[Fit]) -> Snapshot:
    weights = {f"done/{i}/{name}": tensor for i, fit in enumerate(done) for name, tensor in fit.weights.items()}
    return Snapshot({"groups": groups, "done": [fit.facts() for fit in done]}, weights)


def _restore_done(saved: Snapshot) -> list[Fit]:
    return [
        Fit.restore(facts, saved.part(f"done/{i}", torch.device("cpu"))) for i, facts in enumerate(saved.facts["done"])
    ]


def _tell_diverged(name: str, result: Fit) -> None:
    for seed, diverged, epoch, best in zip(
        result.seeds, result.diverged, result.num_epochs, result.best_epochs, strict=True
    ):
        if diverged:
            logger.warning(
                "%s, seed %d: the loss was no longer finite in epoch %d; %s: a smaller training.learning_rate or a "
                "training.clip_norm may help",
                name,
                seed,
                epoch,
                f"its weights after epoch {best} are kept" if best else "there were no good weights before",
            )


def _tell_shut(name: str, result: Fit) -> None:
    for s, seed in enumerate(result.seeds):
        if result.is_shut(s):
            logger.warning(
                "%s, seed %d: all of its gates were shut throughout the %d epochs up to %d: it is stopped, and a "
                "smaller gates.lambda_val may help",
                name,
                seed,
                EPOCHS_SHUT,
                result.num_epochs[s],
            )


def snapshots_at(
    path: Path,
    arm: Arm,
    splits: Splits | StreamedSplits,
    settings: Parameters,
    device: torch.device,
    *,
    name: str | None = None,
) -> Snapshots:
    """Where this arm's training is saved, and what must be the same for another run to go on from there.

    Messages call it by its `name`, or by the arm's type if that is None.
    """
    identity = {f"architecture.{name}": value for name, value in flatten(arm.architecture).items()}
    identity |= {"model_type": arm.model_type, "dataset": splits.name, "images": splits.digest}
    identity |= {"seeds": settings.seeds, "code version": _code_version()}
    identity |= {f"data.{name}": value for name, value in flatten(settings.data).items()}
    training = {f"training.{name}": value for name, value in flatten(settings.training).items()}
    identity |= {name: value for name, value in training.items() if name not in LOOKS_ON}
    circumstances = {"device": describe_device(device), "torch": torch.__version__}
    name = name or arm.model_type
    return Snapshots(path, name=name, identity=identity, circumstances=circumstances, resume=settings.resume)


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
    checkpoint: Checkpoint,
    images: Images | StreamedImages,
    splits: Splits | StreamedSplits,
    config: TrainingConfig,
    *,
    device: torch.device,
) -> dict[str, list[float]]:
    """Loss and accuracies in percent of trained weights on `images`, one number for each seed.

    `accuracy_of_<class>` is that of the images of a class alone, NaN if there are none.
    """
    set_matmul_precision(config, device)

    def measure(logits_SBK: Tensor, labels_SB: Tensor) -> dict[str, Tensor]:
        is_right_SB = logits_SBK.argmax(dim=-1) == labels_SB
        of_class = {name: labels_SB == k for k, name in enumerate(splits.class_names)}
        shares = {f"share_of_{name}": is_it_SB.float().mean(dim=1) for name, is_it_SB in of_class.items()}
        return shares | {
            f"accuracy_of_{name}": 100 * (is_right_SB & is_it_SB).float().mean(dim=1)
            for name, is_it_SB in of_class.items()
        }

    network = checkpoint.build().to(device)
    scores = evaluate(network, images.to(device), Normalise(checkpoint.images, device), config, measure=measure)
    for name in splits.class_names:
        scores[f"accuracy_of_{name}"] = scores[f"accuracy_of_{name}"] / scores.pop(f"share_of_{name}")
    return to_host(scores)
