"""Images that are too many for the device's memory: read and decoded while it trains.

What a batch holds does not depend on who reads it: an epoch is cut into batches for the ranks that training was planned
for, and each process takes those of one rank, of several, or a part of one.

Suffixes: A batches of an update, B images of a batch, K batches of an epoch, N planned ranks, T images of an epoch, D
draws of an image.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from collective_pipeline.config import (
    AugmentationConfig,
    ImageNetConfig,
    ImageSpec,
    Stage,
    TrainingConfig,
    UserError,
    count_of,
    list_some,
)
from collective_pipeline.data.augment import (
    NUM_COLOUR_DRAWS,
    NUM_CUTOUT_DRAWS,
    NUM_MIX_DRAWS,
    NUM_MOVE_DRAWS,
    colour_jitter,
    cut_out,
    draw_mix,
    mix,
    shift_scale_rotate,
)
from collective_pipeline.data.batches import Labels, MixedLabels, Normalise
from collective_pipeline.data.feeding import NUM_CROP_DRAWS, Crop, Feed, tell_too_many
from collective_pipeline.data.image_index import ImageIndex
from collective_pipeline.data.packed import EncodedImages, FileImages, PackedImages
from collective_pipeline.data.splits import choose_val
from collective_pipeline.randomness import make_generator

CPU = torch.device("cpu")
# Of ImageNet's training images, as everyone has them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's.

    Attributes:
        rank: Of this process, from 0.
        number: Of processes.
        planned: How many ranks training was planned for, and cut into batches for.
    """

    rank: int = 0
    number: int = 1
    planned: int = 1

    def __post_init__(self) -> None:
        if self.planned % self.number and self.number % self.planned:
            raise UserError(
                f"training was begun on {self.planned} GPUs and {self.number} are neither a part nor a multiple of "
                f"them: go on with num_gpus={self.planned}, with 1, or with {2 * self.planned}"
            )

    @property
    def ranks_played(self) -> int:
        """Planned ranks that this process stands for."""
        return max(1, self.planned // self.number)

    @property
    def parts(self) -> int:
        """Processes that share the batch of one planned rank."""
        return max(1, self.number // self.planned)

    def cut(self, batches_KNB: Tensor) -> Tensor:
        """This process's part of what is laid out for the planned ranks, `(K * ranks_played, B / parts, ...)`."""
        if self.parts > 1:
            size = batches_KNB.shape[2] // self.parts
            start = self.rank % self.parts * size
            return batches_KNB[:, self.rank // self.parts, start : start + size]
        first = self.rank * self.ranks_played
        return batches_KNB[:, first : first + self.ranks_played].flatten(0, 1)


@dataclass(frozen=True)
class StreamedImages:
    """Some of a source's images.

    Attributes:
        source: Files, or a packed copy of them.
        rows: Which of its images, `(n,)`.
        image_size: Pixels of a side at which they are wanted.
        crop: What is seen of an image.
        device: Where.
        threads: That read and decode.
        most_bad: How many of its files may be unreadable.
        num_files: Of all parts, among which `most_bad` may be; None: those of the source.
        share: Whose part of them this process evaluates.
    """

    source: EncodedImages
    rows: Tensor
    image_size: int
    crop: Crop
    device: torch.device = CPU
    threads: int | None = None
    most_bad: int = 0
    num_files: int | None = None
    share: Share = Share()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        """Of all of them, `(n,)`."""
        return self.source.labels[self.rows]

    @property
    def is_resident(self) -> bool:
        return False

    def to(self, device: torch.device) -> Self:
        """Wanted on this device."""
        return replace(self, device=device)

    def examples(self, number: int) -> Tensor:
        """The first ones, uint8 `(number, 3, H, W)`."""
        (images, _), *_ = self.make_feed().batches(self.rows[None, :number], None)
        return images

    def for_stage(self, stage: Stage) -> Self:
        """At the stage's size."""
        return replace(self, image_size=stage.image_size or self.image_size)

    def make_feed(self) -> Feed:
        """What reads and decodes them."""
        return Feed(
            self.source,
            device=self.device,
            image_size=self.image_size,
            crop=self.crop,
            num_threads=self.threads,
            most_bad=self.most_bad,
            num_files=self.num_files,
        )

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The middle of every image of this process's part with its label, `size` at a time."""
        own = self.rows[self.share.rank :: self.share.number]
        feed, whole = self.make_feed(), len(own) // size * size
        for rows in (own[:whole].view(-1, size), own[whole:].unsqueeze(0)):
            if rows.numel():
                yield from feed.batches(rows, None)


@dataclass(frozen=True)
class StreamedSplits:
    """What `splits.Splits` is for images that are read while they are needed.

    Attributes:
        digest: Of everything that decides which images these are.
        augmentation: Of the training images.
        found: What was known of the files before they were read, in words by what it is about.
    """

    name: str
    train: StreamedImages
    val: StreamedImages
    test: StreamedImages
    class_names: tuple[str, ...]
    digest: str
    augmentation: AugmentationConfig
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    found: Mapping[str, str] = field(default_factory=dict)

    @property
    def unreadable(self) -> set[str]:
        """Files of all parts that could not be read so far, by name and reason."""
        return self.train.source.unreadable | self.val.source.unreadable | self.test.source.unreadable

    def note_unreadable(self, files: set[str]) -> None:
        """Add files that any process could not read; of which part they are does not matter."""
        self.train.source.unreadable.update(files)

    def describe_files(self) -> dict[str, str]:
        """What is known of the files by now, in words by what it is about."""
        files = sorted(self.unreadable)
        met = f"{len(files):,} met by this run or left out of its packed copy: {list_some(files)}"
        return {**self.found, "unreadable files": met if files else "none met by this run"}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """At which a network is evaluated."""
        return 3, self.test.image_size, self.test.image_size

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_spec(self) -> ImageSpec:
        """What a trained network must be given again, beside its weights."""
        return ImageSpec(
            shape=self.image_shape,
            mean=self.mean,
            std=self.std,
            class_names=self.class_names,
            centre=self.test.crop.centre,
        )

    def to(self, device: torch.device) -> Self:
        """Wanted on this device."""
        return self._with(device=device)

    def for_share(self, share: Share) -> Self:
        """As one of several processes sees them."""
        return self._with(share=share)

    def with_threads(self, threads: int) -> Self:
        """Read and decoded by so many."""
        return self._with(threads=threads)

    def _with(self, **changes: Any) -> Self:
        parts = {name: replace(getattr(self, name), **changes) for name in ("train", "val", "test")}
        return replace(self, **parts)


def stream_index(
    index: ImageIndex, config: ImageNetConfig, *, split_seed: int, packed: tuple[Path, Path] | None = None
) -> StreamedSplits:
    """The images of an index: a part of its training images for validation, its own validation part as the test.

    Args:
        index: Of the files.
        config: How they are seen.
        split_seed: Which of the training images are for validation.
        packed: Folders of packed copies of the two parts, or of more images, if those are to be read.

    Raises:
        UserError: If so many files of a part are empty that reading them would end the run; or as `choose_val` and
            `PackedImages.open`.
    """
    train, test = (
        files if folder is None else PackedImages.open(folder, files.paths)
        for files, folder in zip(
            (list_files(index, part) for part in ("train", "val")), packed or (None, None), strict=True
        )
    )
    is_val = choose_val(train.labels, index.class_names, fraction=config.val_fraction, seed=split_seed, name="imagenet")
    crop = Crop(scale=config.augmentation.crop_area)

    num_files = len(index.table)
    most_bad = int(config.max_bad * num_files)

    def images(source: EncodedImages, rows: Tensor) -> StreamedImages:
        if isinstance(source, FileImages):
            where = rows.numpy()[source.num_bytes[rows.numpy()] == 0]
            empty = [f"{source.name(row)}: it is empty" for row in where]
            if len(empty) > most_bad:
                raise UserError(tell_too_many(empty, most_bad, num_files))
        return StreamedImages(
            source, rows, config.image_size, crop, threads=config.threads, most_bad=most_bad, num_files=num_files
        )

    rows = torch.arange(len(train))
    return StreamedSplits(
        "imagenet",
        images(train, rows[~is_val]),
        images(train, rows[is_val]),
        images(test, torch.arange(len(test))),
        index.class_names,
        f"files {index.digest}, split_seed {split_seed}, val_fraction {config.val_fraction:g}"
        + (f", pack_side {config.pack_side}, pack_quality {config.pack_quality}" if packed else ", not packed"),
        config.augmentation,
        found={
            "files": f"{index.root} ({index.layout})",
            "labels": "; ".join(f"{part}: {source}" for part, source in index.label_sources.items()),
            **{f"problems of {part}": "; ".join(problems) or "none" for part, problems in index.problems.items()},
        },
    )


def list_files(index: ImageIndex, part: str) -> FileImages:
    """The files of a part of an index, as they are."""
    rows = index.rows_of(part)
    labels, sizes = (rows[name].to_numpy() for name in ("label", "num_bytes"))
    return FileImages(index.root, rows["path"].tolist(), torch.tensor(labels), sizes)


MakeFeatures = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class _Places(NamedTuple):
    """Where the batches of an update lie, always at the same addresses, as a CUDA graph needs it."""

    images_AB: Tensor
    labels_AB: Tensor
    draws_ABD: Tensor
    mixes_AD: Tensor


class StreamedBatches:
    """What `batches.Batches` is for images that are read while they are needed, of one seed.

    Order, crops and all other draws of an epoch come from the seed and the number of the epoch alone, for all images,
    whoever reads them. `fuse` may put a faster function in place of what makes features of a batch on the device.
    """

    def __init__(
        self,
        splits: StreamedSplits,
        seeds: Sequence[int],
        config: TrainingConfig,
        stage: Stage | None = None,
        fuse: Callable[[MakeFeatures], MakeFeatures] | None = None,
    ) -> None:
        if len(seeds) != 1:
            raise ValueError("images that are read while they are needed are read for one seed")
        stage = stage or config.plan()[0]
        self.image_size = stage.image_size or splits.image_shape[1]
        self.splits, self.seeds, self.config, self.stage = splits, seeds, config, stage
        self.images = splits.train.for_stage(stage)
        self.share = self.images.share
        self.device = self.images.device
        self.normalise = Normalise(splits.image_spec, self.device, size=(self.image_size, self.image_size))
        self.planned_size = stage.batch_size or config.batch_size
        self.num_planned = len(self.images) // (self.planned_size * self.share.planned)
        if not self.num_planned:
            raise UserError(
                f"{count_of(self.share.planned, 'GPU')} with batches of {self.planned_size} images would need more "
                f"than the {count_of(len(self.images), 'training image')}: choose a smaller "
                "imagenet.training.batch_size"
            )
        if self.planned_size % self.share.parts:
            raise UserError(
                f"batches of {self.planned_size} images cannot be shared by {self.share.parts} GPUs evenly: choose "
                "another training.batch_size or num_gpus"
            )
        self.batch_size = self.planned_size // self.share.parts
        self.ranks_played = self.share.ranks_played
        self.alphas = (config.mixup_alpha * stage.mixing, config.cutmix_alpha * stage.mixing)
        self.fuse = fuse
        self.make_features: MakeFeatures = self._make_features if fuse is None else fuse(self._make_features)
        self._feed = self.images.make_feed()
        self._arriving: Generator[tuple[Tensor, Tensor], None, None] | None = None
        self._drawer = ThreadPoolExecutor(1)
        self._preparing: tuple[int, Future[list[Tensor]]] | None = None

    @cached_property
    def _places(self) -> _Places:
        """Made for the first batch: a plan has all its stages from the start, and one of them at work."""
        number, size = self.config.accumulation_steps * self.ranks_played, self.image_size
        return _Places(
            torch.zeros(number, self.batch_size, 3, size, size, dtype=torch.uint8, device=self.device),
            torch.zeros(number, self.batch_size, dtype=torch.int64, device=self.device),
            torch.zeros(number, self.batch_size, NUM_DRAWS, device=self.device),
            torch.zeros(number, NUM_MIX_DRAWS, device=self.device),
        )

    @property
    def is_resident(self) -> bool:
        return False

    def for_stage(self, stage: Stage | None) -> Self:
        """The same images in batches as this stage has them; None: these."""
        return self if stage is None else type(self)(self.splits, self.seeds, self.config, stage, self.fuse)

    def __len__(self) -> int:
        """Batches of an epoch for this process."""
        return self.num_planned * self.ranks_played

    def prepare(self, epoch: int) -> None:
        """Begin to draw for an epoch beside what the device does."""
        if self._preparing is None:
            self._preparing = epoch, self._drawer.submit(self._draw, epoch)

    def begin(self, epoch: int) -> None:
        """From here on batches are of this epoch; epochs count from 1."""
        prepared, self._preparing = self._preparing, None
        drawn = prepared[1].result() if prepared is not None and prepared[0] == epoch else self._draw(epoch)
        self.rows_KB, self.crops_KBD, self.draws_KBD, self.mixes_KD = drawn
        self._arriving = None

    def close(self) -> None:
        """End the threads that read ahead."""
        self._drawer.shutdown(cancel_futures=True)
        if self._arriving is not None:
            self._arriving.close()
            self._arriving = None

    def _draw(self, epoch: int) -> list[Tensor]:
        """This process's rows, the draws of each image for its crop and for what follows, and those of each batch."""
        seed, planned = self.seeds[0], (self.num_planned, self.share.planned, self.planned_size)
        num_used = math.prod(planned)
        order_T = torch.randperm(len(self.images), generator=make_generator(seed, f"order/{epoch}"))[:num_used]
        drawn = torch.rand(
            num_used, NUM_CROP_DRAWS + NUM_DRAWS, generator=make_generator(seed, f"augmentation/{epoch}")
        )
        mixes = draw_mix(
            make_generator(seed, f"mixing/{epoch}"),
            self.num_planned * self.share.planned,
            mixup_alpha=self.alphas[0],
            cutmix_alpha=self.alphas[1],
        )
        # Those who share a batch mix it alike.
        mixes_KNBD = mixes.unflatten(0, planned[:2]).unsqueeze(2).expand(-1, -1, self.planned_size, -1)
        rows_KB = self.share.cut(self.images.rows[order_T].view(planned))
        crops_KBD, draws_KBD = self.share.cut(drawn.unflatten(0, planned)).split([NUM_CROP_DRAWS, NUM_DRAWS], dim=-1)
        for_device = [draws_KBD.contiguous(), self.share.cut(mixes_KNBD)[:, 0].contiguous()]
        if self.device.type == "cuda":  # from other memory a copy would make the host wait for the update before
            for_device = [tensor.pin_memory() for tensor in for_device]
        return [rows_KB, crops_KBD, *for_device]

    def load(self, first: int, number: int) -> None:
        """Wait for these batches of the epoch, counted from 0, and put them where `take` finds them."""
        if self._arriving is None:
            self._arriving = self._feed.batches(self.rows_KB[first:], self.crops_KBD[first:])
        places = self._places
        for i in range(number):
            images, labels = next(self._arriving)
            places.images_AB[i].copy_(images)
            places.labels_AB[i].copy_(labels)
        here = slice(first, first + number)
        places.draws_ABD[:number].copy_(self.draws_KBD[here], non_blocking=True)
        places.mixes_AD[:number].copy_(self.mixes_KD[here], non_blocking=True)

    def take(self, step: Tensor) -> tuple[Tensor, Labels]:
        """Features `(1, B, I)` and labels `(1, B)` of the batch at `step`, an int64 tensor of one element."""
        places = self._places
        place = step % len(places.images_AB)
        images_1BCHW, labels_1B, draws_1BD = (
            tensor.index_select(0, place) for tensor in (places.images_AB, places.labels_AB, places.draws_ABD)
        )
        mixes_1D = places.mixes_AD.index_select(0, place)
        x_1BI, *mixed = self.make_features(images_1BCHW[0], labels_1B, draws_1BD[0], mixes_1D)
        return x_1BI, MixedLabels(labels_1B, *mixed) if mixed else labels_1B

    def _make_features(
        self, images_BCHW: Tensor, labels_1B: Tensor, draws_BD: Tensor, mixes_1D: Tensor
    ) -> tuple[Tensor, ...]:
        """Bytes to features `(1, B, I)`; of images that are mixed also the others' labels and the shares."""
        x_1BCHW = self._augment(images_BCHW.float(), draws_BD).unsqueeze(0)
        if not any(self.alphas):
            return (x_1BCHW.flatten(2),)
        mixed = mix(x_1BCHW, labels_1B, mixes_1D)
        return mixed.images.flatten(2), mixed.other_labels, mixed.share

    def _augment(self, images: Tensor, draws_BD: Tensor) -> Tensor:
        """Pixels `(B, C, H, W)` in 0..255 to features of the same shape."""
        own = self.splits.augmentation
        colour, move, cut = draws_BD.split([NUM_COLOUR_DRAWS, NUM_MOVE_DRAWS, NUM_CUTOUT_DRAWS], dim=1)
        if own.colour_probability:
            images = 255 * colour_jitter(
                images / 255,
                colour,
                brightness=own.brightness,
                contrast=own.contrast,
                saturation=own.saturation,
                hue=own.hue,
                probability=own.colour_probability,
            )
        if own.move_probability:
            images = shift_scale_rotate(
                images, move, shift=own.shift, scale=own.zoom, degrees=own.degrees, probability=own.move_probability
            )
        features: Tensor = self.normalise(images).view(images.shape)
        if own.cutout_probability:
            side = round(own.cutout * images.shape[-1])
            features = cut_out(features, cut, side, probability=own.cutout_probability)
        return features


# Of an image, behind those of its crop.
NUM_DRAWS = NUM_COLOUR_DRAWS + NUM_MOVE_DRAWS + NUM_CUTOUT_DRAWS
