"""Every layout of labelled image files becomes one table, and what is missing from a tree is said."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from collective_pipeline.config import ClassGroupsConfig, UserError
from collective_pipeline.data import small_images
from collective_pipeline.data.class_groups import resolve_groups
from collective_pipeline.data.image_index import TRAIN, VAL, compare_index, index_images
from collective_pipeline.data.small_images import TASK_B, load_images
from collective_pipeline.data.splits import make_splits

SHARED = Path(__file__).parents[3] / "shared" / "data"
CLASSES = ("n01", "n02", "n03")
# Their order in the devkit is not that of their names.
DEVKIT = {"n01": 2, "n02": 3, "n03": 1}
OF_VAL = ("n03", "n01", "n02", "n02", "n01", "n03")


def write_image(path: Path, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, format="JPEG")


def stem(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


@pytest.fixture
def ilsvrc(tmp_path) -> Path:
    """Four training images of each class and six flat validation images, without any labels."""
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for name in CLASSES:
        for number in range(4):
            write_image(base / "train" / name / f"{name}_{number}.JPEG")
    for number in range(1, 7):
        write_image(base / "val" / f"{stem(number)}.JPEG")
    return tmp_path / "ILSVRC"


def write_solution(root: Path, names=OF_VAL) -> None:
    rows = [f"{stem(number)},{name} 1 2 3 4 {name} 5 6 7 8" for number, name in enumerate(names, start=1)]
    (root.parent / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))


def write_xml(root: Path) -> None:
    folder = root / "Annotations" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    for number, name in enumerate(OF_VAL, start=1):
        objects = f"<object>\n<name>{name}</name></object><object><name>n01</name></object>"
        (folder / f"{stem(number)}.xml").write_text(f"<annotation>{objects}</annotation>")


def write_ground_truth(root: Path) -> None:
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    numbers = "\n".join(str(DEVKIT[name]) for name in OF_VAL)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)
    synsets = np.array([(n, w) for w, n in DEVKIT.items()], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    savemat(data / "meta.mat", {"synsets": synsets})


def write_mapped_ground_truth(root: Path) -> None:
    write_ground_truth(root)
    data = root / "ILSVRC2012_devkit_t12" / "data"
    (data / "meta.mat").unlink()
    (data / "map_clsloc.txt").write_text("\n".join(f"{wnid} {number} a_thing" for wnid, number in DEVKIT.items()))


def write_ground_truth_beside(root: Path) -> None:
    write_ground_truth(root)
    (root / "ILSVRC2012_devkit_t12").rename(root.parent / "ILSVRC2012_devkit_t12")


def write_list(root: Path, numbers) -> None:
    lists = root / "ImageSets" / "CLS-LOC"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("\n".join(f"{stem(number)} {number}" for number in numbers))


def write_folders(root: Path) -> None:
    val = root / "Data" / "CLS-LOC" / "val"
    for number, name in enumerate(OF_VAL, start=1):
        (val / name).mkdir(exist_ok=True)
        (val / f"{stem(number)}.JPEG").rename(val / name / f"{stem(number)}.JPEG")


SOURCES = [
    write_solution,
    write_xml,
    write_ground_truth,
    write_mapped_ground_truth,
    write_ground_truth_beside,
    write_folders,
]


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_of_labels_says_the_same(ilsvrc, write):
    write(ilsvrc)
    index = index_images(ilsvrc.parent if write is write_solution else ilsvrc)

    val = index.rows_of(VAL)
    stems = [Path(path).stem for path in val["path"]]
    told = dict(zip(stems, (index.class_names[label] for label in val["label"]), strict=True))
    assert told == {stem(number): name for number, name in enumerate(OF_VAL, start=1)}
    assert index.class_names == CLASSES and list(index.rows_of(TRAIN)["label"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert all((index.root / path).stat().st_size == size for path, size in index.table[["path", "num_bytes"]].values)
    about = index.describe().set_index("part")
    assert list(about["images"]) == [12, 6] and list(about["classes"]) == [3, 3]


@pytest.mark.parametrize("numbers", [range(1, 7), range(5, 11), (9, 5, 10, 7, 6, 8)], ids=["whole", "cut", "shuffled"])
def test_running_numbers_are_no_labels(ilsvrc, numbers):
    """Kaggle's list of validation files counts them; the original trained on these numbers."""
    write_list(ilsvrc, numbers)
    told = rf"val\.txt is no list of labels: its second column counts from {min(numbers)} to {max(numbers)}, a number"
    with pytest.raises(UserError, match=told):
        index_images(ilsvrc)


@pytest.mark.parametrize("numbers", [(1, 2, 3, 3, 2, 1), (1, 2, 3, 4, 5, 7), (370,)])
def test_other_numbers_are_not_said_to_be_running(ilsvrc, numbers):
    write_list(ilsvrc, numbers)
    with pytest.raises(UserError, match="there are no labels for the 6 files"):
        index_images(ilsvrc)


def test_plain_folders_and_tiny_imagenet(tmp_path):
    for part, number in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(number):
                write_image(tmp_path / "plain" / part / name / f"{i}.png")
    plain = index_images(tmp_path / "plain")
    tiny = tmp_path / "around" / "tiny-imagenet-200"
    for name in CLASSES:
        write_image(tiny / "train" / name / "images" / f"{name}_0.JPEG")
        (tiny / "train" / name / f"{name}_boxes.txt").write_text("a box")
    for i, name in enumerate(CLASSES):
        write_image(tiny / "val" / "images" / f"val_{i}.JPEG")
        with (tiny / "val" / "val_annotations.txt").open("a") as file:
            file.write(f"val_{i}.JPEG\t{name}\t0\t0\t1\t1\n")
    known = index_images(tmp_path / "around")

    assert (plain.layout, plain.class_names) == ("folders", ("cat", "dog"))
    assert plain.table.groupby("part").size().to_dict() == {"train": 6, "val": 4}
    assert known.layout == "Tiny-ImageNet" and list(known.rows_of(VAL)["label"]) == [0, 1, 2]
    assert known.rows_of(TRAIN)["path"].iloc[0] == "train/n01/images/n01_0.JPEG"


def test_tiny_imagenet_sorted_into_class_folders_is_read(tmp_path):
    """As many sort its validation images; an empty folder for them beside another part is none."""
    for name in CLASSES:
        write_image(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
        write_image(tmp_path / "test" / name / f"{name}_1.JPEG")
    (tmp_path / "val").mkdir()

    assert index_images(tmp_path).table["path"].to_list() == [
        *(f"train/{name}/images/{name}_0.JPEG" for name in CLASSES),
        *(f"test/{name}/{name}_1.JPEG" for name in CLASSES),
    ]


def test_what_is_left_out_is_told(ilsvrc):
    write_solution(ilsvrc)
    folder = ilsvrc / "Data" / "CLS-LOC" / "train" / "n01"
    (folder / "._n01_0.JPEG").write_bytes(b"of a Mac")
    (folder / "notes.txt").write_text("")
    (folder / "more").mkdir()
    (folder / "n01_9.JPEG").symlink_to(folder / "nowhere.JPEG")
    index = index_images(ilsvrc)

    assert len(index.rows_of(TRAIN)) == 12
    (told,) = index.problems[TRAIN]
    assert "1 x .jpeg that leads nowhere, 1 x .txt, 1 x folder, 1 x hidden" in told


def test_empty_files_are_told_before_they_are_opened(ilsvrc):
    write_solution(ilsvrc)
    base = ilsvrc / "Data" / "CLS-LOC"
    for path in (
        base / "train" / "n01" / "n01_2.JPEG",
        base / "train" / "n02" / "n02_0.JPEG",
        base / "val" / f"{stem(4)}.JPEG",
    ):
        path.write_bytes(b"")
    index = index_images(ilsvrc)

    assert index.problems == {
        TRAIN: ("empty files: 2, the first is Data/CLS-LOC/train/n01/n01_2.JPEG",),
        VAL: (f"empty files: 1, the first is Data/CLS-LOC/val/{stem(4)}.JPEG",),
    }
    assert len(index.table) == 18


def write_plain(root: Path, numbers: dict[str, tuple[int, int]]) -> Path:
    """Training and validation images of each class; indexing reads none."""
    for name, of_class in numbers.items():
        for part, number in zip(("train", "val"), of_class, strict=True):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                (root / part / name / f"{name}_{i}.jpg").write_bytes(b"an image")
    return root


def write_loose(folder: Path, number: int) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(number):
        (folder / f"loose_{i}.jpg").write_bytes(b"an image")


@pytest.mark.parametrize("part", ["train", "val"])
def test_images_beside_class_folders_have_no_label(tmp_path, part):
    """A few are left out and told, as where a list has the labels; what is no image needs none."""
    write_plain(tmp_path, {"cat": (100, 100), "dog": (100, 100)})
    (tmp_path / part / "notes.txt").write_text("")
    assert index_images(tmp_path).problems == {TRAIN: (), VAL: ()}
    write_loose(tmp_path / part, 2)
    index = index_images(tmp_path)

    assert len(index.rows_of(part)) == 200
    (told,) = index.problems[part]
    assert told.startswith(f"images in {tmp_path / part} outside") and told.endswith(": 2, loose_0.jpg, loose_1.jpg")
    write_loose(tmp_path / part, 20)
    told = rf"20 of 220 images in \S+{part} lie outside .* no label there, loose_0.jpg, .*jpg and 17 more: move them"
    with pytest.raises(UserError, match=told):
        index_images(tmp_path)


def test_half_of_tiny_imagenet_sorted_into_class_folders_is_refused(tmp_path):
    """Unless the rest was copied; a class may be called as the folder of that rest is."""
    write_plain(tmp_path, {"n01": (4, 4), "n02": (4, 4)})
    shutil.copytree(tmp_path / "val" / "n01", tmp_path / "val" / "images")
    assert index_images(tmp_path).problems[VAL] == ()
    write_loose(tmp_path / "val" / "images", 3)
    with pytest.raises(UserError, match=r"3 of 11 images in \S+val lie outside .*, images/loose_0.jpg, "):
        index_images(tmp_path)
    (tmp_path / "train" / "images").mkdir()
    write_loose(tmp_path / "train" / "images", 4)
    assert index_images(tmp_path).rows_of(VAL).groupby("label").size().to_list() == [7, 4, 4]


def test_images_beside_tiny_imagenets_own_folder_have_no_label(tmp_path):
    write_plain(tmp_path, {"n01": (4, 1), "n02": (4, 1)})
    (tmp_path / "val" / "images").mkdir()
    for name in ("n01", "n02"):
        (tmp_path / "val" / name / f"{name}_0.jpg").rename(tmp_path / "val" / "images" / f"{name}_0.jpg")
        (tmp_path / "val" / name).rmdir()
    (tmp_path / "val" / "val_annotations.txt").write_text("n01_0.jpg\tn01\nn02_0.jpg\tn02\n")
    (tmp_path / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\n")
    index = index_images(tmp_path)
    assert index.problems == {TRAIN: (), VAL: ()} and index.class_names == ("n01 goldfish", "n02")
    write_loose(tmp_path / "val", 1)
    with pytest.raises(UserError, match=r"1 of 3 images in \S+val lie outside .*, loose_0.jpg: move them"):
        index_images(tmp_path)


def test_images_beside_those_of_a_class_have_no_label(tmp_path):
    """Where they are in a folder of the class's, as Tiny-ImageNet has them."""
    for name in CLASSES:
        write_image(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
        write_image(tmp_path / "val" / name / "images" / f"{name}_1.JPEG")
    write_loose(tmp_path / "train" / CLASSES[1], 1)

    with pytest.raises(UserError, match=rf"1 of 4 images in \S+train lie outside .*, {CLASSES[1]}/loose_0.jpg: move"):
        index_images(tmp_path)


def test_an_empty_folder_for_images_changes_nothing(tmp_path):
    for name in CLASSES:
        write_image(tmp_path / "train" / name / f"{name}_0.JPEG")
    (tmp_path / "val" / "images").mkdir(parents=True)
    write_loose(tmp_path / "val", 1)

    with pytest.raises(UserError, match=r"no labels for the 1 file in \S+val:"):
        index_images(tmp_path)


def test_classes_with_far_fewer_images_are_told_and_not_refused(tmp_path):
    """Plain folders may be unequal: a class with a quarter of what most have is not told."""
    write_plain(tmp_path, {"ape": (40, 8), "bee": (1, 8), "cat": (40, 8), "dog": (10, 2), "eel": (41, 1)})
    index = index_images(tmp_path)

    few = "classes with fewer than 25 % of the median, {} images, half extracted if that is not meant: 1 of 5, {}"
    assert index.problems == {TRAIN: (few.format(40, "bee with 1"),), VAL: (few.format(8, "eel with 1"),)}


def test_what_was_found_fits_on_a_console_whatever_is_wrong(tmp_path):
    """All of it, each problem from a line of its own on; no path without spaces is broken."""
    write_plain(tmp_path, {"ape": (40, 8), "bee": (1, 8), "cat": (40, 8), "dog": (40, 8), "eel": (41, 1)})
    (tmp_path / "train" / "ape" / f"{'x' * 130}.jpg").touch()
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    index = index_images(tmp_path)
    lines = index.tell().split("\n")

    assert [line for line in lines if len(line) > 120] == [f"  train/ape/{'x' * 130}.jpg"]
    told = " ".join(line.strip() for line in lines)
    problems = [f"{part}: {problem}" for part, of_part in index.problems.items() for problem in of_part]
    assert len(problems) == 4 and all(problem in told for problem in problems)
    assert sum(line.startswith(("train: ", "val: ")) for line in lines) == 4


def test_names_of_classes_come_from_the_mapping(ilsvrc):
    write_solution(ilsvrc)
    (ilsvrc.parent / "LOC_synset_mapping.txt").write_text(
        "n01 tench, Tinca tinca\nn02 goldfish\nn03 great white shark, x\n"
    )
    assert index_images(ilsvrc).class_names == ("n01 tench", "n02 goldfish", "n03 great white shark")
    (ilsvrc.parent / "LOC_synset_mapping.txt").write_text("n01\nn02\tgoldfish\nn03 ,\n")
    assert index_images(ilsvrc).class_names == ("n01", "n02 goldfish", "n03")


def test_subsets_are_even_and_of_their_seed(ilsvrc):
    write_solution(ilsvrc, OF_VAL)
    for name in CLASSES:
        for number in range(4, 40):
            write_image(ilsvrc / "Data" / "CLS-LOC" / "train" / name / f"{name}_{number}.JPEG")
    taken = index_images(ilsvrc, subset_size=32, subset_seed=1)

    assert taken.rows_of(TRAIN).groupby("label").size().to_list() == [11, 11, 10]
    assert taken.rows_of(VAL).groupby("label").size().to_list() == [1, 1, 1]
    assert taken.digest == index_images(ilsvrc, subset_size=32, subset_seed=1).digest
    assert taken.digest != index_images(ilsvrc, subset_size=32, subset_seed=2).digest
    with pytest.raises(UserError, match="subset_size wants"):
        index_images(ilsvrc, subset_size=1000)
    with pytest.raises(UserError, match="subset_size leaves 2 of the val images for 3 classes"):
        index_images(ilsvrc, subset_size=20)


def remove_class(root: Path) -> None:
    for file in (root / "Data/CLS-LOC/train/n02").iterdir():
        file.unlink()


def shorten_class(root: Path) -> None:
    for number in range(1, 4):
        (root / f"Data/CLS-LOC/train/n02/n02_{number}.JPEG").unlink()


def forget_file(root: Path) -> None:
    (root / "Data/CLS-LOC/val" / f"{stem(3)}.JPEG").unlink()


def forget_label(root: Path) -> None:
    solution = root.parent / "LOC_val_solution.csv"
    solution.write_text("".join(line for line in solution.read_text().splitlines(True) if stem(3) not in line))


def unknown_class(root: Path) -> None:
    write_solution(root, ("n09", *OF_VAL[1:]))


def unmapped_class(root: Path) -> None:
    (root.parent / "LOC_synset_mapping.txt").write_text("n01 a\nn03 b\n")


def missing_class(root: Path) -> None:
    (root.parent / "LOC_synset_mapping.txt").write_text("n01 a\nn02 b\nn03 c\nn04 d\n")


def no_second_part(root: Path) -> None:
    (root / "Data/CLS-LOC/val").rename(root / "Data/CLS-LOC/valley")


def garble_solution(root: Path) -> None:
    (root.parent / "LOC_val_solution.csv").write_bytes(b"\xff\xfe\x00")


def cut_meta(root: Path) -> None:
    (root.parent / "LOC_val_solution.csv").unlink()
    write_ground_truth(root)
    meta = root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
    meta.write_bytes(meta.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (remove_class, "half extracted, with too little of 1 of its 3 classes, n02 with 0 images"),
        (shorten_class, "half extracted, with too little of 1 of its 3 classes, n02 with 1 image:"),
        (forget_file, r"labels in LOC_val_solution.csv of files that are not in .*: 1 of 6, .*00000003"),
        (forget_label, r"files in .* without a label in LOC_val_solution.csv: 1 of 6, .*00000003"),
        (
            unknown_class,
            r"LOC_val_solution.csv names 1 class that train has not \(n09\): extract the training images of",
        ),
        (unmapped_class, r"1 folder that LOC_synset_mapping.txt does not know \(n02\): remove each that is not meant"),
        (missing_class, "lacks 1 of the 4 classes of LOC_synset_mapping.txt, the first is n04"),
        (no_second_part, "lacks a second part beside train"),
        (garble_solution, r"LOC_val_solution\.csv is no text: put the published file in its place"),
        (cut_meta, r"meta\.mat cannot be read .*: put the published file in its place"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(ilsvrc, spoil, told):
    write_solution(ilsvrc)
    spoil(ilsvrc)
    with pytest.raises(UserError, match=told):
        index_images(ilsvrc)


def test_folders_that_are_no_tree_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        index_images(tmp_path / "nowhere")
    (tmp_path / "holiday").mkdir()
    with pytest.raises(UserError, match="no known layout, since it holds holiday"):
        index_images(tmp_path)


def test_a_tree_that_changed_is_told_from_what_it_was(ilsvrc):
    write_solution(ilsvrc)
    before = index_images(ilsvrc)
    train = ilsvrc / "Data" / "CLS-LOC" / "train"
    (train / "n01" / "n01_0.JPEG").unlink()
    write_image(train / "n02" / "n02_9.JPEG")
    write_image(train / "n03" / "n03_3.JPEG", size=(40, 30))
    told = compare_index(before, index_images(ilsvrc))

    assert "1 missing (the first is Data/CLS-LOC/train/n01/n01_0.JPEG)" in told
    assert "1 new (the first is Data/CLS-LOC/train/n02/n02_9.JPEG)" in told
    assert "1 of another size (the first is Data/CLS-LOC/train/n03/n03_3.JPEG)" in told
    assert compare_index(before, before) == "nothing"


def test_tiny_imagenet_is_read_into_memory(tmp_path):
    for name in ("n01", "n02"):
        for i in range(3):
            write_image(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", size=(64, 64))
        write_image(tmp_path / "val" / "images" / f"{name}.JPEG", size=(64, 64))
    (tmp_path / "val" / "val_annotations.txt").write_text("n01.JPEG\tn01\nn02.JPEG\tn02\n")
    raw = load_images("tiny_imagenet", tmp_path)

    assert raw.train.images.shape == (6, 3, 64, 64) and raw.test.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"does not hold tiny_imagenet: unpack http://cs231n"):
        load_images("tiny_imagenet", tmp_path / "nothing")


def write_classes(root: Path, names, *, size=(50, 30), mode="RGB") -> None:
    """Three training images and a validation image of each class, its place in `names` being their brightness."""
    for place, name in enumerate(names):
        for part, num in (("train", 3), ("val", 1)):
            (root / part / name).mkdir(parents=True)
            for i in range(num):
                pixels = np.full((size[1], size[0], 4), 10 * place, np.uint8)
                file = root / part / name / f"{name}_{i}.JPEG"
                Image.fromarray(pixels, "RGBA").convert(mode).save(file, format="JPEG")


def test_of_all_of_ilsvrc_the_classes_of_task_b_are_read_at_64_pixels(tmp_path, caplog):
    """In the order of the original, whatever lies beside them, and through a link to where ILSVRC lies."""
    others = ["n00000001", "n03000000"]
    base = tmp_path / "disk" / "ILSVRC"
    write_classes(base / "Data" / "CLS-LOC", [*TASK_B, *others])
    titles = "\n".join(f"{wnid} title of {wnid}, another" for wnid in [*TASK_B, *others])
    (base / "LOC_synset_mapping.txt").write_text(titles)
    (tmp_path / "imagenet64").mkdir()
    (tmp_path / "imagenet64" / "link").symlink_to(base)
    with caplog.at_level("INFO"):
        raw = load_images("imagenet64", tmp_path / "imagenet64")

    assert "of 14 classes, the 12 of Task B are read" in caplog.text
    assert raw.train.images.shape == (36, 3, 64, 64) and len(raw.test) == 12
    assert raw.class_names[:3] == ("African_elephant", "hyena", "zebra") and raw.class_names[-2:] == (
        "lynx",
        "African_hunting_dog",
    )
    brightness = raw.test.images[:, 0, 5, 5].int()
    assert (brightness - 10 * raw.test.labels).abs().max() <= 2
    splits = make_splits(raw, val_fraction=1 / 3, split_seed=0)
    groups = resolve_groups(ClassGroupsConfig(), splits)
    assert [len(group) for group in groups.groups] == [5, 5, 5] and len(groups.labels) == 12
    assert (groups.membership_GK.int() @ groups.membership_GK.int().T).tolist() == [[5, 1, 1], [1, 5, 1], [1, 1, 5]]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_classes_are_all_read_and_may_be_grey_or_for_print(tmp_path, mode):
    write_classes(tmp_path, ["bee", "cat"], mode=mode)
    raw = load_images("imagenet64", tmp_path)

    assert raw.class_names == ("bee", "cat") and raw.train.images.shape == (6, 3, 64, 64)
    with pytest.raises(UserError, match=r"imagenet64 has no class \w+ here: give merged_moe.class_groups.groups"):
        resolve_groups(ClassGroupsConfig(), make_splits(raw, val_fraction=1 / 3, split_seed=0))


@pytest.mark.parametrize(("bound", "value"), [("MAX_CLASSES", 1), ("MAX_BYTES", 1e4)])
def test_more_classes_than_memory_has_room_for_are_refused(tmp_path, monkeypatch, bound, value):
    write_classes(tmp_path, ["bee", "cat"])
    monkeypatch.setattr(small_images, bound, value)
    with pytest.raises(UserError, match=r"holds 2 classes without African_elephant, .* too many for imagenet64"):
        load_images("imagenet64", tmp_path)


def test_what_lacks_for_imagenet64_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"does not hold imagenet64: put ILSVRC there or a link to it"):
        load_images("imagenet64", tmp_path)
    write_classes(tmp_path, ["bee", "cat"])
    shutil.rmtree(tmp_path / "val" / "cat")
    with pytest.raises(UserError, match=r"has no val images of cat: put some there"):
        load_images("imagenet64", tmp_path)


@pytest.mark.skipif(not (SHARED / "ilsvrc-mini.tar").exists(), reason="the shared folder with real images is not there")
def test_a_real_tree_of_kaggle_has_running_numbers(tmp_path):
    with tarfile.open(SHARED / "ilsvrc-mini.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    with pytest.raises(UserError, match="counts from 1"):
        index_images(tmp_path)
    write_folders_of = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    names = sorted(file.stem for file in write_folders_of.iterdir())
    rows = [f"{name},n01440764 1 2 3 4" for name in names]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))

    assert index_images(tmp_path).table.groupby("part").size().to_dict() == {"train": 25, "val": 7}


@pytest.mark.skipif(
    not (SHARED / "tiny-imagenet-50.tar.xz").exists(), reason="the shared folder with real images is not there"
)
def test_real_classes_of_tiny_imagenet_are_read_and_a_short_one_is_named(tmp_path):
    """All validation images of its fifty classes, and of each ten training images."""
    with tarfile.open(SHARED / "tiny-imagenet-50.tar.xz", "r|xz") as archive:
        for member in archive:
            number = Path(member.name).stem.rpartition("_")[2]
            if "/train/" not in member.name or not number.isdecimal() or int(number) < 10:
                archive.extract(member, tmp_path, filter="data")
    index = index_images(tmp_path)
    wnids = {Path(path).name: path.split("/")[1] for path in index.rows_of(TRAIN)["path"]}
    told = dict(line.split("\t")[:2] for line in (index.root / "val" / "val_annotations.txt").read_text().splitlines())
    val = index.rows_of(VAL)

    assert index.layout == "Tiny-ImageNet" and len(index.class_names) == 50 and len(wnids) == 500
    assert all(name.startswith(wnid) for name, wnid in wnids.items())
    classes = [name.split()[0] for name in index.class_names]
    assert {Path(path).name: classes[label] for path, label in val[["path", "label"]].values} == told
    assert index.class_names[0] == "n01443537 goldfish"
    for number in range(6):
        (index.root / "train" / "n01443537" / "images" / f"n01443537_{number}.JPEG").unlink()
    with pytest.raises(
        UserError, match="half extracted, with too little of 1 of its 50 classes, n01443537 with 4 images"
    ):
        index_images(tmp_path)
