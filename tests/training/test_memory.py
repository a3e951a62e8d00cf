"""Too many seeds for the memory are split; too large a batch is refused with the size that would fit."""

import pytest
import torch

from collective_pipeline.config import PHASE1, GateConfig, ResNetArchitecture, UserError, VggArchitecture
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.models.matching import match_arm
from collective_pipeline.training import train
from collective_pipeline.training.memory import Need, estimate_need, groups_that_fit, split
from collective_pipeline.training.train import train_arm

CPU = torch.device("cpu")
NEED = Need(fixed=1000, per_image=10, per_eval_image=1)


def change(config, **changes):
    return type(config).model_validate(config.model_dump() | changes)


def test_as_few_groups_as_fit(training):
    """Each as large as the others, or one smaller; all seeds in their order."""
    need = NEED.of(training)  # 1000 + 10 * 32, or 1000 + 1024

    assert groups_that_fit(range(10), NEED, training, free=10 * 2 * need) == [list(range(10))]
    assert groups_that_fit(range(10), NEED, training, free=round(4 * need / 0.8)) == [
        [0, 1, 2],
        [3, 4, 5, 6],
        [7, 8, 9],
    ]
    assert split(range(3), 3) == [[0], [1], [2]]


def test_no_room_for_one_seed_names_the_knob_and_the_size(training):
    """And the size that it names does fit."""
    config = change(training, batch_size=4096)
    with pytest.raises(UserError, match=r"one seed needs about .* GiB .*: training\.batch_size=700 would fit"):
        groups_that_fit(range(3), NEED, config, free=10_000)
    assert len(groups_that_fit(range(3), NEED, change(config, batch_size=700), free=10_000)) == 3


def test_no_room_at_all_names_the_network(training):
    """No batch would be small enough."""
    with pytest.raises(UserError, match="choose a smaller network"):
        groups_that_fit(range(3), NEED, training, free=1000)


@pytest.mark.parametrize("model_type", ["collective", "very_deep_resnet"])
def test_the_estimate_grows_with_what_takes_memory(splits, model_type):
    """With the weights and the batch; phase 1 takes some tens of megabytes a seed, as measured on a GPU."""
    arm = match_arm(model_type, PHASE1.collective, PHASE1.baselines, in_dim=splits.in_dim, num_classes=10)
    config, num_images = PHASE1.training, len(splits.train)
    need = estimate_need(arm, config, num_images=num_images)

    assert need.fixed > 5 * 4 * arm.params
    assert 0.05e9 < need.of(config) < 0.3e9
    assert need.of(change(config, batch_size=2560)) > need.of(config)
    assert estimate_need(arm, change(config, ema_decay=0.9), num_images=num_images).fixed > need.fixed


GATES = GateConfig(embedding_dim=8)
IMAGES = {"image_shape": (3, 16, 16), "gates": GATES}
NETWORKS = {
    "basic": ResNetArchitecture(**IMAGES, blocks=(2, 2), width=8, gated=(0, 1)),
    "bottleneck": ResNetArchitecture(**IMAGES, blocks=(2, 2), width=8, bottleneck=True, gated=(0, 1)),
    "dense": ResNetArchitecture(image_shape=(3, 16, 16), blocks=(2, 2), width=8),
    "vgg": VggArchitecture(**IMAGES, channels=((8, 8), (16, 16)), normalise=True),
}


@pytest.mark.parametrize("architecture", NETWORKS.values(), ids=NETWORKS)
def test_the_estimate_covers_what_the_backward_pass_keeps(training, architecture):
    """Of every image of a batch, and is not far above it."""
    arm = make_image_arm("resnet18", architecture, num_classes=10)
    kept = {num_images: bytes_kept(build_arm(arm), torch.randn(1, num_images, arm.in_dim)) for num_images in (2, 4)}
    per_image = (kept[4] - kept[2]) / 2

    assert per_image < estimate_need(arm, training, num_images=0).per_image < 2.5 * per_image


def test_the_stage_that_needs_most_decides(training):
    """Four times the pixels need four times the memory of an image; the batch sizes are the stages' own."""
    network = ResNetArchitecture(image_shape=(3, 32, 32), blocks=(1,), width=8)
    arm = make_image_arm("resnet18", network, num_classes=10)
    config = change(training, eval_batch_size=1)
    need = estimate_need(arm, config, num_images=0)

    def in_stages(*stages):
        return need.of(change(config, stages=[{"epochs": 4 // len(stages), **stage} for stage in stages])) - need.fixed

    assert in_stages({}) == in_stages({"image_size": 32}) == need.of(config) - need.fixed
    assert in_stages({"image_size": 64, "batch_size": 8}, {"image_size": 32}) == in_stages({"image_size": 32})
    assert in_stages({"image_size": 64}, {"image_size": 32}) == 4 * in_stages({"image_size": 32})


def test_a_stage_that_does_not_fit_is_named_with_the_batch_that_would(training):
    """Not the batch size of the other stages."""
    need = Need(fixed=1000, per_image=10, per_eval_image=1, side=32)
    stages = [{"epochs": 2, "image_size": 32}, {"epochs": 2, "image_size": 64, "batch_size": 500}]
    config = change(training, stages=stages, batch_size=64, eval_batch_size=64)
    with pytest.raises(UserError, match=r"training\.stages: a batch_size of 175 at 64 pixels would fit$"):
        groups_that_fit([1], need, config, free=10_000)
    fitting = [stages[0], stages[1] | {"batch_size": 175}]
    assert groups_that_fit([1], need, change(config, stages=fitting), free=10_000) == [[1]]


def bytes_kept(model, x):
    """Of all that autograd saves in a forward pass, every storage once, parameters left out."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model.train()(x)
    assert len(outputs) == 2  # alive until here, and with them all that is saved
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def grouped(monkeypatch, groups):
    monkeypatch.setattr(train, "groups_that_fit", lambda *_, **__: groups)


@pytest.mark.parametrize("changes", [{}, {"early_stopping_patience": 1, "epochs": 12}])
def test_groups_give_the_results_of_all_at_once(arm, splits, training, monkeypatch, caplog, changes):
    """Seed by seed: the same rows in the same order, up to float rounding; said in the log."""
    config, seeds = change(training, learning_rate=1e-3, **changes), (1, 2, 3)
    whole, at_once = train_arm(arm, splits, config, seeds=seeds, device=CPU)
    grouped(monkeypatch, [[1, 2], [3]])
    told = []
    joined, in_groups = train_arm(arm, splits, config, seeds=seeds, device=CPU, callbacks=[told.append])

    assert "memory is too small for all 3 seeds at once; they train in 2 groups" in caplog.text
    assert joined.seeds == whole.seeds and joined.best_epochs == whole.best_epochs
    assert in_groups.num_epochs == at_once.num_epochs
    for one, other in zip(at_once.history, in_groups.history, strict=True):
        assert (one["seed"], one["epoch"]) == (other["seed"], other["epoch"])
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=3e-3)
    assert [epoch for epoch in told if not epoch.partial] == in_groups.epochs


class OutOfMemory:
    """A device that has room for as many seeds as `limit` at once."""

    def __init__(self, monkeypatch, limit: int) -> None:
        original = train.build_arm

        def build(arm, *, num_seeds):
            if num_seeds > limit:
                raise torch.OutOfMemoryError
            return original(arm, num_seeds=num_seeds)

        monkeypatch.setattr(train, "build_arm", build)


def test_running_out_of_memory_halves_the_groups(arm, splits, training, monkeypatch, caplog):
    """An estimate may be wrong, or another program may take what was free."""
    expected, _ = train_arm(arm, splits, training, seeds=(1, 2, 3, 4, 5), device=CPU)
    OutOfMemory(monkeypatch, limit=2)
    checkpoint, _ = train_arm(arm, splits, training, seeds=(1, 2, 3, 4, 5), device=CPU)

    assert "they train in 3 groups" in caplog.text
    assert checkpoint.seeds == (1, 2, 3, 4, 5)
    assert checkpoint.weights.keys() == expected.weights.keys()
    assert all(len(tensor) == 5 for tensor in checkpoint.weights.values())


def test_running_out_of_memory_with_one_seed_names_what_to_change(arm, splits, training, monkeypatch):
    """One sentence, with the arm's name."""
    OutOfMemory(monkeypatch, limit=0)
    with pytest.raises(UserError, match=r"^collective: one seed needs about .*training\.batch_size=16 would fit$"):
        train_arm(arm, splits, training, seeds=(1, 2), device=CPU)
