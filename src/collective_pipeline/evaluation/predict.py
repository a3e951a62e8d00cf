"""From raw images to class probabilities with a trained checkpoint."""

import pandas as pd
import torch
from torch import Tensor

from collective_pipeline.config import UserError
from collective_pipeline.data.batches import Normalise
from collective_pipeline.models.checkpoint import Checkpoint

BATCH_SIZE = 1024


def choose_seeds(checkpoint: Checkpoint, seed: int | None) -> list[int]:
    """Those of the checkpoint that answer: this seed alone, or all that have good weights.

    Raises:
        UserError: If the checkpoint has no such seed, or no good weights of it.
    """
    name, seeds = checkpoint.arm.model_type, checkpoint.seeds
    if seed is not None and seed not in seeds:
        raise UserError(f"this checkpoint of {name} has no seed {seed}: choose from {', '.join(map(str, seeds))}")
    good = [s for s in checkpoint.good_seeds if seed in (None, s)]
    if not good:
        which = "every seed" if seed is None else f"seed {seed}"
        raise UserError(
            f"{name} diverged with {which} before it had good weights: choose another seed or checkpoint, or train "
            "again with a smaller training.learning_rate"
        )
    return good


class Predictor:
    """Preprocessing, network and the mean over seeds in one: uint8 images to class probabilities.

    The probabilities are the mean of those of all seeds, without seeds that diverged before they had good weights.
    Matrix products are in full fp32, whichever precision the training had.

    Args:
        checkpoint: What was trained.
        device: Where to compute.
        seed: Of the checkpoint's; its probabilities alone. None: the mean of all.

    Raises:
        UserError: If the checkpoint has no such seed, or no good weights of it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, seed: int | None = None) -> None:
        self.images = checkpoint.images
        self.device = device
        self.normalise = Normalise(self.images, device)
        self.network = checkpoint.of_seeds(choose_seeds(checkpoint, seed)).build().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities `(B, K)`, float32 on the CPU, of uint8 images `(B, C, H, W)`; `(B, H, W)` where C is 1.

        Raises:
            UserError: If the images are of another shape or type than those it was trained on.
        """
        if images.ndim == 3 and self.images.shape[0] == 1:
            images = images.unsqueeze(1)
        if images.dtype != torch.uint8 or images.shape[1:] != self.images.shape:
            raise UserError(
                f"the images are {images.dtype} of shape {tuple(images.shape)}: give bytes, torch.uint8 of shape "
                f"(images, {', '.join(map(str, self.images.shape))})"
            )
        if not len(images):
            return torch.empty(0, len(self.images.class_names))
        with torch.inference_mode():
            return torch.cat([self._predict(chunk.to(self.device)).cpu() for chunk in images.split(BATCH_SIZE)])

    def _predict(self, images: Tensor) -> Tensor:
        logits_SBK: Tensor = self.network(self.normalise(images).unsqueeze(0))[0]
        return logits_SBK.softmax(dim=-1).mean(dim=0)


def tabulate(probabilities: Tensor, class_names: tuple[str, ...]) -> pd.DataFrame:
    """One row an image: the most probable class, its probability, and a column of probabilities for each class."""
    highest = probabilities.max(dim=1)
    told = pd.DataFrame(
        {"prediction": [class_names[k] for k in highest.indices.tolist()], "probability": highest.values.numpy()}
    )
    return pd.concat([told, pd.DataFrame(probabilities.numpy(), columns=list(class_names))], axis=1)
