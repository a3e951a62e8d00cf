"""How much memory training takes, so that too many seeds are split into groups before anything fails."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from collective_pipeline.config import Arm, NotEnoughMemory, Stage, TrainingConfig
from collective_pipeline.data.batches import count_draws
from collective_pipeline.models.build import build_arm

# Of the free memory; the rest is for what libraries take, and for gaps.
USABLE = 0.8
# The weights, their gradients, two moments and the best of them; what is copied of them to be saved, or to be put
# back after a CUDA graph is recorded.
WEIGHT_COPIES = 9
BYTES = 4


@dataclass(frozen=True)
class Need:
    """Bytes that one seed takes: whatever the batch, each image of a batch, each image that is validated at once."""

    fixed: int
    per_image: int
    per_eval_image: int
    side: int = 0  # of the image, in pixels; 0 where it has none

    def of(self, config: TrainingConfig) -> int:
        """All of it; training and validation do not happen at the same time."""
        training = max(self.of_image(stage) * (stage.batch_size or 0) for stage in config.plan())
        return self.fixed + max(round(training), self.per_eval_image * config.eval_batch_size)

    def of_image(self, stage: Stage) -> float:
        """Of a training batch in this stage, whose images may have another size than those that were counted."""
        scale = (stage.image_size / self.side) ** 2 if stage.image_size and self.side else 1.0
        return self.per_image * scale


def estimate_need(arm: Arm, config: TrainingConfig, *, num_images: int) -> Need:
    """What one seed of this arm takes to train on as many images, counted on a network without storage.

    The features of an image are the outputs of all modules. Containers repeat what their last module gave, which is
    about what lives for a moment beside what the backward pass keeps; a container of maps gives too small ones for
    that, hence two more of the largest.
    """
    widths: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            widths.append(output.numel())

    with torch.device("meta"):
        model = build_arm(arm).eval()
        for module in model.modules():
            module.register_forward_hook(count)
        model(torch.empty(1, 1, arm.in_dim))
    of_feature = BYTES // 2 if config.precision in {"bf16", "fp16"} else BYTES
    copies = WEIGHT_COPIES + 2 * (config.ema_decay is not None)
    draws = 8 + BYTES * count_draws(config.augmentation_strength, config.cutout)
    return Need(
        fixed=BYTES * arm.params * copies + 2 * draws * num_images,
        per_image=BYTES * arm.in_dim + of_feature * (sum(widths) + 2 * max(widths)),
        per_eval_image=BYTES * arm.in_dim + 3 * of_feature * max(widths),
        side=0 if arm.image_shape is None else arm.image_shape[1],
    )


def free_bytes(device: torch.device) -> int:
    """Of the device's memory, as of now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def groups_that_fit(seeds: Sequence[int], need: Need, config: TrainingConfig, *, free: int) -> list[list[int]]:
    """The seeds in as few groups as `free` bytes allow to train at once.

    Raises:
        NotEnoughMemory: If there is no room for one seed, naming the knob to turn and the size that would fit.
    """
    at_once = int(USABLE * free) // need.of(config)
    if at_once < 1:
        raise NotEnoughMemory(advise(need, config, free=free))
    return split(seeds, -(-len(seeds) // at_once))


def split(seeds: Sequence[int], num_groups: int) -> list[list[int]]:
    """The seeds in groups that differ by one in size at most."""
    ends = [round(len(seeds) * i / num_groups) for i in range(num_groups + 1)]
    return [list(seeds[start:end]) for start, end in pairwise(ends)]


def advise(need: Need, config: TrainingConfig, *, free: int) -> str:
    """Which knob to turn where one seed does not fit, and how far."""
    room = int(USABLE * free) - need.fixed
    told = f"one seed needs about {need.of(config) / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
    if room < 2 * max(need.per_image, need.per_eval_image):
        return f"{told}: choose a smaller network (collective.*, baselines.target_params), or another device"
    fitting = {"batch_size": room // need.per_image, "eval_batch_size": room // need.per_eval_image}
    if config.stages:
        del fitting["batch_size"]
    changes = [f"training.{name}={size}" for name, size in fitting.items() if size < getattr(config, name)]
    changes += [
        f"training.stages: a batch_size of {size:.0f} at {stage.image_size or need.side} pixels"
        for stage in config.plan()
        if config.stages and (size := room // need.of_image(stage)) < (stage.batch_size or 0)
    ]
    # The estimate may say that it fits where it did not.
    return f"{told}: {' and '.join(changes) or f'training.batch_size={max(2, config.batch_size // 2)}'} would fit"
