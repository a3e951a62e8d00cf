"""A batch is what its seed, epoch and number say, whoever reads it, and from wherever training goes on."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.data.test_packed import make_tree

from collective_pipeline.config import AugmentationConfig, ImageNetConfig, Stage, TrainingConfig, UserError
from collective_pipeline.data.augment import (
    NUM_COLOUR_DRAWS,
    NUM_CUTOUT_DRAWS,
    NUM_MOVE_DRAWS,
    colour_jitter,
    cut_out,
    draw_mix,
    mix,
    shift_scale_rotate,
)
from collective_pipeline.data.cropping import NUM_BOX_DRAWS, DecodedImages, random_boxes, resample
from collective_pipeline.data.feeding import NUM_CROP_DRAWS, Crop
from collective_pipeline.data.image_index import index_images
from collective_pipeline.data.jpeg import decode, encode
from collective_pipeline.data.streaming import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NUM_DRAWS,
    Share,
    StreamedBatches,
    StreamedImages,
    StreamedSplits,
    stream_index,
)
from collective_pipeline.randomness import make_generator

NUM_TRAIN, NUM_ALL, SIZE = 50, 63, 16
CROP = Crop(scale=(0.3, 0.9))
CONFIG = TrainingConfig(epochs=4, batch_size=8, eval_batch_size=4, mixup_alpha=0.4, cutmix_alpha=0.7)
ALL_OF_IT = AugmentationConfig(colour_probability=0.7, move_probability=0.6, cutout_probability=0.8)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Smooth images of many sizes, each with its row as its label."""
    generator = torch.Generator().manual_seed(0)
    files = []
    for row in range(NUM_ALL):
        coarse = torch.rand(1, 3, 4, 5, generator=generator)
        image = 255 * torch.nn.functional.interpolate(coarse, (24 + row % 7, 40 - row % 9), mode="bilinear")[0]
        files.append(encode(image.to(torch.uint8), 90))
    return make_tree(tmp_path_factory.mktemp("streamed"), files)


@pytest.fixture
def splits(source):
    """All rows are shuffled, so that a place among the training images is no row of the source."""
    rows = torch.randperm(NUM_ALL, generator=torch.Generator().manual_seed(1))
    train, val, test = (
        StreamedImages(source, part, SIZE, CROP, threads=2, most_bad=2)
        for part in (rows[:NUM_TRAIN], rows[NUM_TRAIN:57], rows[57:])
    )
    return StreamedSplits("imagenet", train, val, test, ("a", "b"), "digest", AugmentationConfig())


def batches_of(splits, *, share=None, config=CONFIG, stage=None, fuse=None):
    return StreamedBatches(splits.for_share(share or Share()), (1,), config, stage, fuse)


def test_what_is_made_of_a_batch_can_be_compiled(splits):
    """As one graph, and to the same features."""
    taken = []
    for fuse in (None, partial(torch.compile, backend="aot_eager", fullgraph=True)):
        batches = batches_of(replace(splits, augmentation=ALL_OF_IT), fuse=fuse).for_stage(Stage(epochs=1))
        batches.begin(1)
        batches.load(0, 1)
        taken.append(batches.take(torch.zeros(1, dtype=torch.int64)))
    (plain, labels), (compiled, same_labels) = taken

    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(same_labels.others_SB, labels.others_SB) and torch.equal(same_labels.share_S, labels.share_S)


@pytest.mark.parametrize(
    ("number", "planned"), [(1, 1), (2, 2), (4, 4), (1, 2), (1, 4), (2, 4), (2, 1), (4, 1), (4, 2)]
)
def test_the_processes_of_any_split_read_every_image_of_an_update_once_with_the_same_draws(splits, number, planned):
    """As many planned ranks, fewer that play several, more that share a batch: together an update is the same."""
    config = CONFIG.model_copy(update={"batch_size": 4})
    shares = [batches_of(splits, share=Share(rank, number, planned), config=config) for rank in range(number)]
    whole = batches_of(splits, share=Share(0, 1, planned), config=config)
    for batches in (*shares, whole):
        batches.begin(2)
    num_updates = NUM_TRAIN // (4 * planned)

    assert all(len(batches) == num_updates * batches.ranks_played for batches in shares)
    for name in ("rows_KB", "crops_KBD", "draws_KBD"):
        parts = [getattr(batches, name).reshape(num_updates, -1) for batches in shares]
        assert torch.equal(torch.cat(parts, dim=1), getattr(whole, name).reshape(num_updates, -1)), name
    # A batch is mixed alike by all that share it.
    for batches in shares:
        first = batches.share.rank * batches.ranks_played // batches.share.parts
        of_ranks = whole.mixes_KD.view(num_updates, planned, -1)[:, first : first + batches.ranks_played]
        assert torch.equal(batches.mixes_KD, of_ranks.flatten(0, 1))
    used = whole.rows_KB.unique()
    assert len(used) == whole.rows_KB.numel() == num_updates * 4 * planned
    assert torch.isin(used, splits.train.rows).all()


def test_a_batch_is_decoded_cut_jittered_moved_normalised_and_mixed_by_its_draws(splits):
    """The slow definition: every step by hand, from the seed's own generators."""
    splits = replace(splits, augmentation=ALL_OF_IT)
    batches = batches_of(splits)
    epoch, number = 3, 2
    batches.begin(epoch)
    batches.load(number, 1)
    features, labels = batches.take(torch.zeros(1, dtype=torch.int64))

    order = torch.randperm(NUM_TRAIN, generator=make_generator(1, f"order/{epoch}"))[:48].view(6, 8)
    rows = splits.train.rows[order[number]]
    draws = torch.rand(48, NUM_CROP_DRAWS + NUM_DRAWS, generator=make_generator(1, f"augmentation/{epoch}"))
    crop, colour, move, cut = draws.view(6, 8, -1)[number].split(
        [NUM_CROP_DRAWS, NUM_COLOUR_DRAWS, NUM_MOVE_DRAWS, NUM_CUTOUT_DRAWS], dim=1
    )
    whole = decode(splits.train.source.read(rows.tolist()))
    boxes = random_boxes(crop[:, :NUM_BOX_DRAWS], torch.tensor([image.shape[1:] for image in whole]), scale=CROP.scale)
    x = resample(DecodedImages.of(whole), boxes, crop[:, -1] < CROP.flip, SIZE).float() / 255
    own = ALL_OF_IT
    strengths = {name: getattr(own, name) for name in ("brightness", "contrast", "saturation", "hue")}
    x = colour_jitter(x, colour, **strengths, probability=0.7)
    x = shift_scale_rotate(x, move, shift=own.shift, scale=own.zoom, degrees=own.degrees, probability=0.6)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x = cut_out((x - mean) / std, cut, round(own.cutout * SIZE), probability=0.8)
    mixes = draw_mix(make_generator(1, f"mixing/{epoch}"), 6, mixup_alpha=0.4, cutmix_alpha=0.7)
    wanted = mix(x.unsqueeze(0), rows.unsqueeze(0), mixes[number : number + 1])

    assert torch.allclose(features, wanted.images.flatten(2), atol=1e-4)
    assert torch.equal(labels.labels_SB, rows.unsqueeze(0))  # a label is its row here
    assert torch.equal(labels.others_SB, wanted.other_labels) and torch.equal(labels.share_S, wanted.share)


def taken(batches, first, number):
    """The features of some batches, loaded one by one."""
    features = []
    for i in range(first, first + number):
        batches.load(i, 1)
        features.append(batches.take(torch.zeros(1, dtype=torch.int64))[0])
    return torch.stack(features)


def test_an_epoch_that_goes_on_in_its_middle_reads_what_was_left_of_it(splits):
    """Prepared or not, after another epoch or not."""
    straight = batches_of(splits)
    straight.begin(1)
    straight.prepare(2)
    taken(straight, 0, 6)
    straight.begin(2)
    second = taken(straight, 0, 6)
    straight.begin(1)
    straight.prepare(5)  # of no use for what comes

    straight.begin(2)
    for batches in (straight, batches_of(splits)):
        batches.begin(2)
        assert torch.equal(taken(batches, 4, 2), second[4:])


def test_the_batches_of_an_update_lie_side_by_side(splits):
    config = CONFIG.model_copy(update={"accumulation_steps": 3})
    together, single = batches_of(splits, config=config), batches_of(splits)
    for batches in (together, single):
        batches.begin(1)
    together.load(3, 3)
    side_by_side = torch.stack([together.take(torch.tensor([step]))[0] for step in (3, 4, 5)])

    assert torch.equal(side_by_side, taken(single, 3, 3))


def test_a_stage_trains_and_validates_at_its_size(splits):
    stage = Stage(epochs=1, image_size=8, batch_size=4)
    batches = batches_of(splits).for_stage(stage)
    batches.begin(1)
    batches.load(0, 1)
    ((images, _), *_) = splits.val.for_stage(stage).chunks(4)

    assert batches.take(torch.zeros(1, dtype=torch.int64))[0].shape == (1, 4, 3 * 8 * 8) and len(batches) == 12
    assert images.shape == (4, 3, 8, 8)
    assert next(splits.val.for_stage(Stage(epochs=1)).chunks(4))[0].shape == (4, 3, SIZE, SIZE)


def test_what_cannot_be_cut_into_batches_is_refused(splits):
    with pytest.raises(UserError, match="8 GPUs with batches of 8 images would need more than the 50 training images"):
        batches_of(splits, share=Share(0, 8, 8))
    with pytest.raises(UserError, match="batches of 8 images cannot be shared by 3 GPUs evenly"):
        batches_of(splits, share=Share(0, 3, 1))
    with pytest.raises(UserError, match="begun on 4 GPUs and 6 are neither"):
        Share(0, 6, 4)


@pytest.mark.parametrize("size", [1, 4])
def test_a_file_that_cannot_be_read_is_left_out_where_the_middle_is_seen(splits, source, tmp_path, size):
    """Also as the only one of its batch."""
    rows = splits.val.rows.tolist()
    files = [b"" if row in {rows[1], rows[6]} else source.read([row])[0] for row in range(NUM_ALL)]
    val = replace(splits.val, source=make_tree(tmp_path, files))

    labels = torch.cat([labels for _, labels in val.chunks(size)])

    assert labels.tolist() == [row for row in rows if row not in {rows[1], rows[6]}]


@pytest.mark.parametrize(("max_bad", "most_bad"), [(0.04, 2), (0.019, 0)])
def test_how_many_files_may_be_bad_is_of_all_parts_and_not_of_the_one_that_has_them(
    source, tmp_path, max_bad, most_bad
):
    for row in range(50):
        folder = tmp_path / ("train" if row < 40 else "val") / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.jpg").write_bytes(source.read([row])[0])
    test_files = sorted((tmp_path / "val" / "a").iterdir())
    config = ImageNetConfig(val_fraction=0.1, threads=2, max_bad=max_bad)

    def num_readable():
        splits = stream_index(index_images(tmp_path), config, split_seed=1)
        return sum(len(labels) for _, labels in splits.test.chunks(10))

    for file in test_files[:most_bad]:
        file.write_bytes(b"")
    assert num_readable() == 10 - most_bad
    test_files[most_bad].write_bytes(b"no image")
    told = rf"at least {most_bad + 1} image files? cannot be read, where {most_bad} of all 50 may be so: .*max_bad"
    with pytest.raises(UserError, match=told):
        num_readable()
    test_files[most_bad].write_bytes(b"")  # which is known before anything is trained
    with pytest.raises(UserError, match=told):
        stream_index(index_images(tmp_path), config, split_seed=1)
