"""A Kedro dataset for checkpoints."""

from pathlib import Path, PurePosixPath
from typing import Any

from kedro.io import AbstractVersionedDataset, Version

from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


class CheckpointDataset(AbstractVersionedDataset[Checkpoint, Checkpoint]):
    """Trained weights in a safetensors file; with `versioned: true`, one for each run."""

    def __init__(self, *, filepath: str, version: Version | None = None, metadata: dict[str, Any] | None = None):
        self.metadata = metadata
        super().__init__(PurePosixPath(filepath), version)

    @property
    def path(self) -> Path:
        """The file that `load` reads: of this run, once it is saved, or else the newest."""
        return Path(self._get_load_path())

    def load(self) -> Checkpoint:
        return load_checkpoint(self.path)

    def save(self, data: Checkpoint) -> None:
        save_checkpoint(data, Path(self._get_save_path()))

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "version": self._version}
