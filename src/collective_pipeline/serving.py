"""A checkpoint as MLflow loads and serves it; `training.tracking.log_model` names this module in what it logs.

MLflow copies the package beside the weights, so that a model can be taken anywhere the packages in
`training.tracking.REQUIREMENTS` are. This module and what it imports need nothing else: not Kedro, not MLflow.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from collective_pipeline.evaluation.predict import Predictor, tabulate
from collective_pipeline.models.checkpoint import load_checkpoint
from collective_pipeline.training.runtime import choose_device


class Served:
    """Raw images to a table of predictions and class probabilities, on the best device there is."""

    def __init__(self, path: Path) -> None:
        checkpoint, device = load_checkpoint(path), choose_device("auto")
        self._images = checkpoint.images
        self._predictor = cache(lambda seed: Predictor(checkpoint, device, seed=seed))

    def predict(self, model_input: npt.NDArray[np.uint8], params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Of images `(B, C, H, W)`; `params["seed"]` asks for one seed instead of the mean of all."""
        seed = (params or {}).get("seed")
        predictor = self._predictor(None if seed is None else int(seed))
        return tabulate(predictor(torch.tensor(model_input)), self._images.class_names)


def _load_pyfunc(data_path: str) -> Served:
    return Served(Path(data_path))
