"""A tree of images packs once, whatever interrupts it, and reads as the tree itself."""

import io
import itertools
import json
import logging
import pickle
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kedro.io import DataCatalog, DatasetError
from PIL import Image
from tests.data.test_jpeg import BAD, GOOD, JPEG, encoded, smooth_image

from collective_pipeline.config import UserError
from collective_pipeline.data import packed
from collective_pipeline.data.jpeg import Files, Problem
from collective_pipeline.data.packed import FileImages, PackedImages, claim_folder, pack_images
from collective_pipeline.io.packed import PackedImagesDataset

SIDE = 32
NO_READERS = None  # packed images need none


def make_tree(root, contents):
    """Files of two folders, with labels 0, 1, 2 ... so that each knows its own."""
    paths = [f"{'ab'[row % 2]}/{row}.JPEG" for row in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return FileImages(root, paths, torch.arange(len(contents)))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(packed, "IMAGES_A_SHARD", 4)


@pytest.fixture
def tree(tmp_path):
    """Ten images of all sizes and kinds that can be read."""
    sizes = [(60, 80), (90, 33), (20, 70), (32, 32), (400, 300)]
    return make_tree(tmp_path / "tree", [encoded(smooth_image(*size)) for size in sizes] + list(GOOD.values())[:5])


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.setattr(packed, "MAX_UNUSABLE", 0.5)


def sizes_of(images):
    return [Image.open(io.BytesIO(file)).size[::-1] for file in images.read(range(len(images)))]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_header(folder, **changes):
    """Without what is None, as before there was such a thing."""
    header = json.loads((folder / "packed.json").read_text()) | changes
    (folder / "packed.json").write_text(
        json.dumps({name: value for name, value in header.items() if value is not None})
    )


def change_table(folder, row, **changes):
    """What one table says of one of its images."""
    path = folder / "00001.parquet"
    table = pq.read_table(path)
    for name, value in changes.items():
        values = table[name].to_pylist()
        values[row] = value
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, path)


def rename_in(path):
    """One byte, as a disk may lose it."""
    path.write_bytes(path.read_bytes().replace(b"b/5", b"b/4"))


def test_files_are_read_as_they_are(tree):
    assert [bytes(file) for file in tree.read([3, 0])] == [(tree.root / tree.paths[row]).read_bytes() for row in (3, 0)]


def test_a_file_that_is_not_there_is_a_problem_of_its_own(tree):
    (tree.root / tree.paths[1]).unlink()
    first, gone, last = tree.read([0, 1, 2])

    assert gone == Problem("No such file or directory")
    assert first and last


def test_images_are_packed_small_in_order_with_their_labels(tree, tmp_path):
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    images = PackedImages.open(tmp_path / "packed")

    assert len(images) == 10 and images.labels.tolist() == list(range(10)) and images.labels.dtype == torch.int64
    assert sizes_of(images)[:5] == [(32, 43), (87, 32), (20, 70), (32, 32), (43, 32)]
    assert all(Image.open(io.BytesIO(file)).format == "JPEG" for file in images.read(range(10)))
    # Small ones keep their bytes.
    assert [bytes(file) for file in images.read([2, 3])] == [bytes(file) for file in tree.read([2, 3])]
    assert [bytes(file) for file in images.read([9, 0])] == [bytes(images.read([row])[0]) for row in (9, 0)]
    assert images.name(3) == f"b/3.JPEG in {tmp_path / 'packed'}"


def test_the_arrays_of_a_packed_folder_are_its_files(tree, tmp_path):
    """In any order and more than once; they outlast the object that they are from."""
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    rows = [9, 0, 5, 5, 2, 6]
    read = [bytes(file) for file in PackedImages.open(tmp_path / "packed").read(rows)]
    files = PackedImages.open(tmp_path / "packed").files(np.array(rows), NO_READERS)

    assert [bytes(files[row]) for row in range(6)] == read
    assert files.lengths_B.tolist() == [len(file) for file in read] and not files.problems
    parsed = Files.of(read)
    assert files.sizes_B2.tolist() == parsed.sizes_B2.tolist() and parsed.sizes_B2.all()
    assert files.are_usual_B.all() and parsed.are_usual_B.all()
    for name in ("addresses_B", "lengths_B", "sizes_B2", "are_usual_B"):
        assert getattr(files, name).dtype == getattr(parsed, name).dtype


def test_the_arrays_of_a_tree_are_its_files(tree):
    """In their order, whoever reads them."""
    (tree.root / tree.paths[4]).unlink()
    with ThreadPoolExecutor(2) as readers:
        files = tree.files([9, 4, *range(4), *range(5, 10)], readers)

    places = [0, *range(2, 11)]
    assert [bytes(files[place]) for place in places] == [bytes(f) for f in tree.read([9, *range(4), *range(5, 10)])]
    assert files.problems == {1: Problem("No such file or directory")}


def test_quality_is_that_of_jpeg(tree, tmp_path):
    for quality in (50, 95):
        pack_images(claim_folder(tree, tmp_path / str(quality), side=SIDE, quality=quality))
    sizes = [sum(map(len, PackedImages.open(tmp_path / str(quality)).read(range(10)))) for quality in (50, 95)]

    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize("num_before", [0, 3, 4, 5, 9])
def test_an_interrupted_build_goes_on(tree, tmp_path, monkeypatch, num_before):
    """It keeps whole shards, leaves no halves, and ends as one that was not interrupted."""
    pack_images(claim_folder(tree, tmp_path / "at once", side=SIDE))
    pack_one = packed._pack_one
    monkeypatch.setattr(
        packed, "_pack_one", lambda images, row, *how: pack_one(images, row, *how) if row < num_before else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    whole = num_before // 4
    assert set(files_in(tmp_path / "packed")) == {"packed.json"} | {
        f"{number:05}.{kind}" for number in range(whole) for kind in ("jpegs", "parquet")
    }
    with pytest.raises(UserError, match=f"is not complete, it lacks {3 - whole} of its 3 shards: pack .* again"):
        PackedImages.open(tmp_path / "packed")

    done = []
    monkeypatch.setattr(packed, "_pack_one", lambda images, row, *how: done.append(row) or pack_one(images, row, *how))
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    assert sorted(done) == list(range(4 * whole, 10))
    assert files_in(tmp_path / "packed") == files_in(tmp_path / "at once")


def test_whoever_is_told_to_stop_stops_packing_and_keeps_whole_shards(tree, tmp_path):
    calls = itertools.count(1)
    with pytest.raises(ZeroDivisionError):
        pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE), look_around=lambda: 1 / (next(calls) < 6))

    assert set(files_in(tmp_path / "packed")) == {"packed.json", "00000.jpegs", "00000.parquet"}


def test_two_that_pack_the_same_images_at_once_make_one_copy(tree, tmp_path, caplog):
    """The second waits for the first, and packs nothing anew."""
    caplog.set_level(logging.INFO)
    claim = claim_folder(tree, tmp_path / "packed", side=SIDE)
    pack_images(claim_folder(tree, tmp_path / "alone", side=SIDE))
    first_began, second_waits = threading.Event(), threading.Event()

    def go_slowly():
        first_began.set()
        assert second_waits.wait(60)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(pack_images, claim, look_around=go_slowly)
        assert first_began.wait(60)
        pool.submit(pack_images, claim, look_around=second_waits.set).result()
        first.result()

    assert (
        caplog.text.count("another command packs these images") == 1 and "there already, 3 of 3 shards" in caplog.text
    )
    assert files_in(claim.folder) == files_in(tmp_path / "alone")


def test_of_two_that_claim_a_folder_at_once_one_has_it(tree, tmp_path):
    """The other is refused if it would pack otherwise."""
    for attempt in range(20):
        folder, ready = tmp_path / str(attempt), threading.Barrier(3)

        def claim(quality, folder=folder, ready=ready):
            ready.wait(60)
            return claim_folder(tree, folder, side=SIDE, quality=quality)

        with ThreadPoolExecutor() as pool:
            claims = [pool.submit(claim, quality) for quality in (80, 90, 90)]
        refused = [one.exception() for one in claims if one.exception() is not None]
        has_it = {one.result().header for one in claims if one.exception() is None}
        assert len(has_it) == 1 and len(refused) in {1, 2}
        assert all("is packed with quality=" in str(error) for error in refused)


def test_who_waits_for_another_that_packs_may_be_stopped(tree, tmp_path):
    claim = claim_folder(tree, tmp_path / "packed", side=SIDE)

    def stop():
        raise UserError("stopped")

    with packed._alone_in(claim.folder, stop), pytest.raises(UserError, match="stopped"):
        pack_images(claim, look_around=stop)

    assert list(files_in(claim.folder)) == ["packed.json"]


def test_packing_again_does_nothing(tree, tmp_path, monkeypatch):
    """Nor are the paths compared again, which may be a million."""
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    claim = claim_folder(tree, tmp_path / "packed", side=SIDE)
    for work in ("_pack_one", "_digest"):
        monkeypatch.setattr(packed, work, lambda *_: 1 / 0)

    pack_images(claim)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"side": 48}, "is packed with side=32 and not 48: remove it, if no command reads it, to pack anew"),
        ({"side": 48, "quality": 50}, "side=32 and not 48, quality=90 and not 50"),
        ({"paths": ["b/1.JPEG", "a/0.JPEG"]}, "with other files:"),
        ({"labels": torch.zeros(10, dtype=torch.int64)}, "with other labels:"),
    ],
)
def test_a_folder_of_other_images_is_refused(tree, tmp_path, change, told):
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    before = files_in(tmp_path / "packed")
    paths = [*change.get("paths", tree.paths[:2]), *tree.paths[2:]]
    other = FileImages(tree.root, paths, change.get("labels", tree.labels))

    with pytest.raises(UserError, match=told):
        claim_folder(other, tmp_path / "packed", side=change.get("side", SIDE), quality=change.get("quality", 90))
    assert files_in(tmp_path / "packed") == before


def some_of(tree, rows):
    return FileImages(tree.root, [tree.paths[row] for row in rows], tree.labels[rows])


def test_a_whole_copy_serves_some_of_its_images(tree, tmp_path):
    """In their own order, here and in another process, and nothing is written."""
    folder = tmp_path / "packed"
    pack_images(claim_folder(tree, folder, side=SIDE))
    before = files_in(folder)
    some = some_of(tree, [7, 2, 5])
    pack_images(claim_folder(some, folder, side=SIDE))

    whole, images = PackedImages.open(folder), PackedImages.open(folder, some.paths)
    assert files_in(folder) == before
    for one in (images, pickle.loads(pickle.dumps(images))):
        assert one.labels.tolist() == [7, 2, 5] and one.name(1).startswith(tree.paths[2])
        assert one.read([0, 1, 2]) == whole.read([7, 2, 5])


def test_of_a_whole_copy_s_bad_files_some_images_have_their_own(tmp_path, lenient):
    tree = make_tree(tmp_path / "tree", [JPEG, *list(BAD.values())[:2], JPEG, JPEG])
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    images = PackedImages.open(tmp_path / "packed", some_of(tree, [4, 2, 3]).paths)

    assert images.labels.tolist() == [4, 3]
    (told,) = images.unreadable
    assert told.startswith(f"{tree.root / tree.paths[2]}: ")
    with pytest.raises(UserError, match=r"more than 50 % of the 3 .* cannot be read"):  # though of the whole it is less
        pack_images(claim_folder(some_of(tree, [4, 2, 1]), tmp_path / "packed", side=SIDE))


def test_a_copy_that_is_not_whole_serves_no_others(tree, tmp_path):
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    (tmp_path / "packed" / "00002.parquet").unlink()

    with pytest.raises(UserError, match=r"it lacks 1 of its 3 shards, .*\(10 images and not 3, .*finish it"):
        claim_folder(some_of(tree, [7, 2, 5]), tmp_path / "packed", side=SIDE)


def test_a_whole_copy_has_no_images_that_were_not_packed_there(tree, tmp_path):
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))

    with pytest.raises(UserError, match=r"lacks 2 of 3 wanted images, the first is c/1\.JPEG"):
        PackedImages.open(tmp_path / "packed", [tree.paths[4], "c/1.JPEG", "c/2.JPEG"])


@pytest.mark.parametrize(
    ("rows", "told"),
    [(range(10), "files of other lengths:"), ([7, 2, 5], "not all of these 3 are among them as they are")],
)
def test_a_copy_of_files_that_have_changed_is_refused(tree, tmp_path, rows, told):
    """Of all of them or of some: their names alone would have it trained on what they no longer are."""
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    (tree.root / tree.paths[5]).write_bytes(encoded(smooth_image(50, 50)))

    with pytest.raises(UserError, match=told):
        claim_folder(some_of(tree, list(rows)), tmp_path / "packed", side=SIDE)


def test_the_tree_may_move(tree, tmp_path):
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    tree.root.rename(tmp_path / "moved")

    pack_images(claim_folder(FileImages(tmp_path / "moved", tree.paths, tree.labels), tmp_path / "packed", side=SIDE))


def test_bad_files_are_named_and_left_out(tmp_path, lenient, caplog, monkeypatch):
    """Also where they were found before an interruption."""
    tree = make_tree(tmp_path / "tree", [JPEG, *list(BAD.values())[:3], JPEG, JPEG, BAD["zero bytes"], JPEG, JPEG])
    write_shard = packed._write_shard
    with monkeypatch.context() as interrupted, pytest.raises(ZeroDivisionError):
        interrupted.setattr(packed, "_write_shard", lambda *what: 1 / 0 if what[1] == 1 else write_shard(*what))
        pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))

    images = PackedImages.open(tmp_path / "packed")
    assert images.labels.tolist() == [0, 4, 5, 7, 8] and len(images.unreadable) == 4
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith("4 of the 9 image files cannot be read, left out of")
    assert all(f"{tree.root}/{path}: " in told for path in ("b/1.JPEG", "a/2.JPEG", "b/3.JPEG"))
    assert told.endswith("; and 1 more")


def test_too_many_bad_files_are_refused(tmp_path):
    tree = make_tree(tmp_path / "tree", [JPEG, JPEG, BAD["zero bytes"]])

    with pytest.raises(UserError, match=r"more than 1 % of the 3 image files .* \(.*/a/2.JPEG: it is empty\)"):
        pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))


def test_progress_says_how_long_it_takes(tree, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(packed, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(packed.time, "perf_counter", lambda: 100.0)
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
        pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))

    lines = [record.getMessage() for record in caplog.records]
    assert lines[4] == "5 of 10 images packed, 50 %; about 0 s left"
    assert lines[-1].endswith("there already, 3 of 3 shards")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "packed.json").unlink(), "holds no packed images: pack them there first"),
        (lambda folder: (folder / "packed.json").write_text("{}"), "packed.json is no header of packed images"),
        (lambda folder: change_header(folder, format=1), "that of another version: remove the folder, and pack them"),
        (lambda folder: change_header(folder, format=None), "that of another version: remove the folder, and pack"),
        (lambda folder: (folder / "00001.jpegs").write_bytes(b"short"), "00001.jpegs has 5 bytes where its table says"),
        (lambda folder: (folder / "00001.jpegs").unlink(), "00001.jpegs has 0 bytes where its table says"),
        (lambda folder: (folder / "00001.parquet").write_bytes(b"x"), "it is no table of a shard: remove it, and pack"),
        (lambda folder: rename_in(folder / "00001.parquet"), "00001.parquet is damaged, it is no table of a shard"),
        (lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "00001.parquet"), "it is no table of a shard"),
        (lambda folder: shutil.copy(folder / "00002.parquet", folder / "00001.parquet"), "it has 2 rows and not 4"),
    ],
)
def test_a_damaged_folder_is_refused(tree, tmp_path, damage, told):
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    damage(tmp_path / "packed")

    with pytest.raises(UserError, match=told):
        PackedImages.open(tmp_path / "packed")


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        (0, {"height": 0}),
        (1, {"width": -43}),
        (1, {"height": 64, "width": 43}),
        (2, {"height": SIDE, "width": packed.MAX_PIXELS // SIDE + 1}),
        (2, {"height": 2**62, "width": 2**62}),
        (2, {"width": None}),
        (1, {"label": None}),
        (0, {"path": None}),
        (2, {"offset": 0}),
        (0, {"offset": -8, "length": 8}),
        (3, {"length": 0}),
        (3, {"length": 2**62}),
    ],
)
def test_what_packing_does_not_write_is_not_believed(tree, tmp_path, row, changes):
    """A GPU decodes into as much memory as is written there. Removing the table is enough to have it made anew."""
    folder = tmp_path / "packed"
    pack_images(claim_folder(tree, folder, side=SIDE))
    before = files_in(folder)
    change_table(folder, row, **changes)

    with pytest.raises(UserError, match=r"00001\.(parquet is damaged|jpegs has .* where its table says)"):
        PackedImages.open(folder)
    (folder / "00001.parquet").unlink()
    pack_images(claim_folder(tree, folder, side=SIDE))
    assert files_in(folder) == before and len(PackedImages.open(folder)) == 10


def test_labels_that_were_not_packed_are_refused(tmp_path, lenient):
    """Those of all files are compared, also of one that was left out."""
    tree = make_tree(tmp_path / "tree", [JPEG] * 5 + [BAD["zero bytes"], JPEG])
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    assert PackedImages.open(tmp_path / "packed").labels.tolist() == [0, 1, 2, 3, 4, 6]
    change_table(tmp_path / "packed", 0, label=-999)

    with pytest.raises(UserError, match=r"the tables in .*packed have other labels .*: remove the folder, and pack"):
        PackedImages.open(tmp_path / "packed")


def test_what_packing_may_write_is_believed(tree, tmp_path):
    """As many pixels as are decoded, in an image that is as small as it was to be; and a table without checksums."""
    folder = tmp_path / "packed"
    pack_images(claim_folder(tree, folder, side=SIDE))
    change_table(folder, 2, height=packed.MAX_PIXELS // SIDE, width=SIDE)

    assert len(PackedImages.open(folder)) == 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "00001.parquet").write_bytes(b"x"),
        lambda folder: shutil.copy(folder / "00002.parquet", folder / "00001.parquet"),
        lambda folder: change_table(folder, 1, width=-43),
    ],
)
def test_packing_into_a_folder_with_a_damaged_table_is_refused(tree, tmp_path, damage):
    """Before hours are spent on the shards that are not there."""
    folder = tmp_path / "packed"
    pack_images(claim_folder(tree, folder, side=SIDE))
    damage(folder)
    (folder / "00002.parquet").unlink()

    with pytest.raises(UserError, match=r"00001.parquet is damaged, .*: remove it, and pack"):
        pack_images(claim_folder(tree, folder, side=SIDE))
    assert not (folder / "00002.parquet").exists()


def test_a_table_that_the_system_does_not_open_is_not_called_damaged(tree, tmp_path):
    """Nobody is told to remove a good one."""
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    claim = claim_folder(tree, tmp_path / "packed", side=SIDE)
    pack_images(claim)  # what reads tables is imported
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, allowed[1]))
    try:
        with pytest.raises(OSError, match=r"00000.parquet.*Too many open files"):
            pack_images(claim)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


def test_packing_into_a_folder_of_another_version_is_refused(tree, tmp_path):
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    change_header(tmp_path / "packed", format=None)

    with pytest.raises(UserError, match="that of another version: remove the folder, and pack them again"):
        claim_folder(tree, tmp_path / "packed", side=SIDE)


def test_no_images_are_not_packed(tmp_path):
    with pytest.raises(UserError, match="there are no images to pack into"):
        claim_folder(FileImages(tmp_path, [], torch.zeros(0, dtype=torch.int64)), tmp_path / "packed", side=SIDE)


def test_a_catalog_entry_opens_the_images(tree, tmp_path):
    entry = {"type": "collective_pipeline.io.packed.PackedImagesDataset", "filepath": str(tmp_path / "packed")}
    dataset = DataCatalog.from_config({"images": entry})["images"]

    assert not dataset.exists() and str(tmp_path / "packed") in str(dataset)
    with pytest.raises(DatasetError, match=f"^{tmp_path}/packed holds no packed images"):
        dataset.load()
    pack_images(claim_folder(tree, tmp_path / "packed", side=SIDE))
    assert dataset.exists() and len(dataset.load()) == 10
    with pytest.raises(DatasetError, match="is written by pack_images"):
        PackedImagesDataset(filepath="packed").save("anything")
