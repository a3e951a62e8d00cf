"""The state of training on disk, so that an interrupted run can go on: tensors and text with a digest, never code."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from collective_pipeline.config import UserError
from collective_pipeline.files import replacing

logger = logging.getLogger(__name__)

# Saving takes at most this part of a run's time, and what is lost at worst is half a minute of work or 100 savings'.
SHARE = 0.01
SECONDS_BETWEEN = 30.0


@dataclass(frozen=True)
class Snapshot:
    """A moment of training.

    Attributes:
        facts: Plain values.
        tensors: By names with a part before the first slash.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors of this part, without its name."""
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): tensor.to(device)
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }


class Snapshots:
    """The last snapshot of one arm, and the one before it.

    Args:
        path: Of the last one; the one before it is beside it.
        name: What is trained, for messages.
        identity: What must be the same for a run to go on from here, each part by the name that a user knows.
        circumstances: What may differ, though results may then differ in their last digits.
        resume: Whether to go on from what is there.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        identity: Mapping[str, Any],
        circumstances: Mapping[str, Any],
        resume: bool,
    ) -> None:
        self.path = path
        self.name = name
        self.identity = json.loads(json.dumps(identity))
        self.circumstances = json.loads(json.dumps(circumstances))
        self.resume = resume
        self.last_time = time.perf_counter()
        self.cost: float | None = None

    @property
    def previous(self) -> Path:
        return self.path.with_name(f"previous.{self.path.name}")

    def is_due(self) -> bool:
        """Whether so much time has passed that saving now is worth its cost."""
        return time.perf_counter() - self.last_time > max(SECONDS_BETWEEN, (self.cost or 0.0) / SHARE)

    def save(self, snapshot: Snapshot) -> None:
        """Write, sync, and only then let the one before it go."""
        started = time.perf_counter()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in snapshot.tensors.items()}
        about = {
            "facts": json.dumps(snapshot.facts),
            "identity": json.dumps(self.identity),
            "circumstances": json.dumps(self.circumstances),
        }
        with replacing(self.path) as partial:
            save_file(tensors, partial, about | {"digest": _digest(tensors, about)})
            if self.path.exists():
                self.path.replace(self.previous)
        self.last_time = time.perf_counter()
        self.cost = self.last_time - started

    def load(self) -> Snapshot | None:
        """The last snapshot that is whole, or None if there is none or none is wanted.

        Raises:
            UserError: If it is of another run, naming what differs.
        """
        if not self.resume:
            return None
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                snapshot, identity, circumstances = _read(path)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s is damaged (%s): the one before it is used, if there is one.", path, error)
                continue
            differing = [name for name in self.identity if self.identity[name] != identity.get(name)]
            if differing:
                was = "; ".join(
                    f"{name} was {identity.get(name)!r} and is {self.identity[name]!r}" for name in differing
                )
                raise UserError(
                    f"resume=true: {path} is of another run: {was}; give the command that was interrupted, or "
                    "resume=false to begin anew"
                )
            changed = [name for name in self.circumstances if self.circumstances[name] != circumstances.get(name)]
            for name in changed:
                logger.warning(
                    "%s was %s and is %s now: training goes on, and may differ in its last digits.",
                    name,
                    circumstances.get(name),
                    self.circumstances[name],
                )
            return snapshot
        return None


def read_snapshot(path: Path) -> Snapshot:
    """Of whichever run it is.

    Raises:
        ValueError: If its contents are not what was written; or an error of reading.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[Snapshot, dict[str, Any], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    digest = about.pop("digest")
    if digest != _digest(tensors, about):
        raise ValueError("its digest is not that of its contents")
    facts, identity, circumstances = (json.loads(about[name]) for name in ("facts", "identity", "circumstances"))
    return Snapshot(facts, tensors), identity, circumstances


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 over all names and contents."""
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
