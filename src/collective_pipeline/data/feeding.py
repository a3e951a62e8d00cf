"""Batches of images of one size on the device, from encoded files, made by threads while a network trains.

Suffixes: K batches, B images of one, D draws.
"""

import functools
import itertools
import logging
import os
import queue
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collective_pipeline.config import UserError, count_of, list_some
from collective_pipeline.data.cropping import NUM_BOX_DRAWS, DecodedImages, centre_boxes, random_boxes, resample
from collective_pipeline.data.jpeg import Problem, decode, decode_on_gpu
from collective_pipeline.data.packed import FILES_AT_ONCE, EncodedImages, in_chunks

logger = logging.getLogger(__name__)

NUM_CROP_DRAWS = NUM_BOX_DRAWS + 1  # the last one mirrors
PRODUCERS = 2  # so that one batch is read and cut while another is decoded
# Of threads, where a GPU decodes: more of them wait for Python's one lock longer than for a disk.
MOST_READERS = 8


@dataclass(frozen=True)
class Crop:
    """What a network sees of an image.

    In training a part with a random share of the area between the two of `scale`, a ratio of width to height between
    the two of `ratio`, and mirrored with the chance `flip`; in validation the square in the middle with the share
    `centre` of the shorter side.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    centre: float = 0.875


class _Made(NamedTuple):
    """A batch that its producer's stream may still be working at, until `ready`."""

    images: Tensor
    labels: Tensor
    problems: dict[int, Problem]  # of rows of the source
    ready: torch.cuda.Event | None


class Feed:
    """Makes batches of encoded images ahead of their use, the same ones whatever the number of threads.

    A file that is no image is named in the log and counted; the next good image of its batch stands at its place. Where
    the middle of images is seen, which is not for training, it is left out of its batch instead.
    On a GPU, batches are made on streams of their own, which allocate memory at any time: a CUDA graph that is recorded
    while they do must be recorded with `capture_error_mode="thread_local"`.

    Args:
        source: Where the files and labels are.
        device: Where batches are wanted. On a GPU, its own decoder decodes.
        image_size: Side in pixels.
        crop: What is seen of an image.
        num_threads: That read files, and decode those of the CPU; if not given, as many as there are cores, and at
            most `MOST_READERS` where a GPU decodes.
        ahead: Batches at most, and at least 1, that are made or wait, without the one that was taken last.
        most_bad: How many files may be no images.
        num_files: Of how many, for messages; if not given, those of `source`.
    """

    def __init__(
        self,
        source: EncodedImages,
        *,
        device: torch.device,
        image_size: int,
        crop: Crop | None = None,
        num_threads: int | None = None,
        ahead: int = PRODUCERS + 2,
        most_bad: int = 0,
        num_files: int | None = None,
    ) -> None:
        self.source = source
        self.device = device
        self.image_size = image_size
        self.crop = crop or Crop()
        self.num_threads = num_threads or choose_threads(os.cpu_count() or 1, device)
        self.ahead = ahead
        self.most_bad = most_bad
        self.num_files = len(source) if num_files is None else num_files
        self._problems: dict[int, Problem] = {}
        self._streams = _streams_of(device)

    @property
    def num_bad(self) -> int:
        """Files so far that are no images."""
        return len(self._problems)

    @property
    def bad_files(self) -> list[str]:
        """Their names and what is wrong with each, in the order of the source."""
        return self._name(self._problems)

    def batches(self, rows_KB: Tensor, draws_KBD: Tensor | None) -> Generator[tuple[Tensor, Tensor], None, None]:
        """For each row of `rows_KB`, in order: images uint8 `(B, 3, s, s)` and labels `(B,)` int64, on the device.

        Without draws, `B` is less by the files that are no images, and may be 0.

        Closing the iterator ends its threads.

        Args:
            rows_KB: int64 on the CPU: which images of the source.
            draws_KBD: `(K, B, NUM_CROP_DRAWS)` on the CPU, uniform in [0, 1): the part that is seen. Without it, the
                middle.

        Raises:
            UserError: If more than `most_bad` files are no images, or all of one batch for which there are draws.
        """
        readers = ThreadPoolExecutor(self.num_threads, "feed-reader")
        producers = ThreadPoolExecutor(PRODUCERS, "feed-producer")
        made: deque[Future[_Made]] = deque()
        waiting = iter(range(len(rows_KB)))
        try:
            while True:
                for batch in itertools.islice(waiting, self.ahead - len(made)):
                    draws_BD = None if draws_KBD is None else draws_KBD[batch]
                    made.append(producers.submit(self._make, rows_KB[batch], draws_BD, readers))
                if not made:
                    return
                yield self._take(made.popleft().result())
        finally:
            producers.shutdown(cancel_futures=True)
            readers.shutdown()

    def _take(self, made: _Made) -> tuple[Tensor, Tensor]:
        """A batch for the stream of who asks for it."""
        self._count(made.problems)
        if made.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(made.ready)
            # Their memory was given to the producer's stream, which may have it back only after this one's work.
            made.images.record_stream(stream)
            made.labels.record_stream(stream)
        return made.images, made.labels

    def _make(self, rows_B: Tensor, draws_BD: Tensor | None, readers: ThreadPoolExecutor) -> _Made:
        if self.device.type != "cuda":
            return self._cut(rows_B, draws_BD, readers)
        stream = self._streams.get()
        try:
            # torchvision's decoder writes into memory that this stream's last batch left, and does not wait for it.
            stream.synchronize()
            with torch.cuda.stream(stream):
                return self._cut(rows_B, draws_BD, readers)._replace(ready=stream.record_event())
        finally:
            self._streams.put(stream)

    def _cut(self, rows_B: Tensor, draws_BD: Tensor | None, readers: ThreadPoolExecutor) -> _Made:
        images, found = self._decode(rows_B, readers)
        problems = {int(rows_B[place]): problem for place, problem in found.items()}
        good = np.setdiff1d(np.arange(len(images)), [*found])
        if not len(good) and draws_BD is None:
            nothing = torch.zeros(0, 3, self.image_size, self.image_size, dtype=torch.uint8, device=self.device)
            return _Made(nothing, self.source.labels[:0].to(self.device), problems, ready=None)
        if not len(good):
            raise UserError(f"no file of a batch of {len(rows_B)} is an image: {list_some(self._name(problems))}")
        used = torch.from_numpy(good if draws_BD is None else _next_good(good, len(images)))
        seen = images.take(used)
        boxes, flips = self._choose_parts(seen.sizes_B2, draws_BD)
        cut = self._resample(seen, boxes, flips, readers)
        labels = self.source.labels[rows_B[used]]
        if self.device.type == "cuda":  # of other memory a copy makes the host wait for all that came before it
            labels = labels.pin_memory()
        return _Made(cut.to(self.device), labels.to(self.device, non_blocking=True), problems, ready=None)

    def _choose_parts(self, sizes: Tensor, draws_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """A box of every image, and whether it is mirrored."""
        if draws_BD is None:
            return centre_boxes(sizes, self.crop.centre), torch.zeros(len(sizes), dtype=torch.bool)
        draws_of_boxes = draws_BD[:, :NUM_BOX_DRAWS]
        boxes = random_boxes(draws_of_boxes, sizes, scale=self.crop.scale, ratio=self.crop.ratio)
        return boxes, draws_BD[:, NUM_BOX_DRAWS] < self.crop.flip

    def _decode(self, rows_B: Tensor, readers: ThreadPoolExecutor) -> tuple[DecodedImages, dict[int, Problem]]:
        """All of a batch together by the GPU, or by the threads, each what it has read; problems by their places."""
        if self.device.type == "cuda":
            return decode_on_gpu(self.source.files(rows_B.tolist(), readers), self.device)
        decoded = [*itertools.chain.from_iterable(readers.map(self._decode_on_cpu, in_chunks(rows_B.tolist())))]
        images = {place: image for place, image in enumerate(decoded) if isinstance(image, Tensor)}
        problems = {place: problem for place, problem in enumerate(decoded) if isinstance(problem, Problem)}
        return DecodedImages.none(len(decoded)).put(images), problems

    def _decode_on_cpu(self, rows: Sequence[int]) -> list[Tensor | Problem]:
        return decode(self.source.read(rows))

    def _resample(self, images: DecodedImages, boxes: Tensor, flips: Tensor, readers: ThreadPoolExecutor) -> Tensor:
        if images.device.type != "cpu":
            return resample(images, boxes, flips, self.image_size)
        chunks = [images.take(slice(start, start + FILES_AT_ONCE)) for start in range(0, len(images), FILES_AT_ONCE)]
        parts = chunks, boxes.split(FILES_AT_ONCE), flips.split(FILES_AT_ONCE)
        batch = [part.numpy() for part in readers.map(resample, *parts, itertools.repeat(self.image_size))]
        return torch.from_numpy(np.concatenate(batch))

    def _count(self, problems: dict[int, Problem]) -> None:
        """Name those that are new.

        Raises:
            UserError: If there are too many.
        """
        new = {row: problem for row, problem in problems.items() if row not in self._problems}
        self._problems |= new
        if self.num_bad > self.most_bad:
            too_many = tell_too_many(self.bad_files, self.most_bad, self.num_files)
            raise UserError(
                f"{too_many}; with other files training begins anew, with more allowed resume=true goes on where a "
                "state is saved"
            )
        for told in self._name(new):
            if told not in self.source.unreadable:  # another feed may have met it
                self.source.unreadable.add(told)
                logger.warning("An image file cannot be read and is left out: %s", told)

    def _name(self, problems: dict[int, Problem]) -> list[str]:
        return [f"{self.source.name(row)}: {problem.reason}" for row, problem in sorted(problems.items())]


def tell_too_many(bad_files: Sequence[str], most_bad: int, num_files: int) -> str:
    """What is wrong where more files cannot be read than may be so of all `num_files`, and what to do."""
    return (
        f"at least {count_of(len(bad_files), 'image file')} cannot be read, where {most_bad:,} of all {num_files:,} "
        f"may be so: replace or remove them, or allow more with a larger imagenet.max_bad ({list_some(bad_files)})"
    )


@functools.cache
def _streams_of(device: torch.device) -> "queue.SimpleQueue[torch.cuda.Stream]":
    """For the producers of all feeds of a GPU: memory that one stream has freed serves no other."""
    streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
    for _ in range(PRODUCERS if device.type == "cuda" else 0):
        streams.put(torch.cuda.Stream(device, priority=-1))  # little work that much waits for
    return streams


def choose_threads(num_cores: int, device: torch.device) -> int:
    """How many threads read, and decode where no GPU does, if as many cores may be used."""
    return min(num_cores, MOST_READERS) if device.type == "cuda" else num_cores


def _next_good(good: NDArray[np.int64], num_places: int) -> NDArray[np.int64]:
    """For every place the next one that is good, itself if it is; behind the last one follows the first."""
    after = np.searchsorted(good, np.arange(num_places))
    return good[after % len(good)]
