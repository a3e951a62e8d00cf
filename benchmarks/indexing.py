"""How long a tree of ImageNet's size takes to index, and how much memory: none of its files is opened.

    python benchmarks/indexing.py [--images 1281167] [--val-images 50000] [--folder /tmp]

The tree is ILSVRC's (a folder for each of 1,000 classes, one for all validation images, LOC_val_solution.csv), made in
a temporary folder of as many names of a few files (hard links), and removed in the end. It is indexed twice, each time
in a process of its own: first with the system's cache of names and sizes dropped where this user may (root on Linux),
then with it warm.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from collective_pipeline.data.image_index import index_images
from collective_pipeline.data.jpeg import encode
from conditions import describe

NUM_CLASSES = 1000
LINKS_OF_A_FILE = 50_000  # ext4 has at most 65,000
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167, help="of training")
    parser.add_argument("--val-images", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="where the tree is made; the system's temporary one if not given")
    parser.add_argument("--index", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.index:
        tell_one(options.index)
        return
    print(describe(torch.device("cpu")))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        started = time.perf_counter()
        make_tree(Path(scratch), options.images, options.val_images)
        num_files = options.images + options.val_images
        print(f"{num_files:,} files are made in {time.perf_counter() - started:.0f} s", flush=True)
        print(f"\n{'cache':>8}{'files':>12}{'seconds':>10}{'files/s':>10}{'peak MB':>10}{'before MB':>11}", flush=True)
        dropped = drop_caches()
        for name in ("dropped" if dropped else "as left", "warm"):
            print(f"{name:>8}", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--index", scratch], check=True)


def make_tree(root: Path, num_train: int, num_val: int) -> None:
    """Names of a few images of different sizes."""
    files = root / "files"
    files.mkdir()
    links = _links(files)
    data = root / "Data" / "CLS-LOC"
    names = [f"n{10_000_000 + 17 * number}" for number in range(NUM_CLASSES)]
    for number, name in enumerate(names):
        folder = data / "train" / name
        folder.mkdir(parents=True)
        for image in range(number, num_train, NUM_CLASSES):
            (folder / f"{name}_{image}.JPEG").hardlink_to(next(links))
    (data / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for image in range(num_val):
        name = f"ILSVRC2012_val_{image + 1:08}"
        (data / "val" / f"{name}.JPEG").hardlink_to(next(links))
        lines.append(f"{name},{names[image % NUM_CLASSES]} 0 0 8 8 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    shutil.rmtree(files)


def _links(folder: Path) -> Iterator[Path]:
    """Every file for as many names as it may have."""
    number = 0
    while True:
        file = folder / str(number)
        file.write_bytes(encode(torch.full((3, 8, 8 + number % 64), number % 256, dtype=torch.uint8), 90))
        for _ in range(LINKS_OF_A_FILE):
            yield file
        number += 1


def drop_caches() -> bool:
    """Let the system forget names and sizes, if this user may."""
    subprocess.run(["sync"], check=True)
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def tell_one(root: Path) -> None:
    """The row of a table: seconds to index, and the memory of this process at its highest and before."""
    before = _peak_megabytes()
    started = time.perf_counter()
    index = index_images(root)
    seconds = time.perf_counter() - started
    digest_started = time.perf_counter()
    assert index.digest
    num = len(index.table)
    print(
        f"{num:>12,}{seconds:>10.1f}{num / seconds:>10,.0f}{_peak_megabytes():>10,.0f}{before:>11,.0f}   "
        f"(its digest: {time.perf_counter() - digest_started:.1f} s)",
        flush=True,
    )


def _peak_megabytes() -> float:
    """Of this process; the system counts in KB, on a Mac in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
