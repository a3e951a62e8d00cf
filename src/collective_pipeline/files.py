"""Files that are whole or not there, whenever a run is stopped."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path, *, keep: Path | None = None) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place, synced, if the block succeeds, and is gone if it fails.

    What was at `path` before is at `keep` then, if that is given.
    """
    partial = path.with_name(f".partial.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _sync(partial)
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
        _sync(path.parent)  # or the new name may be lost with the power
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """A safetensors file with `about` in its header.

    Raises:
        OSError: As Python's own; `safetensors.torch.save_file` would tell of a full disk in an error of its own kind.
    """
    path.write_bytes(save(dict(tensors), dict(about)))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
