"""A place for files that a node manages itself."""

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError


class PathDataset(AbstractDataset[None, Path]):
    """Loads to the path itself: for what is written again and again while a node runs."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Path:
        return self._filepath

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._filepath} is written by the node that is given its path, not by Kedro")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
