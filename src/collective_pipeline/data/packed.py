"""Labelled image files as they lie in a tree, and packed small into a few large files for repeated epochs.

A packed folder holds a header, which says what it was made of, and numbered shards: the JPEG files of so many images
one behind the other, all upright, coloured and baseline, and a table of where each is and of its image's size. A shard
counts once its table is there, so a build that was interrupted goes on with the next one.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from collective_pipeline import files
from collective_pipeline.config import UserError, count_of, list_some
from collective_pipeline.data.jpeg import MAX_PIXELS, Encoded, Files, Problem, address_of, decode, encode, is_usual

logger = logging.getLogger(__name__)

HEADER = "packed.json"
FORMAT = 3  # of folders; 1 had no sizes of images, 2 none of the files that they were made of
IMAGES_A_SHARD = 8192  # 250 MB at a shorter side of 256 pixels, 450 MB at 400
MAX_UNUSABLE = 0.01  # of all files, as for folders of small images
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_LOOKS = 0.5
FILES_AT_ONCE = 8  # of a thread: less time at Python's lock than one by one

# Of a shard, a row for each image: the file that it was made of, and where in the shard it is; a file that could not be
# packed has no bytes there.
TABLE = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("height", pa.int64(), nullable=False),
        pa.field("width", pa.int64(), nullable=False),
        pa.field("problem", pa.string()),
    ]
)

Item = TypeVar("Item")


class EncodedImages(Protocol):
    """Labelled image files that wait to be decoded; many threads may read at once."""

    @property
    def labels(self) -> Tensor:
        """`(n,)`, int64, on the CPU."""

    @property
    def unreadable(self) -> set[str]:
        """Files that could not be read so far, by name and reason: whoever meets one tells of it and adds it."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """For messages: of which file this is."""

    def read(self, rows: Sequence[int]) -> Sequence[Encoded | Problem]:
        """The bytes of these files, or why there are none."""

    def files(self, rows: Sequence[int], readers: Executor) -> Files:
        """The same for a GPU; `readers` are there to read."""


@dataclass(frozen=True)
class FileImages:
    """The files `paths` below `root`, as they are, and their labels `(n,)`, int64; `sizes` in bytes, where known."""

    root: Path
    paths: Sequence[str]
    labels: Tensor
    sizes: NDArray[np.int64] | None = None
    unreadable: set[str] = field(default_factory=set, init=False)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return os.path.join(self.root, self.paths[row])  # noqa: PTH118  # a tenth of what a Path takes

    @cached_property
    def num_bytes(self) -> NDArray[np.int64]:
        """Of each file, `(n,)`; of one that is not there 0."""
        if self.sizes is not None:
            return self.sizes
        files = (Path(self.name(row)) for row in range(len(self)))
        return np.array([file.stat().st_size if file.exists() else 0 for file in files], dtype=np.int64)

    def read(self, rows: Sequence[int]) -> list[Encoded | Problem]:
        return [_read_file(self.name(row)) for row in rows]

    def files(self, rows: Sequence[int], readers: Executor) -> Files:
        # Headers are looked at here, in one thread: in all of them it took twice as long, with waiting for the lock.
        return Files.of([*chain.from_iterable(readers.map(self.read, in_chunks(rows)))])


class PackedImages:
    """A packed folder that is complete, its images mapped into memory: nothing is read before it is wanted.

    The files are not checked against the sizes in the tables, from which a GPU's memory is allocated.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[mmap.mmap],
        index: pa.Table,
        left_out: Iterable[str],
        wanted: Sequence[str] | None,
    ) -> None:
        self.folder = folder
        self.wanted = wanted
        self.unreadable = set(left_out)
        self.labels = torch.tensor(index["label"].to_numpy())
        self._shards = shards
        self._views = [memoryview(shard) for shard in shards]
        self._paths = index["path"]
        self._shard_of, self._offsets, self._lengths = (
            index[name].to_numpy() for name in ("shard", "offset", "length")
        )
        self._sizes = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
        starts = [address_of(shard) for shard in shards]
        self._addresses = np.array(starts, np.uint64)[self._shard_of] + self._offsets.astype(np.uint64)

    @classmethod
    def open(cls, folder: Path, wanted: Sequence[str] | None = None) -> "PackedImages":
        """The images that `pack_images` put into a folder, without the files that it left out.

        Args:
            folder: Of a packed copy.
            wanted: Paths of those of its files that are wanted, in their order; None: all.

        Raises:
            UserError: If the folder holds none, or is not complete, or lacks a wanted file, or a file of it has another
                length than its table, or a table says what packing does not write. Paths are believed as they are.
        """
        header = _read_header(folder)
        if header is None:
            raise UserError(f"{folder} holds no packed images: pack them there first")
        if wanted is not None and _digest_of(wanted) == header.files:
            wanted = None  # another process need not be told a million of them
        if _missing_shards(folder, header):
            raise UserError(f"{_tell_incomplete(folder, header)}: pack the images again, which goes on where it was")
        shards, tables = [], []
        for number in range(header.num_shards):
            table = _read_table(folder, header, number)
            packed = _packed_in(table)
            if len(packed):
                shards.append(_map_shard(folder, number, packed))
            shard = np.full(len(table), len(shards) - 1, dtype=np.int32)
            tables.append(table.append_column("shard", pa.array(shard)))
        index = pa.concat_tables(tables)
        if _digest([index["label"].to_numpy().tobytes()]) != header.labels:
            raise UserError(
                f"the tables in {folder} have other labels than its images had when they were packed: remove the "
                "folder, and pack them again"
            )
        if wanted is not None:
            rows = _find(wanted, index)
            if rows.null_count:
                first = wanted[pc.index(rows.is_null(), True).as_py()]
                raise UserError(
                    f"{folder} lacks {rows.null_count:,} of {len(wanted):,} wanted images, the first is {first}: pack "
                    "these elsewhere"
                )
            index = index.take(rows)
        return cls(folder, shards, _packed_in(index), _problems_in(index), wanted)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the same files."""
        return PackedImages.open, (self.folder, self.wanted)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        return f"{self._paths[row].as_py()} in {self.folder}"

    def read(self, rows: Sequence[int]) -> list[memoryview]:
        """The files themselves, not copies; the disk is asked for all of them before the first is touched."""
        chosen = np.asarray(rows, np.int64)
        self._ask_for(chosen)
        places = zip(*(table[chosen].tolist() for table in (self._shard_of, self._offsets, self._lengths)), strict=True)
        return [self._views[shard][offset : offset + length] for shard, offset, length in places]

    def files(self, rows: Sequence[int], readers: Executor) -> Files:
        chosen = np.asarray(rows, np.int64)
        self._ask_for(chosen)
        lengths, are_usual = self._lengths[chosen].astype(np.uint64), np.ones(len(chosen), np.bool_)
        return Files(self._addresses[chosen], lengths, self._sizes[chosen], are_usual, {}, self._shards)

    def _ask_for(self, rows: NDArray[np.int64]) -> None:
        """Of the disk, so that it brings all of them while the first is touched."""
        offsets = self._offsets[rows]
        starts = offsets - offsets % mmap.PAGESIZE
        lengths = offsets + self._lengths[rows] - starts
        shards = map(self._shards.__getitem__, self._shard_of[rows].tolist())
        asking = map(mmap.mmap.madvise, shards, repeat(mmap.MADV_WILLNEED), starts.tolist(), lengths.tolist())
        deque(asking, maxlen=0)  # nothing of Python's own for each image


@dataclass(frozen=True)
class _Header:
    """What a packed folder is made of."""

    format: int
    num_images: int
    files: str  # digest of the paths in their order
    labels: str  # digest
    sizes: str  # digest of the files' lengths in bytes
    side: int
    quality: int
    images_a_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_a_shard)

    def differences(self, other: "_Header") -> list[str]:
        """What another one has otherwise, in words."""
        told = {
            "num_images": f"{count_of(self.num_images, 'image')} and not {other.num_images:,}",
            "files": "other files",
            "labels": "other labels",
            "sizes": "files of other lengths" if self.files == other.files else "",
            "side": f"side={self.side} and not {other.side}",
            "quality": f"quality={self.quality} and not {other.quality}",
            "images_a_shard": f"shards of {self.images_a_shard:,} and not {other.images_a_shard:,} images",
        }
        return [words for name, words in told.items() if words and getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Claim:
    """A folder that is marked as that of a packed copy of these images.

    Attributes:
        images: What to pack.
        folder: Where.
        header: Of the folder.
        left_out: Where the copy there is whole and of more images, so that these need not be packed, the problems of
            those of these that it lacks; None where they are to be packed.
    """

    images: FileImages
    folder: Path
    header: _Header
    left_out: Sequence[str] | None = None


def claim_folder(images: FileImages, folder: Path, *, side: int, quality: int = 90) -> Claim:
    """Mark a folder as that of a packed copy of these images, before `pack_images` makes it.

    Args:
        images: What to pack.
        folder: For this alone.
        side: The shorter one, in pixels, to which images are brought; smaller ones keep their size.
        quality: Of JPEG, from 1 to 100.

    Raises:
        UserError: If it holds another one, in which these images are not, or there are no images.
    """
    if len(images) == 0:
        raise UserError(f"there are no images to pack into {folder}: give some")
    header = _Header(
        format=FORMAT,
        num_images=len(images),
        files=_digest_of(images.paths),
        labels=_digest([images.labels.numpy().tobytes()]),
        sizes=_digest([images.num_bytes.tobytes()]),
        side=side,
        quality=quality,
        images_a_shard=IMAGES_A_SHARD,
    )
    there = _read_header(folder) or _write_header(folder, header)
    if differences := there.differences(header):
        of_images = {name: getattr(there, name) for name in ("num_images", "files", "labels", "sizes")}
        if there.num_images > header.num_images and replace(header, **of_images) == there:
            if _missing_shards(folder, there):
                raise UserError(
                    f"{_tell_incomplete(folder, there)}, and is of other images ({', '.join(differences)}): finish it "
                    "with the command that began it, pack these with another side, or remove it"
                )
            left_out = _left_out(folder, there, images)
            if left_out is None:
                raise UserError(
                    f"{folder} is packed with {count_of(there.num_images, 'image')}, and not all of these "
                    f"{len(images):,} are among them as they are now: remove it, to pack anew, or pack these "
                    "with another side"
                )
            return Claim(images, folder, there, left_out)
        raise UserError(
            f"{folder} is packed with {', '.join(differences)}: remove it, if no command reads it, to pack anew, or "
            "pack these with another side"
        )
    return Claim(images, folder, header)


def _write_header(folder: Path, header: _Header) -> _Header:
    """The header that is there then: of two who claim a folder at once, that of the first."""
    with _alone_in(folder, lambda: None):
        there = _read_header(folder)
        if there is None:
            with files.replacing(folder / HEADER) as partial:
                partial.write_text(json.dumps(asdict(header), indent=1))
    return there or header


def pack_images(
    claim: Claim, *, num_threads: int | None = None, look_around: Callable[[], None] = lambda: None
) -> None:
    """Write all images into the folder that is claimed for them; what is there already stays.

    Whole coloured baseline JPEG files that are small enough and upright are kept as they are. Files that cannot be read
    are named and left out.

    Args:
        claim: What to pack, and where; while another process packs there, this one waits.
        num_threads: That read, decode and encode; as many as there are cores if not given.
        look_around: Called after every image, and while it waits; what it raises ends packing, and whole shards stay.

    Raises:
        UserError: If more than `MAX_UNUSABLE` of the files cannot be read, or a table that is there is damaged.
        Exception: Whatever `look_around` raises.
    """
    images, folder, header = claim.images, claim.folder, claim.header
    progress = _Progress(len(images), folder, look_around)
    if claim.left_out is not None:
        logger.info(
            "%s is of %s, these %s among them", folder, count_of(header.num_images, "image"), f"{len(images):,}"
        )
        progress.skip(len(images), claim.left_out)
        progress.tell_problems()
        return
    # A whole copy may lie where nothing can be written.
    with _alone_in(folder, look_around) if _missing_shards(folder, header) else contextlib.nullcontext():
        there = sorted(set(range(header.num_shards)).difference(_missing_shards(folder, header)))
        for number in there:
            table = _read_table(folder, header, number)
            progress.skip(len(table), _problems_in(table))
        if there:
            logger.info("%s: there already, %s of %s", folder, f"{len(there):,}", count_of(header.num_shards, "shard"))
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            for number in sorted(set(range(header.num_shards)).difference(there)):
                rows = _rows_of(header, number)
                work = deque(pool.submit(_pack_one, images, row, header.side, header.quality) for row in rows)
                try:
                    _write_shard(folder, number, images, rows, map(progress.count, _results(work)))
                finally:
                    for one in work:  # or an interruption would wait for all of them
                        one.cancel()
    progress.tell_problems()


@contextlib.contextmanager
def _alone_in(folder: Path, look_around: Callable[[], None]) -> Iterator[None]:
    """Wait until no other process packs there: two would write into the same files."""
    lock = files.lock_of(folder)
    is_told = False
    while not files.try_to_hold(lock, SECONDS_BETWEEN_LOOKS):
        if not is_told:
            logger.info("%s: another command packs these images; this one waits for it", folder)
        is_told = True
        look_around()
    try:
        yield
    finally:
        lock.release()


def _results(work: deque[Future["_Packed | Problem"]]) -> Iterator["_Packed | Problem"]:
    """In order, each kept no longer than it is needed."""
    while work:
        yield work.popleft().result()


@dataclass(frozen=True)
class _Packed:
    """The file to write for an image, and the image's size."""

    file: Encoded
    height: int
    width: int


def _pack_one(images: FileImages, row: int, side: int, quality: int) -> _Packed | Problem:
    """A problem names its file."""
    file = images.read([row])[0]
    image = decode([file])[0]
    if isinstance(image, Problem):
        return Problem(f"{images.name(row)}: {image.reason}")
    height, width = image.shape[1:]
    factor = side / min(height, width)
    if factor >= 1:
        kept = file if not isinstance(file, Problem) and is_usual(file) else encode(image, quality)
        return _Packed(kept, height, width)
    smaller = (max(side, round(factor * height)), max(side, round(factor * width)))
    # Only with the channels last does torch resize bytes as they are.
    channels_last = image[None].contiguous(memory_format=torch.channels_last)
    image = F.interpolate(channels_last, smaller, mode="bilinear", antialias=True)[0]
    return _Packed(encode(image, quality), *smaller)


def _write_shard(
    folder: Path, number: int, images: FileImages, rows: range, packed: Iterator[_Packed | Problem]
) -> None:
    """The files one behind the other, then the table without which they do not count."""
    lengths, sizes, problems = [], [], []
    with files.replacing(_shard_of(folder, number)) as partial, partial.open("wb") as shard:
        for one in packed:
            problems.append(one.reason if isinstance(one, Problem) else None)
            lengths.append(0 if isinstance(one, Problem) else shard.write(one.file))
            sizes.append((0, 0) if isinstance(one, Problem) else (one.height, one.width))
    ends = np.cumsum(lengths)
    table = pa.table(
        {
            "path": [images.paths[row] for row in rows],
            "label": images.labels[rows.start : rows.stop].numpy(),
            "num_bytes": images.num_bytes[rows.start : rows.stop],
            "offset": ends - lengths,
            "length": np.asarray(lengths),
            "height": np.asarray(sizes)[:, 0],
            "width": np.asarray(sizes)[:, 1],
            "problem": problems,
        },
        schema=TABLE,
    )
    with files.replacing(_table_of(folder, number)) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


class _Progress:
    """Says how far packing is, and stops it when too many files are bad."""

    def __init__(self, num_images: int, folder: Path, look_around: Callable[[], None]) -> None:
        self.num_images = num_images
        self.folder = folder
        self.look_around = look_around
        self.problems: list[str] = []
        self.num_skipped = self.num_done = 0
        self.started = self.last_line = time.perf_counter()

    def skip(self, num_images: int, problems: Sequence[str]) -> None:
        """These were packed earlier.

        Raises:
            UserError: If too many could not be read.
        """
        self.num_skipped += num_images
        self.problems += problems
        self._check()

    def count(self, one: _Packed | Problem) -> _Packed | Problem:
        """The same one, counted.

        Raises:
            UserError: If too many cannot be read.
        """
        self.look_around()
        self.num_done += 1
        if self.num_done == 1:  # before it, decoders were loaded
            self.started = self.last_line = time.perf_counter()
        if isinstance(one, Problem):
            self.problems.append(one.reason)
            self._check()
        now = time.perf_counter()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            done = self.num_skipped + self.num_done
            left = (now - self.started) / max(1, self.num_done - 1) * (self.num_images - done)
            logger.info(
                "%s of %s packed, %d %%; about %s left",
                f"{done:,}",
                count_of(self.num_images, "image"),
                100 * done // self.num_images,
                f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s",
            )
        return one

    def _check(self) -> None:
        if len(self.problems) > MAX_UNUSABLE * self.num_images:
            raise UserError(
                f"more than {100 * MAX_UNUSABLE:g} % of the {count_of(self.num_images, 'image file')} to pack into "
                f"{self.folder} cannot be read: put good ones in their place ({list_some(self.problems)})"
            )

    def tell_problems(self) -> None:
        """Once all are packed."""
        if self.problems:
            logger.warning(
                "%s of the %s cannot be read, left out of %s: %s",
                f"{len(self.problems):,}",
                count_of(self.num_images, "image file"),
                self.folder,
                list_some(self.problems),
            )


def _read_header(folder: Path) -> _Header | None:
    path = folder / HEADER
    if not path.exists():
        return None
    try:
        header = _Header(**json.loads(path.read_text()))
        if header.format != FORMAT:
            raise ValueError(f"format={header.format}")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no header of packed images, or that of another version: remove the folder, and pack them again"
        ) from error
    return header


def _missing_shards(folder: Path, header: _Header) -> list[int]:
    return [number for number in range(header.num_shards) if not _table_of(folder, number).exists()]


def _tell_incomplete(folder: Path, header: _Header) -> str:
    missing = len(_missing_shards(folder, header))
    return f"{folder} is not complete, it lacks {missing:,} of its {count_of(header.num_shards, 'shard')}"


def _left_out(folder: Path, header: _Header, images: FileImages) -> list[str] | None:
    """The problems of those of these images that could not be packed; None if not all are there as they are here."""
    index = pa.concat_tables(_read_table(folder, header, number) for number in range(header.num_shards))
    rows = _find(images.paths, index)
    if rows.null_count:
        return None
    index = index.take(rows)
    is_same = np.array_equal(index["label"].to_numpy(), images.labels.numpy())
    is_same &= np.array_equal(index["num_bytes"].to_numpy(), images.num_bytes)
    return _problems_in(index) if is_same else None


def _find(paths: Sequence[str], index: pa.Table) -> pa.Array:
    """The row of each of these files, or null."""
    return pc.index_in(pa.array(paths, pa.string()), value_set=index["path"])


def _rows_of(header: _Header, number: int) -> range:
    return range(header.num_images)[number * header.images_a_shard : (number + 1) * header.images_a_shard]


def _shard_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.jpegs"


def _table_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.parquet"


def _read_table(folder: Path, header: _Header, number: int) -> pa.Table:
    """All files of a shard, also those that could not be read.

    Raises:
        UserError: If the table is damaged, or says what packing does not write.
        OSError: If the system does not let it be read.
    """
    try:
        table = pq.read_table(_table_of(folder, number), page_checksum_verification=True).cast(TABLE)
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, and the table may be good
            raise
        raise _damaged(folder, number, "it is no table of a shard") from error
    if len(table) != len(_rows_of(header, number)):
        raise _damaged(folder, number, f"it has {len(table):,} rows and not {len(_rows_of(header, number)):,}")
    packed = _packed_in(table)
    offsets, lengths, heights, widths = (packed[name].to_numpy() for name in ("offset", "length", "height", "width"))
    shorter, longer = np.minimum(heights, widths), np.maximum(heights, widths)
    # Each file behind the one before it, and each image as small as it was to be, with as many pixels as are decoded.
    is_sound = (lengths > 0) & (offsets >= 0) & (offsets == lengths.cumsum() - lengths)
    is_sound &= (shorter > 0) & (shorter <= header.side) & (longer <= MAX_PIXELS // shorter.clip(1))
    if not is_sound.all():
        row = int(is_sound.argmin())
        told = f"{heights[row]} x {widths[row]} pixels in {lengths[row]} bytes from byte {offsets[row]}"
        raise _damaged(folder, number, f"{packed['path'][row]} cannot be {told}")
    return table


def _packed_in(table: pa.Table) -> pa.Table:
    """The rows of files that could be read."""
    return table.filter(table["problem"].is_null())


def _problems_in(table: pa.Table) -> list[str]:
    """Of the others."""
    problems: list[str] = table["problem"].drop_null().to_pylist()
    return problems


def _damaged(folder: Path, number: int, reason: str) -> UserError:
    path = _table_of(folder, number)
    return UserError(f"{path} is damaged, {reason}: remove it, and pack the images again, which makes it anew")


def _map_shard(folder: Path, number: int, table: pa.Table) -> mmap.mmap:
    path = _shard_of(folder, number)
    wanted = table["offset"][-1].as_py() + table["length"][-1].as_py()
    found = path.stat().st_size if path.exists() else 0
    if found != wanted:
        raise UserError(
            f"{path} has {found:,} bytes where its table says {wanted:,}: remove the folder, and pack the images again"
        )
    with path.open("rb") as shard:
        # A private copy of what is written, which nobody does: torch warns of memory that is for reading alone.
        return mmap.mmap(shard.fileno(), 0, access=mmap.ACCESS_COPY)


def in_chunks(items: Sequence[Item]) -> list[Sequence[Item]]:
    """As many at a time as a thread reads."""
    return [items[start : start + FILES_AT_ONCE] for start in range(0, len(items), FILES_AT_ONCE)]


def _read_file(path: str) -> bytearray | Problem:
    try:
        # As few calls as there can be: after each, this thread waits for Python's lock among all that read and decode.
        file = os.open(path, os.O_RDONLY)
        try:
            data = bytearray(os.fstat(file).st_size)
            del data[os.readv(file, [data]) :]
        finally:
            os.close(file)
    except OSError as error:
        return Problem(error.strerror or str(error))
    return data


def _digest_of(paths: Sequence[str]) -> str:
    return _digest(path.encode() for path in paths)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()
