"""Packed images as a catalog entry."""

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from collective_pipeline.config import UserError
from collective_pipeline.data.packed import PackedImages


class PackedImagesDataset(AbstractDataset[None, PackedImages]):
    """The images packed into the folder `filepath`; nothing of them is read until a network wants it."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._folder = Path(filepath)
        self.metadata = metadata

    def load(self) -> PackedImages:
        """The images; a `UserError` reaches the user as a `DatasetError` with the same one sentence."""
        try:
            return PackedImages.open(self._folder)
        except UserError as error:
            # Kedro would put the description of this object in front.
            raise DatasetError(str(error)) from error

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._folder} is written by pack_images, not by Kedro")

    def _exists(self) -> bool:
        return self._folder.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._folder.as_posix()}
