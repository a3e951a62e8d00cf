"""Files that are whole or not there, whenever a run is stopped, and written by one process at a time."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)


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


def lock_of(path: Path, *, is_singleton: bool = False) -> FileLock:
    """What keeps other processes from writing to `path`; the system lets go of it when its holder dies.

    Args:
        path: A file or folder; that beside it is made.
        is_singleton: Whether all of this process hold the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), thread_local=False, is_singleton=is_singleton)


def try_to_hold(lock: FileLock, seconds: float) -> bool:
    """Whether nobody else holds it within these seconds; true, and told, where the disk has no locks."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as error:  # of some network disks
        logger.warning("%s cannot be locked (%s): let no two commands write there at once", lock.lock_file, error)
    return True


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
