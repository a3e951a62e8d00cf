"""Raw images to probabilities: the network's own after its preprocessing, averaged over seeds that have weights."""

from dataclasses import replace

import pytest
import torch

from collective_pipeline.config import Arm, ImageSpec, MlpArchitecture, UserError
from collective_pipeline.evaluation.predict import BATCH_SIZE, Predictor, tabulate
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.randomness import make_generator

CPU = torch.device("cpu")
SEEDS = (3, 7, 9)


def checkpoint_of(shape):
    """Three seeds of a small network for images of this shape."""
    channels, height, width = shape
    arm = Arm(
        model_type="shallow",
        in_dim=channels * height * width,
        num_classes=3,
        params=1234,
        target_params=1230,
        architecture=MlpArchitecture(hidden_dims=(8, 6)),
    )
    spec = ImageSpec(shape=shape, mean=(0.25,) * channels, std=(0.5,) * channels, class_names=("cat", "dog", "7"))
    model = build_arm(arm, num_seeds=len(SEEDS))
    initialise(model, [make_generator(seed, "weights") for seed in SEEDS])
    return Checkpoint(arm, "mnist", spec, SEEDS, (4, 9, 1), model.state_dict())


def images_of(count, shape):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 5)])
def test_probabilities_are_the_networks_own_averaged_over_seeds(shape):
    """Bytes / 255, minus the mean, over the deviation, through each seed's network, softmax, mean."""
    checkpoint, images = checkpoint_of(shape), images_of(11, shape)
    x = ((images / 255 - 0.25) / 0.5).flatten(1)
    with torch.no_grad():
        expected = checkpoint.build()(x.unsqueeze(0))[0].softmax(-1).mean(0)
    probabilities = Predictor(checkpoint, CPU)(images)

    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(11))


def test_the_mean_is_that_of_each_seed_alone():
    checkpoint, images = checkpoint_of((1, 4, 4)), images_of(5, (1, 4, 4))
    alone = [Predictor(checkpoint, CPU, seed=seed)(images) for seed in SEEDS]

    torch.testing.assert_close(Predictor(checkpoint, CPU)(images), torch.stack(alone).mean(0))
    assert not torch.allclose(alone[0], alone[1])


def test_a_seed_without_good_weights_is_left_out():
    """Its weights are those of a network that diverged: one NaN would make all of the mean NaN."""
    checkpoint, images = checkpoint_of((1, 4, 4)), images_of(5, (1, 4, 4))
    weights = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    for tensor in weights.values():
        tensor[1] = torch.nan
    broken = replace(checkpoint, weights=weights, best_epochs=(4, 0, 1))

    torch.testing.assert_close(Predictor(broken, CPU)(images), Predictor(checkpoint.of_seeds([3, 9]), CPU)(images))
    with pytest.raises(UserError, match=r"shallow diverged with seed 7 before it had good weights"):
        Predictor(broken, CPU, seed=7)
    with pytest.raises(UserError, match=r"shallow diverged with every seed"):
        Predictor(replace(broken, best_epochs=(0, 0, 0)), CPU)


def test_more_images_than_a_batch_are_answered_in_order():
    checkpoint, images = checkpoint_of((1, 2, 2)), images_of(BATCH_SIZE + 3, (1, 2, 2))
    predictor = Predictor(checkpoint, CPU)

    torch.testing.assert_close(predictor(images)[-5:], predictor(images[-5:]))


def test_images_of_one_channel_need_not_name_it():
    predictor, images = Predictor(checkpoint_of((1, 4, 4)), CPU), images_of(5, (1, 4, 4))

    assert torch.equal(predictor(images.squeeze(1)), predictor(images))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.zeros(2, 1, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)],
    ids=["shape", "type", "no_batch"],
)
def test_other_images_are_refused(images):
    """Numbers on [0, 1] for bytes would be answered, and wrongly."""
    with pytest.raises(UserError, match=r"give bytes, torch.uint8 of shape \(images, 1, 4, 4\)"):
        Predictor(checkpoint_of((1, 4, 4)), CPU)(images)


def test_no_images_have_an_empty_table():
    """Of the columns that images would have."""
    predictor, none = Predictor(checkpoint_of((1, 4, 4)), CPU), images_of(0, (1, 4, 4))
    table = tabulate(predictor(none), ("cat", "dog", "7"))

    assert table.empty and list(table.columns) == ["prediction", "probability", "cat", "dog", "7"]


def test_an_unknown_seed_is_refused():
    with pytest.raises(UserError, match=r"this checkpoint of shallow has no seed 4: choose from 3, 7, 9"):
        Predictor(checkpoint_of((1, 4, 4)), CPU, seed=4)


def test_the_table_names_classes():
    table = tabulate(torch.tensor([[0.25, 0.5, 0.25], [0.75, 0.0, 0.25]]), ("cat", "dog", "7"))

    assert list(table.columns) == ["prediction", "probability", "cat", "dog", "7"]
    assert table.values.tolist() == [["dog", 0.5, 0.25, 0.5, 0.25], ["cat", 0.75, 0.75, 0.0, 0.25]]
