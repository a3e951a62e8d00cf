"""The state of training on disk, so that an interrupted run can go on: tensors and text with a digest, never code."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from collective_pipeline.config import ARM_NAME_WIDTH, UserError
from collective_pipeline.files import lock_of, replacing, try_to_hold, write_tensors

logger = logging.getLogger(__name__)

# Training waits for saving for at most this part of its time; what is lost at worst is half a minute of work, or
# where one saving takes longer than 0.3 s, a hundred times as long.
SHARE = 0.01
SECONDS_BETWEEN = 30.0

DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b")  # whose beginning is enough for a person
DAMAGE = (OSError, SafetensorError, KeyError, TypeError, ValueError)

_held: list[FileLock] = []  # by the command that runs


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
        # The id of the run that tracks this training is kept here, so that it goes on in the same run.
        self.run_file = path.with_suffix(".run")
        self.name = name
        self.identity = json.loads(json.dumps(identity))
        self.circumstances = json.loads(json.dumps(circumstances))
        self.resume = resume
        # Saved with every snapshot: what was done before the training that is saved now.
        self.before = Snapshot({}, {})
        self.last_time = time.perf_counter()
        self.cost = 0.0
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def identify(self, **parts: Any) -> None:
        """Add what must be the same as well, before anything is saved or loaded."""
        self.identity |= json.loads(json.dumps(parts))

    def recall(self, part: str) -> Any:
        """What this part of the identity was when it was saved; None if a run does not go on from anything."""
        found = self._find() if self.resume else None
        return None if found is None else found[1]["identity"].get(part)

    def is_due(self) -> bool:
        """Whether so much time has passed that saving now is worth its cost."""
        is_writing = self._writing is not None and not self._writing.done()
        return not is_writing and time.perf_counter() - self.last_time > max(SECONDS_BETWEEN, self.cost / SHARE)

    def save(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Write, sync, and only then let the one before it go.

        On a CUDA device training waits for a copy there only, unless it is to `wait`: the rest happens beside it. On
        a CPU it always waits, since writing beside it would take its cores.

        Raises:
            OSError: Of this writing, or of the one before it.
        """
        started = time.perf_counter()
        self._finish()
        tensors = {name: tensor.detach().clone() for name, tensor in snapshot.tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        whole = Snapshot(self.before.facts | snapshot.facts, self.before.tensors | tensors)
        self._writing = self._writer.submit(self._write, whole, copied)
        if wait or not devices:
            self._finish()
        self.last_time = time.perf_counter()
        self.cost = self.last_time - started

    def _finish(self) -> None:
        """Wait for what is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, snapshot: Snapshot, copied: Sequence[torch.cuda.Event]) -> None:
        for event in copied:
            event.synchronize()
        tensors = {name: tensor.cpu() for name, tensor in snapshot.tensors.items()}
        header = {"facts": snapshot.facts, "identity": self.identity, "circumstances": self.circumstances}
        about = {name: json.dumps(part) for name, part in header.items()}
        about["header_digest"] = digest_of({}, about)
        about["digest"] = digest_of(tensors, about)
        with replacing(self.path, keep=_previous(self.path)) as partial:
            write_tensors(partial, tensors, about)

    def check(self, *, apart_from: Collection[str] = ()) -> None:
        """Refuse what is there if a run cannot go on from it; reads no tensor, so that it can come early.

        Args:
            apart_from: Parts of the identity that are known only later; `load` compares them too.

        Raises:
            UserError: Naming what differs.
        """
        found = self._find() if self.resume else None
        if found is not None:
            self._compare(*found, apart_from)

    def hold(self) -> None:
        """Keep other commands from saving here until `let_go`.

        Raises:
            UserError: If another one does.
        """
        # A second run of the same process, a notebook's, is no other command.
        lock = lock_of(self.path, is_singleton=True)
        if not try_to_hold(lock, 0):
            raise UserError(
                f"{self.name}: another command trains it now and saves in {self.path.parent}: wait until that ends, or "
                "stop it"
            )
        _held.append(lock)

    def find_place(self) -> Mapping[str, Any] | None:
        """How far the training is that is saved here, or None."""
        found = self._find()
        return None if found is None else found[1]["facts"]["place"]

    def _find(self) -> tuple[Path, dict[str, Any]] | None:
        """The last file whose header can be read, and that; no tensor is read."""
        headers = ((path, _read_header(path)) for path in (self.path, _previous(self.path)))
        return next(((path, header) for path, header in headers if header is not None), None)

    def clear(self, aside: str | None = None) -> None:
        """Unless a run goes on from there, remove what is saved, so that no later run takes it for this one's.

        Args:
            aside: Where to put it instead, a folder beside it.
        """
        if self.resume:
            if self.find_place() is None:
                self.run_file.unlink(missing_ok=True)  # of a run that left nothing to go on from, whatever it was
            return
        for file in (self.path, _previous(self.path), self.run_file):
            if aside is None:
                file.unlink(missing_ok=True)
            elif file.exists():
                (file.parent / aside).mkdir(exist_ok=True)
                file.replace(file.parent / aside / file.name)

    def load(self) -> Snapshot | None:
        """The last snapshot that is whole, or None if there is none or none is wanted.

        Raises:
            UserError: If it is of another run, naming what differs.
        """
        if not self.resume:
            return None
        for path in (self.path, _previous(self.path)):
            if not path.exists():
                continue
            try:
                snapshot, header = _read(path)
            except DAMAGE as error:
                logger.warning("%s is damaged (%s): the one before it is used, if there is one.", path, error)
                continue
            self._compare(path, header)
            for name, now in self.circumstances.items():
                if header["circumstances"].get(name) != now:
                    logger.warning(
                        "%s: %s was %s and is %s now: training goes on, and may differ in its last digits.",
                        self.name,
                        name,
                        header["circumstances"].get(name),
                        now,
                    )
            return snapshot
        logger.info("%-*s  nothing was saved of it: it begins from the start", ARM_NAME_WIDTH, self.name)
        return None

    def _compare(self, path: Path, header: Mapping[str, Any], apart_from: Collection[str] = ()) -> None:
        saved = header["identity"]
        names = (name for name in self.identity | saved if name not in apart_from)
        differing = [name for name in names if self.identity.get(name) != saved.get(name)]
        if differing:
            was = "; ".join(f"{name} was {saved.get(name)!r} and is {self.identity.get(name)!r}" for name in differing)
            was = DIGEST.sub(r"\1…", was)
            raise UserError(
                f"resume=true: {path} is of another run: {was}; give the command that was interrupted, or leave "
                "resume=true out to begin anew"
            )


def let_go() -> None:
    """Whatever is held: other commands may save there."""
    while _held:
        _held.pop().release(force=True)


def read_snapshot(path: Path) -> Snapshot:
    """Of whichever run it is.

    Raises:
        ValueError: If its contents are not what was written; or an error of reading.
    """
    return _read(path)[0]


def _previous(path: Path) -> Path:
    return path.with_name(f"previous.{path.name}")


def _read(path: Path) -> tuple[Snapshot, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    digest = about.pop("digest")
    if digest != digest_of(tensors, about):
        raise ValueError("its digest is not that of its contents")
    del about["header_digest"]
    header = {name: json.loads(text) for name, text in about.items()}
    return Snapshot(header["facts"], tensors), header


def _read_header(path: Path) -> dict[str, Any] | None:
    """Without its tensors, or None if there is nothing that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata())
        about.pop("digest")
        if about.pop("header_digest") != digest_of({}, about):
            return None
        return {name: json.loads(text) for name, text in about.items()}
    except DAMAGE:
        return None


def digest_of(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 over all names and contents."""
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
