"""The raw images as a catalog entry."""

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from collective_pipeline.config import UserError, check_parameters
from collective_pipeline.data.small_images import load_images
from collective_pipeline.data.splits import RawImages


class ImagesDataset(AbstractDataset[None, RawImages]):
    """The data set called `name` from the folder `filepath`, downloaded into it where files are absent."""

    def __init__(self, *, filepath: str, name: str, metadata: dict[str, Any] | None = None) -> None:
        self._folder = Path(filepath)
        self._name = name
        self.metadata = metadata

    def load(self) -> RawImages:
        """The images; a `UserError` reaches the user as a `DatasetError` with the same one sentence."""
        try:
            # Checked only here: Kedro builds every entry of the catalog on each run, the unused ones too.
            return load_images(check_parameters({"dataset": self._name}).dataset, self._folder)
        except UserError as error:
            # Kedro would put the description of this object in front.
            raise DatasetError(str(error)) from error

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._name} is raw data, which is only read: save to another entry of the catalog")

    def _exists(self) -> bool:
        return self._folder.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._folder.as_posix(), "name": self._name}
