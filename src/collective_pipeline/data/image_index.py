"""A labelled tree of image files, in whichever of the known layouts, as one table: every file, its label, its size.

A file is not opened here, so that a tree of 1.3 million is listed in a minute; what cannot be decoded shows when it is.
"""

import hashlib
import logging
import os
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from collective_pipeline.config import UserError, count_of, list_some
from collective_pipeline.data.decoding import SUFFIXES
from collective_pipeline.data.image_labels import ANNOTATED, Labels, label_flat_files, read_titles
from collective_pipeline.randomness import make_generator

logger = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"
TITLES = {"ILSVRC": "LOC_synset_mapping.txt", "Tiny-ImageNet": "words.txt"}  # of classes
SECOND_PARTS = ("val", "valid", "validation", "test")
KNOWN_LAYOUTS = (
    "Data/CLS-LOC/train and val as ILSVRC and Kaggle have them, train/<class> and val/<class> (or valid, validation, "
    f"test), or Tiny-ImageNet's train/<class>/images and val/{ANNOTATED}"
)
LINE = 120  # characters, of a console
MAX_UNLABELLED = 0.01  # of a part's files, and of the labels whose files are not there
SHORT = 0.5  # of the median: ImageNet's smallest class has 732 images and most have 1,300
FEW = 0.25  # of the median: plain folders may be unequal, so this is told and not refused
THREADS = 16  # listing waits for the disk, not for a core
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class ImageIndex:
    """Every labelled image file of a tree.

    Attributes:
        root: The folder that paths begin at.
        layout: In words.
        class_names: Sorted by the names of their folders, whose order is that of the labels.
        table: `part` (train or val), `path` from the root, `label`, `num_bytes`; sorted by part, label and path.
        label_sources: Where the labels of each part come from, in words.
        problems: What is wrong with each part without being refused, in sentences.
        subset: How many training images were taken, and the seed that chose them; None: all.
    """

    root: Path
    layout: str
    class_names: tuple[str, ...]
    table: pd.DataFrame
    label_sources: dict[str, str]
    problems: dict[str, tuple[str, ...]]
    subset: tuple[int, int] | None = None

    def rows_of(self, part: str) -> pd.DataFrame:
        """The files of a part."""
        return self.table[self.table["part"] == part]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all paths, labels and sizes."""
        digest = hashlib.sha256("\n".join(self.table["path"]).encode())
        for name in ("label", "num_bytes"):
            digest.update(self.table[name].to_numpy(np.int64).tobytes())
        return digest.hexdigest()

    def describe(self) -> pd.DataFrame:
        """A row for each part: images, classes, where labels come from, problems."""
        return pd.DataFrame(
            {
                "part": part,
                "layout": self.layout,
                "images": len(rows),
                "classes": rows["label"].nunique(),
                "megabytes": round(rows["num_bytes"].sum() / 1e6),
                "labels": self.label_sources[part],
                "problems": "; ".join(self.problems[part]) or "none",
            }
            for part, rows in ((part, self.rows_of(part)) for part in (TRAIN, VAL))
        )

    def tell(self) -> str:
        """The same for a console: below the numbers each problem by itself, in lines broken at spaces alone."""
        lines = [self.describe().drop(columns="problems").to_string(index=False)]
        for part, problems in self.problems.items():
            for problem in problems or ("no problems",):
                told = f"{part}: {problem}"
                lines += textwrap.wrap(
                    told, LINE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
                )
        return "\n".join(lines)


def index_images(root: Path, *, subset_size: int | None = None, subset_seed: int = 0) -> ImageIndex:
    """All images below `root` with their labels.

    Args:
        root: A tree in one of the known layouts, or the folder around it.
        subset_size: Training images, evenly of all classes; a tenth as many for validation. None: all.
        subset_seed: Which.

    Raises:
        UserError: If there is no such tree, if it is half extracted, or if it has no labels.
    """
    index = _index(*_find_tree(root))
    return index if subset_size is None else _take_subset(index, subset_size, subset_seed)


def compare_index(known: ImageIndex, now: ImageIndex) -> str:
    """What is otherwise in a tree than when it was last indexed, in words."""
    before, after = (index.table.set_index("path") for index in (known, now))
    both = before.index.intersection(after.index)
    changed = both[(before.loc[both, "num_bytes"] != after.loc[both, "num_bytes"]).to_numpy()]
    relabelled = both[(before.loc[both, "label"] != after.loc[both, "label"]).to_numpy()]
    found = {
        "missing": before.index.difference(after.index),
        "new": after.index.difference(before.index),
        "of another size": changed,
        "of another label": relabelled,
    }
    told = [f"{len(paths):,} {what} (the first is {paths[0]})" for what, paths in found.items() if len(paths)]
    return ", ".join(told) or "nothing"


@dataclass(frozen=True)
class _Folder:
    """A folder's image files and folders, sorted, and how many files of other kinds lie beside them.

    Where a class's images are in a folder `images`, that one, with those that lie beside it as `loose`.
    """

    path: Path
    names: list[str]
    num_bytes: list[int]
    folders: list[str]
    others: Counter[str]
    loose: list[str] = field(default_factory=list)


def _find_tree(root: Path) -> tuple[Path, str]:
    """The folder that the tree begins at, and its layout."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the one with the images, in the layout {KNOWN_LAYOUTS}")
    inside = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for folder in (root, *inside):
        if (folder / "Data" / "CLS-LOC" / "train").is_dir():
            return folder, "ILSVRC"
        if (folder / "train").is_dir():
            is_tiny = (folder / "val" / ANNOTATED).exists()
            return folder, "Tiny-ImageNet" if is_tiny else "folders"
    names = list_some([entry.name for entry in inside], ", ") or "no folder"
    raise UserError(f"{root} is in no known layout, since it holds {names}: the known ones are {KNOWN_LAYOUTS}")


def _index(root: Path, layout: str) -> ImageIndex:
    base = root / "Data" / "CLS-LOC" if layout == "ILSVRC" else root
    second = next((base / name for name in SECOND_PARTS if _holds_anything(base / name)), None)
    if second is None:
        raise UserError(f"{base} lacks a second part beside train: extract it to {base / 'val'}, or {base / 'test'}")
    around = _list_classes(base / "train")
    classes = around.folders
    titles = read_titles(root, TITLES[layout]) if layout in TITLES else {}
    if titles and layout == "ILSVRC":  # Tiny-ImageNet's are of all words there are
        _check_known(classes, titles, base / "train")
    train = _list_part(base / "train", classes)
    _check_whole(train, base / "train", unequal=layout == "folders")
    labels = {name: label for label, name in enumerate(classes)}
    loose = _tell_loose([*around.names, *_loose_in(train)], around.path, _count(train))
    val, source, problems = _list_second(root, second, labels)
    table = pd.concat([_tabulate(TRAIN, root, train, labels), val], ignore_index=True)
    return ImageIndex(
        root,
        layout,
        tuple(f"{name} {titles.get(name, '')}".rstrip() for name in classes),
        table,
        {TRAIN: "names of folders", VAL: source},
        {
            TRAIN: (
                *_tell_few(table, TRAIN, classes),
                *_tell_empty(table, TRAIN),
                *loose,
                *_tell_others(train.values()),
            ),
            VAL: (*_tell_few(table, VAL, classes), *_tell_empty(table, VAL), *problems),
        },
    )


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _list_classes(folder: Path) -> _Folder:
    """The class folders, and the images beside them."""
    found = _list_folder(folder)
    if len(found.folders) < 2:
        raise UserError(
            f"{folder} holds {count_of(len(found.folders), 'class folder')}: extract the training images there, by "
            "class"
        )
    return found


def _check_known(classes: Sequence[str], titles: Mapping[str, str], folder: Path) -> None:
    unknown = [name for name in classes if name not in titles]
    if unknown:
        raise UserError(
            f"{folder} holds {count_of(len(unknown), 'folder')} that LOC_synset_mapping.txt does not know "
            f"({list_some(unknown, ', ')}): remove each that is not meant, or else the mapping"
        )
    missing = sorted(titles.keys() - set(classes))
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing):,} of the {len(titles):,} classes of LOC_synset_mapping.txt, the first is "
            f"{missing[0]}: extract them, or remove the mapping if a part of the classes is meant"
        )


def _list_part(folder: Path, classes: Sequence[str]) -> dict[str, _Folder]:
    """The files of every class, by threads."""

    def list_class(name: str) -> _Folder:
        found = _list_folder(folder / name)
        # Tiny-ImageNet's, which many sort into class folders for validation, too: then nothing else tells it.
        if "images" not in found.folders:
            return found
        return replace(_list_folder(found.path / "images"), loose=[f"{name}/{loose}" for loose in found.names])

    started = last_line = time.perf_counter()
    listed: dict[str, _Folder] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(classes, pool.map(list_class, classes), strict=True):
            listed[name] = found
            now = time.perf_counter()
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line, left = now, (now - started) / len(listed) * (len(classes) - len(listed))
                logger.info(
                    "%s: %d of %d class folders are listed, %.0f s left", folder, len(listed), len(classes), left
                )
    return listed


def _list_folder(folder: Path) -> _Folder:
    names, sizes, folders, others = [], [], [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                others["hidden"] += 1
                continue
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  # a Path for each costs as much as listing
            if suffix in SUFFIXES and entry.is_file():
                names.append(entry.name)
                sizes.append(entry.stat().st_size)
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                others[f"{suffix} that leads nowhere" if suffix in SUFFIXES else suffix or "no suffix"] += 1
    order = sorted(range(len(names)), key=names.__getitem__)
    return _Folder(folder, [names[i] for i in order], [sizes[i] for i in order], sorted(folders), others)


def _check_whole(listed: Mapping[str, _Folder], folder: Path, *, unequal: bool) -> None:
    """Refuse classes without files and, unless classes may be `unequal`, those with far fewer than the others."""
    counts = {name: len(found.names) for name, found in listed.items()}
    least = 1 if unequal else max(1, SHORT * float(np.median(list(counts.values()))))
    short = [name for name, count in counts.items() if count < least]
    if short:
        told = list_some([f"{name} with {count_of(counts[name], 'image')}" for name in short], ", ")
        raise UserError(
            f"{folder} is half extracted, with too little of {len(short):,} of its {len(counts):,} classes, {told}: "
            "extract them again, or remove their folders"
        )


def _list_second(root: Path, folder: Path, labels: Mapping[str, int]) -> tuple[pd.DataFrame, str, tuple[str, ...]]:
    """The files of the second part, where their labels come from, and what is wrong with them."""
    around = _list_folder(folder)
    # Tiny-ImageNet's for all classes, unless it is a class itself.
    is_inner = "images" in around.folders and "images" not in labels
    inner = _list_folder(folder / "images") if is_inner else None
    if inner is not None and not inner.names:
        inner = None
    classes = [name for name in around.folders if not (is_inner and name == "images")]
    if classes:
        return _list_second_by_class(root, around, inner, classes, labels)
    found = inner or around
    known = label_flat_files(root, folder, found.names)
    label_of, problems = _match(found.names, known, labels, found.path)
    loose = _tell_loose(around.names, folder, len(found.names)) if inner else ()
    kept = [i for i, label in enumerate(label_of) if label is not None]
    prefix = found.path.relative_to(root).as_posix()
    table = pd.DataFrame(
        {
            "part": VAL,
            "path": [f"{prefix}/{found.names[i]}" for i in kept],
            "label": np.array([label_of[i] for i in kept], dtype=np.int64),
            "num_bytes": np.array([found.num_bytes[i] for i in kept], dtype=np.int64),
        }
    )
    table = table.sort_values(["label", "path"], ignore_index=True)
    return table, known.source, (*problems, *loose, *_tell_others([found]))


def _list_second_by_class(
    root: Path, around: _Folder, inner: _Folder | None, classes: Sequence[str], labels: Mapping[str, int]
) -> tuple[pd.DataFrame, str, tuple[str, ...]]:
    """The files of the second part's class folders, `inner` being what was not sorted into them, or copied."""
    unknown = [name for name in classes if name not in labels]
    if unknown:
        raise UserError(
            f"{around.path} holds {count_of(len(unknown), 'class')} that train has not "
            f"({list_some(unknown, ', ')}): remove each, or extract its training images"
        )
    listed = _list_part(around.path, classes)
    _check_whole(listed, around.path, unequal=True)
    copied = {name for found in listed.values() for name in found.names} if inner else set()
    unsorted = [f"images/{name}" for name in inner.names if name not in copied] if inner else []
    loose = _tell_loose([*around.names, *unsorted, *_loose_in(listed)], around.path, _count(listed))
    problems = (*loose, *_tell_others(listed.values()))
    lacking = sorted(labels.keys() - set(classes))
    if lacking:
        problems = (f"classes that are missing: {len(lacking):,}, {list_some(lacking, ', ')}", *problems)
    return _tabulate(VAL, root, listed, labels), "names of folders", problems


def _match(
    names: Sequence[str], known: Labels, labels: Mapping[str, int], folder: Path
) -> tuple[list[int | None], tuple[str, ...]]:
    """The label of every file; None where there is none."""
    foreign = sorted({wnid for wnid in known.of_file.values() if wnid not in labels})
    if foreign:
        raise UserError(
            f"{known.source} names {count_of(len(foreign), 'class')} that train has not "
            f"({list_some(foreign, ', ')}): extract the training images of each"
        )
    wnids = [known.of_file.get(os.path.splitext(name)[0]) for name in names]  # noqa: PTH122
    without = [name for name, wnid in zip(names, wnids, strict=True) if wnid is None]
    there = {os.path.splitext(name)[0] for name in names}  # noqa: PTH122
    absent = sorted(known.of_file.keys() - there)
    problems = []
    for what, files, total in (
        (f"files in {folder} without a label in {known.source}", without, len(names)),
        (f"labels in {known.source} of files that are not in {folder}", absent, len(known.of_file)),
    ):
        told = f"{what}: {len(files):,} of {total:,}, {list_some(files, ', ')}"
        if len(files) > MAX_UNLABELLED * total:
            raise UserError(f"{told}: extract both again")
        if files:
            problems.append(told)
    return [None if wnid is None else labels[wnid] for wnid in wnids], tuple(problems)


def _tabulate(part: str, root: Path, listed: Mapping[str, _Folder], labels: Mapping[str, int]) -> pd.DataFrame:
    """The files of class folders."""
    folders = listed.values()
    return pd.DataFrame(
        {
            "part": part,
            "path": [f"{start}/{name}" for start, found in _from_root(root, folders) for name in found.names],
            "label": np.repeat([labels[name] for name in listed], [len(found.names) for found in folders]),
            "num_bytes": np.array([size for found in folders for size in found.num_bytes], dtype=np.int64),
        }
    )


def _from_root(root: Path, folders: Iterable[_Folder]) -> Iterator[tuple[str, _Folder]]:
    return ((found.path.relative_to(root).as_posix(), found) for found in folders)


def _loose_in(listed: Mapping[str, _Folder]) -> list[str]:
    return [name for found in listed.values() for name in found.loose]


def _count(listed: Mapping[str, _Folder]) -> int:
    return sum(len(found.names) for found in listed.values())


def _tell_loose(loose: Sequence[str], folder: Path, num_others: int) -> tuple[str, ...]:
    """Images in `folder` beside those folders that hold the other ones: nothing labels them."""
    if not loose:
        return ()
    total = len(loose) + num_others
    if len(loose) > MAX_UNLABELLED * total:
        raise UserError(
            f"{len(loose):,} of {total:,} images in {folder} lie outside the folders that hold the others and have no "
            f"label there, {list_some(loose, ', ')}: move them into these folders, or away"
        )
    return (
        f"images in {folder} outside the folders that hold the others, which have no label there and are left out: "
        f"{len(loose):,}, {list_some(loose, ', ')}",
    )


def _tell_few(table: pd.DataFrame, part: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Classes with far fewer images of a part than the median one: half extracted, if they are not meant so."""
    counts = table.loc[table["part"] == part, "label"].value_counts().sort_index()
    few = counts[counts < FEW * counts.median()]
    if few.empty:
        return ()
    told = list_some([f"{classes[label]} with {count:,}" for label, count in zip(few.index, few, strict=True)], ", ")
    return (
        f"classes with fewer than {100 * FEW:g} % of the median, {counts.median():,g} images, half extracted if "
        f"that is not meant: {len(few):,} of {len(counts):,}, {told}",
    )


def _tell_empty(table: pd.DataFrame, part: str) -> tuple[str, ...]:
    """Files of a part that cannot be read, as is known before they are opened."""
    empty = table.loc[(table["part"] == part) & (table["num_bytes"] == 0), "path"].tolist()
    return (f"empty files: {len(empty):,}, the first is {empty[0]}",) if empty else ()


def _tell_others(folders: Iterable[_Folder]) -> tuple[str, ...]:
    others = Counter[str]()
    for found in folders:
        others += found.others + Counter({"folder": len(found.folders)})
    if not others:
        return ()
    told = ", ".join(f"{count:,} x {suffix}" for suffix, count in sorted(others.items()))
    return (f"what is no png, jpg or bmp file, or hidden, is left out: {told}",)


def _take_subset(index: ImageIndex, size: int, seed: int) -> ImageIndex:
    """So many training images, evenly of all classes, and a tenth as many of the second part."""
    parts = [
        _take_evenly(index, part, number, make_generator(seed, f"subset of {part}"))
        for part, number in ((TRAIN, size), (VAL, size // 10))
    ]
    return replace(index, table=pd.concat(parts, ignore_index=True), subset=(size, seed))


def _take_evenly(index: ImageIndex, part: str, size: int, generator: torch.Generator) -> pd.DataFrame:
    num_classes = len(index.class_names)
    if size < num_classes:
        raise UserError(
            f"subset_size leaves {size} of the {part} images for {num_classes} classes: give at least "
            f"{10 * num_classes}"
        )
    rows = index.rows_of(part)
    taken = []
    for label, of_class in rows.groupby("label").indices.items():
        wanted = size // num_classes + (int(str(label)) < size % num_classes)
        if wanted > len(of_class):
            raise UserError(
                f"subset_size wants {count_of(wanted, f'{part} image')} of {index.class_names[int(str(label))]}, "
                f"which has {len(of_class)}: choose a smaller one"
            )
        chosen = torch.randperm(len(of_class), generator=generator)[:wanted].numpy()
        taken.append(np.sort(of_class[chosen]))
    return rows.iloc[np.concatenate(taken)]
