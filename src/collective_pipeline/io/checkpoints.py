"""Kedro datasets for checkpoints."""

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


class CheckpointsDataset(AbstractVersionedDataset[dict[str, Checkpoint], dict[str, Checkpoint]]):
    """A folder of checkpoints, one file for each name; there may be none."""

    def __init__(self, *, filepath: str, version: Version | None = None, metadata: dict[str, Any] | None = None):
        self.metadata = metadata
        super().__init__(PurePosixPath(filepath), version)

    def load(self) -> dict[str, Checkpoint]:
        files = sorted(Path(self._get_load_path()).glob("*.safetensors"))
        return {file.stem: load_checkpoint(file) for file in files}

    def save(self, data: dict[str, Checkpoint]) -> None:
        folder = Path(self._get_save_path())
        folder.mkdir(parents=True, exist_ok=True)
        for name, checkpoint in data.items():
            save_checkpoint(checkpoint, folder / f"{name}.safetensors")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "version": self._version}
