"""How many images a second come from JPEG files to the device, and what of a network's speed is left when they do.

    python benchmarks/feeding.py [--folder data/ilsvrc] [--images 20000] [--image-sizes 224 128 64] [--sides 256 400]
    python benchmarks/feeding.py --train resnet50 [--steps 200] [--no-alone] [--augment]
    python benchmarks/feeding.py --train resnet50 --blur [--steps 100] [--image-sizes 224]
    torchrun --standalone --nproc-per-node 4 benchmarks/feeding.py --train resnet50 --no-alone

The files are those of `--folder` and below, repeated as often as it takes, or 300 made of noise, of 110 KB and 400 x
500 pixels; the packed ones are made of them first. Decoding alone is of whole images, the feed crops them at random.
With `--train` that network trains as `imagenet` in conf/base says, compiled and in bfloat16 on a GPU, one epoch on a
batch that lies ready, again and again, one on what the feed gives, and so on in turn: a ratio is to the mean of the
ready ones before and after it. `--augment` adds all other augmentations, as the environment imagenet_seed_90 has them.
`--blur` asks something else: how much longer an epoch on ready batches takes where the network has blur, against the
mean of one without before and after it.
Processes that torchrun starts train one network together, and the speeds of training are of all of them.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from collective_pipeline.config import AugmentationConfig, ImageNetConfig, Stage
from collective_pipeline.data.decoding import list_image_files
from collective_pipeline.data.feeding import NUM_CROP_DRAWS, PRODUCERS, Crop, Feed, choose_threads
from collective_pipeline.data.jpeg import Files, decode, decode_on_gpu, encode
from collective_pipeline.data.packed import EncodedImages, FileImages, PackedImages, claim_folder, pack_images
from collective_pipeline.data.streaming import Share, StreamedBatches, StreamedImages, StreamedSplits
from collective_pipeline.pipelines.imagenet.nodes import make_arm
from collective_pipeline.training.launch import count_own_cores, is_launched
from collective_pipeline.training.rank import own_device
from collective_pipeline.training.ranks import ALONE, Ranks
from collective_pipeline.training.runtime import choose_device
from collective_pipeline.training.train import train_arm
from conditions import describe, make_parser

NUM_CLASSES = 1000
NUM_WARM_UP = 10  # steps that are not timed
FULL = AugmentationConfig(colour_probability=0.3, move_probability=0.5, cutout_probability=0.5)
Batch = tuple[Tensor, Tensor]


def main() -> None:
    """Print the tables."""
    options = parse()
    if options.blur and not options.train:
        sys.exit("--blur is of a network that trains: give --train resnet50 as well")
    device = choose_device(options.device)
    if not is_launched():
        measure(options, device, ALONE)
        return
    if (options.alone and not options.blur) or not options.train:
        sys.exit("under torchrun a network trains, and nothing is fed alone: give --train and --no-alone")
    options.threads = options.threads or choose_threads(count_own_cores(), device)
    ranks, device = Ranks.join(), own_device(device.type)
    with contextlib.redirect_stdout(sys.stdout if ranks.is_first else None):
        measure(options, device, ranks)
    ranks.leave()


def measure(options: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """What is asked for, on this process's device."""
    print(describe(device))
    with tempfile.TemporaryDirectory() as scratch:
        files = find_files(options.folder or make_files(Path(scratch) / "files"))
        if options.blur:
            tell_blur(files, options, device, ranks)
            return
        sources: dict[str, EncodedImages] = {"as they are": files}
        first = FileImages(files.root, files.paths[:1], files.labels[:1])
        pack_images(claim_folder(first, Path(scratch) / "warm up", side=32))
        for side in options.sides:
            started = time.perf_counter()
            pack_images(claim_folder(files, Path(scratch) / str(side), side=side))
            print(f"packed at {side} pixels: {len(files) / (time.perf_counter() - started):,.0f} images/s")
            sources[f"packed at {side}"] = PackedImages.open(Path(scratch) / str(side))
        if options.alone:
            tell_alone(sources, options, device)
        if options.train:
            tell_training(sources, options, device, ranks)


def parse() -> argparse.Namespace:
    """What is asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="of image files; made of noise if not given")
    parser.add_argument("--images", type=int, default=2000, help="that are timed")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224, 128, 64])
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 400], help="of the packed images")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, help="that read and, on the CPU, decode")
    parser.add_argument("--ahead", type=int, default=PRODUCERS + 2)
    parser.add_argument("--alone", action=argparse.BooleanOptionalAction, default=True, help="feed without a network")
    parser.add_argument("--train", help="a network: resnet50")
    parser.add_argument("--augment", action="store_true", help="while training: colour, shift, cutout, MixUp, CutMix")
    parser.add_argument("--blur", action="store_true", help="instead, what blur costs; of --image-sizes and --steps")
    parser.add_argument("--steps", type=int, default=100, help="of training that are timed")
    return parser.parse_args()


def make_files(folder: Path, num_images: int = 300) -> Path:
    """Photographs they are not, but they cost as much to decode."""
    folder.mkdir()
    for number in range(num_images):
        rng = np.random.default_rng(number)
        coarse = torch.tensor(rng.uniform(0, 255, (1, 3, 8, 10)))
        image = F.interpolate(coarse, (400, 500), mode="bicubic")[0] + torch.tensor(rng.normal(0, 20, (3, 400, 500)))
        (folder / f"{number}.jpeg").write_bytes(encode(image.clamp(0, 255).to(torch.uint8), 90))
    return folder


def find_files(folder: Path) -> FileImages:
    """All images there, with labels that mean nothing."""
    paths = [file.relative_to(folder).as_posix() for file in list_image_files(folder)]
    return FileImages(folder, paths, torch.arange(len(paths)) % NUM_CLASSES)


def tell_alone(sources: dict[str, EncodedImages], options: argparse.Namespace, device: torch.device) -> None:
    """Images a second without a network."""
    sizes = "".join(f"{f'{size} px':>10}" for size in options.image_sizes)
    print(f"\n{'images/s':>16}{'KB a file':>11}{'decoding':>10}{sizes}")
    for name, source in sources.items():
        decoding = time_decoding(source, options, device)
        kilobytes = sum(map(len, source.read(range(len(source))))) / len(source) / 1000  # type: ignore[arg-type]
        speeds = []
        for size in options.image_sizes:
            num_batches = NUM_WARM_UP + -(-options.images // options.batch_size)
            seconds, num_images = time_batches(feed(source, size, options, num_batches), device)
            speeds.append(num_images / seconds)
        row = "".join(f"{speed:>10,.0f}" for speed in speeds)
        print(f"{name:>16}{kilobytes:>11.0f}{decoding:>10,.0f}{row}", flush=True)


def time_decoding(source: EncodedImages, options: argparse.Namespace, device: torch.device) -> float:
    """Images a second, by as many threads as the feed has: in lists of a batch on the GPU, of a few on the CPU.

    The files are in memory.
    """
    is_gpu = device.type == "cuda"
    size = options.batch_size if is_gpu else 8
    rows = torch.arange(max(options.images, 2 * PRODUCERS * size)) % len(source)
    with ThreadPoolExecutor(options.threads) as readers:
        read: Callable[[list[int]], Any] = partial(source.files, readers=readers) if is_gpu else source.read
        lists = [read(some.tolist()) for some in rows.split(size)]
    streams = [torch.cuda.Stream(device) for _ in range(PRODUCERS)] if is_gpu else []

    def work(number: int, lists: Sequence[Any]) -> None:
        for files in lists[number::PRODUCERS]:
            with torch.cuda.stream(streams[number]):
                decode_on_gpu(files, device)
                streams[number].synchronize()  # torchvision's decoder wants memory at rest

    def run(pool: ThreadPoolExecutor, lists: Sequence[Any]) -> None:
        for _ in pool.map(work, range(PRODUCERS), repeat(lists)) if is_gpu else pool.map(decode, lists):
            pass

    with ThreadPoolExecutor(PRODUCERS if is_gpu else options.threads) as pool:
        run(pool, lists[: 2 * PRODUCERS])
        started = time.perf_counter()
        run(pool, lists)
    return len(rows) / (time.perf_counter() - started)


def feed(source: EncodedImages, size: int, options: argparse.Namespace, num_batches: int) -> Iterator[Batch]:
    """So many batches in random order, with random parts."""
    generator = torch.Generator().manual_seed(0)
    shape = num_batches, options.batch_size
    rows_KB = torch.randint(len(source), shape, generator=generator)
    draws_KBD = torch.rand(*shape, NUM_CROP_DRAWS, generator=generator)
    one = Feed(
        source,
        device=choose_device(options.device),
        image_size=size,
        num_threads=options.threads,
        ahead=options.ahead,
        most_bad=len(source) // 100,
    )
    return one.batches(rows_KB, draws_KBD)


def time_batches(batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """Seconds until all batches but the first ones have come, and the number of their images."""
    num_images, started = 0, 0.0
    for step, batch in enumerate(batches, start=1):
        if step == NUM_WARM_UP:
            synchronise(device)
            started = time.perf_counter()
        elif step > NUM_WARM_UP:
            num_images += len(batch[1])
    synchronise(device)
    return time.perf_counter() - started, num_images


@dataclass
class Sources:
    """One after another the files, the packed copies, and batches that lie ready, in the epochs of one training."""

    named: dict[str, EncodedImages | None]  # in the order of their epochs; None: what the batch before has left
    device: torch.device
    batch_size: int  # of all processes
    speeds: list[float] = field(default_factory=list)
    number: int = -1

    @property
    def now(self) -> EncodedImages | None:
        """What this epoch's images are from."""
        return list(self.named.values())[self.number]

    @property
    def first(self) -> EncodedImages:
        return next(source for source in self.named.values() if source is not None)

    @property
    def labels(self) -> Tensor:
        return self.first.labels

    @property
    def unreadable(self) -> set[str]:
        return self.first.unreadable

    def __len__(self) -> int:
        return len(self.first)

    def name(self, row: int) -> str:
        return self.first.name(row)

    def read(self, rows: Sequence[int]) -> Sequence[Any]:
        """Where batches lie ready those of validation, which is not timed."""
        return (self.now or self.first).read(rows)

    def files(self, rows: Sequence[int], readers: Executor) -> Files:
        return (self.now or self.first).files(rows, readers)

    def watch(self, stops: Iterable[int]) -> Iterator[int]:
        """Around the updates of an epoch, which it times."""
        self.number += 1
        *_, last = stops = list(stops)
        for stop in stops:
            yield stop
            if stop == NUM_WARM_UP:
                synchronise(self.device)
                started = time.perf_counter()
        synchronise(self.device)
        self.speeds.append((last - NUM_WARM_UP) * self.batch_size / (time.perf_counter() - started))


def tell_training(
    sources: dict[str, EncodedImages], options: argparse.Namespace, device: torch.device, ranks: Ranks
) -> None:
    """Images a second of a network that trains, and what of its speed on ready batches that is."""
    heads = f"{'pixels':>8}{'ready':>10}{'fed':>10}{'ratio':>8}{'GB, peak':>12}"
    print(f"\n{options.train:>16}{heads}")
    for size in options.image_sizes:
        named: dict[str, EncodedImages | None] = {"warm up": sources["as they are"], "ready 0": None}
        for number, (name, source) in enumerate(sources.items(), start=1):
            named |= {name: source, f"ready {number}": None}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        speeds = time_training(Sources(named, device, ranks.number * options.batch_size), size, options, ranks)
        gigabytes = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else float("nan")
        for number, name in enumerate(sources, start=1):
            ready = (speeds[f"ready {number - 1}"] + speeds[f"ready {number}"]) / 2
            row = f"{name:>16}{size:>8}{ready:>10,.0f}{speeds[name]:>10,.0f}"
            print(f"{row}{speeds[name] / ready:>8.3f}{gigabytes:>12.1f}", flush=True)


def tell_blur(files: EncodedImages, options: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """Images a second on ready batches without blur and with it, and how much longer it takes."""
    print(f"\n{options.train:>16}{'pixels':>8}{'without':>10}{'blur':>10}{'time':>8}")
    for size in options.image_sizes:
        speeds = []
        for blur in (False, True, False):
            named: dict[str, EncodedImages | None] = {"warm up": files, "ready": None}
            sources = Sources(named, device, ranks.number * options.batch_size)
            speeds.append(time_training(sources, size, options, ranks, blur=blur)["ready"])
        without = 2 / (1 / speeds[0] + 1 / speeds[2])  # images a second over both times together
        print(f"{'':>16}{size:>8}{without:>10,.3g}{speeds[1]:>10,.3g}{without / speeds[1]:>8.3f}", flush=True)


def time_training(
    sources: Sources, size: int, options: argparse.Namespace, ranks: Ranks, *, blur: bool = False
) -> dict[str, float]:
    """Images a second of each epoch, by the project's own loop."""
    settings = ImageNetConfig(
        model=options.train,
        blur=blur,
        augmentation=FULL if options.augment else AugmentationConfig(),
        training=ImageNetConfig().training.model_copy(
            update={
                "epochs": len(sources.named),
                "stages": (Stage(epochs=len(sources.named), image_size=size),),
                "batch_size": options.batch_size,
                "eval_batch_size": options.batch_size,
                "mixup_alpha": 0.2 * options.augment,
                "cutmix_alpha": 1.0 * options.augment,
                "warmup_epochs": 0,
                "precision": "bf16" if sources.device.type == "cuda" else "fp32",
            }
        ),
    )
    number = (NUM_WARM_UP + options.steps) * sources.batch_size
    rows = torch.arange(number) % len(sources)
    images = StreamedImages(sources, rows, size, Crop(), threads=options.threads, most_bad=len(sources) // 100)
    few = replace(images, rows=torch.arange(min(len(sources), sources.batch_size)))
    names = tuple(map(str, range(NUM_CLASSES)))
    splits = StreamedSplits("imagenet", images, few, few, names, "generated", settings.augmentation)
    splits = splits.for_share(Share(ranks.rank, ranks.number, ranks.number))
    load = StreamedBatches.load

    def load_or_not(batches: StreamedBatches, first: int, number: int) -> None:
        if sources.now is not None:
            load(batches, first, number)

    with mock.patch.object(StreamedBatches, "load", load_or_not):
        train_arm(
            make_arm(settings, NUM_CLASSES),
            splits,
            settings.training,
            seeds=[0],
            device=sources.device,
            watch=sources.watch,
            ranks=ranks,
        )
    return dict(zip(sources.named, sources.speeds, strict=True))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
