"""Trained weights on disk, with all that is needed to build their network again: tensors and text, never code."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from collective_pipeline.config import Arm, ImageSpec, UserError
from collective_pipeline.files import replacing, write_tensors
from collective_pipeline.models.build import build_arm


@dataclass(frozen=True)
class Checkpoint:
    """An arm's chosen weights; every tensor has the seeds as its first dimension."""

    arm: Arm
    dataset: str
    images: ImageSpec
    seeds: tuple[int, ...]
    best_epochs: tuple[int, ...]
    weights: dict[str, Tensor]

    @property
    def good_seeds(self) -> tuple[int, ...]:
        """Those that have good weights: others diverged before."""
        return tuple(seed for seed, epoch in zip(self.seeds, self.best_epochs, strict=True) if epoch > 0)

    def build(self) -> nn.Module:
        """The network with these weights, in evaluation mode: `(S, B, in_dim)` to `(S, B, K)` and parts."""
        model = build_arm(self.arm, num_seeds=len(self.seeds))
        model.load_state_dict(self.weights)
        return model.eval()

    def of_seeds(self, seeds: Sequence[int]) -> Self:
        """The same with these of its seeds alone."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            best_epochs=tuple(self.best_epochs[row] for row in rows),
            weights={name: tensor[rows] for name, tensor in self.weights.items()},
        )


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write the file: it is whole or not there."""
    about = {
        "arm": checkpoint.arm.model_dump_json(),
        "dataset": checkpoint.dataset,
        "images": checkpoint.images.model_dump_json(),
        "seeds": json.dumps(checkpoint.seeds),
        "best_epochs": json.dumps(checkpoint.best_epochs),
    }
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    with replacing(path) as partial:
        write_tensors(partial, weights, about)


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises:
        UserError: If the file is missing, damaged or not one of ours.
    """
    with _plain_errors(path):
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        checkpoint = replace(read_header(path), weights=weights)
        with torch.device("meta"):
            expected = build_arm(checkpoint.arm, num_seeds=len(checkpoint.seeds)).state_dict()
        if {name: tensor.shape for name, tensor in weights.items()} != {n: t.shape for n, t in expected.items()}:
            raise ValueError("its tensors are not those of the network that it names")
    return checkpoint


def read_header(path: Path) -> Checkpoint:
    """All of the checkpoint at `path` but its weights.

    Raises:
        UserError: If the file is missing, damaged or not one of ours.
    """
    with _plain_errors(path):
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        checkpoint = Checkpoint(
            arm=Arm.model_validate_json(about["arm"]),
            dataset=about["dataset"],
            images=ImageSpec.model_validate_json(about["images"]),
            seeds=tuple(json.loads(about["seeds"])),
            best_epochs=tuple(json.loads(about["best_epochs"])),
            weights={},
        )
        _check_images(checkpoint)
    return checkpoint


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file, in a sentence."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{path} is not a checkpoint of this version of the project: its header lacks {error}; train again"
        ) from error
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this project that can be read: {error}") from error


def _check_images(checkpoint: Checkpoint) -> None:
    arm, images = checkpoint.arm, checkpoint.images
    fits = math.prod(images.shape) == arm.in_dim and len(images.class_names) == arm.num_classes
    fits &= arm.image_shape in {None, images.shape}
    if not fits or not len(images.mean) == len(images.std) == images.shape[0]:
        raise ValueError("the images that it names are not those that its network reads")
