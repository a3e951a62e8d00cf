"""Where the labels of a flat folder of validation images come from: by the stem of every file, the folder of its class.

ILSVRC's labels have come in several forms. One file that looks like them, `ImageSets/CLS-LOC/val.txt` as Kaggle has
it, holds running numbers instead: those who train on it learn nothing.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scipy.io import loadmat

from collective_pipeline.config import UserError, count_of

SOLUTION, ANNOTATIONS, GROUND_TRUTH = "LOC_val_solution.csv", "Annotations", "ILSVRC2012_validation_ground_truth.txt"
ANNOTATED = "val_annotations.txt"  # Tiny-ImageNet's
FIRST_NAME = re.compile(rb"<name>\s*([^<\s]+)\s*</name>")
THREADS = 16


@dataclass(frozen=True)
class Labels:
    """The class of every file, by its stem, and in words where that is from."""

    source: str
    of_file: dict[str, str]


def read_titles(root: Path, name: str) -> dict[str, str]:
    """What classes are called, by the names of their folders, as a file of this name says; empty without one."""
    file = next(_beside(root, name), None)
    if file is None:
        return {}
    lines = (line.split(maxsplit=1) for line in _read_lines(file))
    return {wnid: " ".join(title).partition(",")[0] for wnid, *title in lines}


def label_flat_files(root: Path, folder: Path, names: Sequence[str]) -> Labels:
    """The labels of the files called `names` in `folder`, from the first source that there is.

    Raises:
        UserError: If there is none, or if it cannot be read.
    """
    for read in (_from_annotated_list, _from_solution, _from_xml, _from_ground_truth):
        found = read(root, folder, names)
        if found is not None:
            return found
    advice = (
        f"put {ANNOTATED} into it, {SOLUTION} beside the tree, the XML files into {ANNOTATIONS}/CLS-LOC/val, "
        f"{GROUND_TRUTH} with its meta.mat there, or the images into a folder for each class"
    )
    running = _tell_running_numbers(root)
    if running is not None:
        raise UserError(f"{running}: {advice}")
    raise UserError(f"there are no labels for the {count_of(len(names), 'file')} in {folder}: {advice}")


def _beside(root: Path, name: str) -> Iterator[Path]:
    """Where a file of the data set may lie: in the tree, beside it, in its devkit."""
    devkits = (place / part for part in ("devkit", "ILSVRC2012_devkit_t12") for place in (root, root.parent))
    places = (root, root.parent, *devkits)
    return (file for place in places for file in (place / name, place / "data" / name) if file.is_file())


def _from_annotated_list(root: Path, folder: Path, names: Sequence[str]) -> Labels | None:
    """Tiny-ImageNet's: file, class and a box, with tabs between."""
    file = folder / ANNOTATED
    if not file.is_file():
        return None
    rows = [line.split("\t") for line in _read_lines(file)]
    _check(file, all(len(row) >= 2 for row in rows), "a file and its class in every line")
    return Labels(file.name, {Path(row[0]).stem: row[1] for row in rows})


def _from_solution(root: Path, folder: Path, names: Sequence[str]) -> Labels | None:
    """Kaggle's: an image and its boxes, each a class and four numbers."""
    file = next(_beside(root, SOLUTION), None)
    if file is None:
        return None
    rows = list(csv.reader(_read_lines(file)))[1:]
    _check(
        file, all(len(row) == 2 and row[1].split() for row in rows), "an ImageId and a PredictionString in every line"
    )
    return Labels(SOLUTION, {row[0]: row[1].split()[0] for row in rows})


def _from_xml(root: Path, folder: Path, names: Sequence[str]) -> Labels | None:
    """The class of the first object in the annotation of every file."""
    annotations = root / ANNOTATIONS / "CLS-LOC" / folder.name
    if not annotations.is_dir() or not any(annotations.glob("*.xml")):
        return None

    def read(file: Path) -> tuple[str, str]:
        found = FIRST_NAME.search(file.read_bytes())
        _check(file, found is not None, "the name of an object")
        assert found is not None
        return file.stem, found[1].decode()

    with ThreadPoolExecutor(THREADS) as pool:
        return Labels(f"{ANNOTATIONS}/CLS-LOC/{folder.name}/*.xml", dict(pool.map(read, annotations.glob("*.xml"))))


def _from_ground_truth(root: Path, folder: Path, names: Sequence[str]) -> Labels | None:
    """The devkit's: the number of a class for every file in the order of their names, and which class has it."""
    file = next(_beside(root, GROUND_TRUTH), None)
    if file is None:
        return None
    wnid_of = _synset_numbers(root, file)
    numbers = [number for line in _read_lines(file) for number in line.split()]
    _check(file, all(number in wnid_of for number in numbers), "the number of a class of the devkit in every line")
    if len(numbers) != len(names):
        raise UserError(
            f"{file} has {count_of(len(numbers), 'label')} for the {count_of(len(names), 'file')} in {folder}, in "
            "their order: extract all"
        )
    return Labels(GROUND_TRUTH, {Path(name).stem: wnid_of[n] for name, n in zip(sorted(names), numbers, strict=True)})


def _synset_numbers(root: Path, ground_truth: Path) -> dict[str, str]:
    """Which class has which number in the devkit: from its meta.mat, or map_clsloc.txt (class, number, title)."""
    for file in _beside(root, "meta.mat"):
        try:
            synsets = loadmat(file, squeeze_me=True)["synsets"]
            columns = [synsets[name] for name in ("ILSVRC2012_ID", "WNID")]
        except Exception as error:  # damaged files raise almost anything
            raise UserError(f"{file} cannot be read ({error}): put the published file in its place") from None
        return {str(int(number)): str(wnid) for number, wnid in zip(*columns, strict=True)}
    for file in _beside(root, "map_clsloc.txt"):
        rows = [line.split() for line in _read_lines(file)]
        _check(file, all(len(row) >= 2 for row in rows), "a class and its number in every line")
        return {row[1]: row[0] for row in rows}
    raise UserError(
        f"{ground_truth} numbers classes in an order of its own: put the devkit's meta.mat or map_clsloc.txt beside it"
    )


def _tell_running_numbers(root: Path) -> str | None:
    """What is wrong with the list of files of Kaggle's tree, or a part of it, if its second column only counts them.

    In any order, and from whatever number: such a list is no more one of labels than the whole is.
    """
    file = root / "ImageSets" / "CLS-LOC" / "val.txt"
    if not file.is_file():
        return None
    rows = [line.split() for line in _read_lines(file)]
    numbers = sorted(int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal())
    if len(numbers) < 2 or numbers != list(range(numbers[0], numbers[0] + len(rows))):
        return None
    return (
        f"{file} is no list of labels: its second column counts from {numbers[0]} to {numbers[-1]}, a number for each "
        "file whatever its class"
    )


def _read_lines(file: Path) -> list[str]:
    """Its lines without empty ones."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text: put the published file in its place") from None


def _check(file: Path, is_good: bool, wanted: str) -> None:
    if not is_good:
        raise UserError(f"{file} does not have {wanted}: put the published file in its place")
