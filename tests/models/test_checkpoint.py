"""A checkpoint is whole or not there, and rebuilds its network without anything else."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from collective_pipeline.config import Arm, CollectiveConfig, ImageSpec, MlpArchitecture, ModelDropoutConfig, UserError
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from collective_pipeline.randomness import make_generator

SEEDS = (3, 7)
ARCHITECTURES = {
    "collective": CollectiveConfig(
        expert_hidden=(8, 6),
        analyst_hidden=(8, 6),
        vary_analyst_architectures=True,
        analyst_encoder=True,
        head="encoder_head",
        model_dropout=ModelDropoutConfig(expert_rate=0.5, form="original"),
    ),
    "shallow": MlpArchitecture(hidden_dims=(8, 6)),
    "deep_resnet": MlpArchitecture(hidden_dims=(8, 8, 6), residual=True),
}


def checkpoint_of(model_type):
    """A checkpoint of a small network whose norms have seen a batch, and that network."""
    arm = Arm(
        model_type=model_type,
        in_dim=12,
        num_classes=3,
        params=1234,
        target_params=1230,
        architecture=ARCHITECTURES[model_type],
    )
    model = build_arm(arm, num_seeds=len(SEEDS))
    initialise(model, [make_generator(seed, "weights") for seed in SEEDS])
    model.train()(torch.randn(len(SEEDS), 20, 12))
    images = ImageSpec(shape=(3, 2, 2), mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1), class_names=("a", "b", "c"))
    return Checkpoint(arm, "mnist", images, SEEDS, (4, 9), model.state_dict()), model.eval()


@pytest.fixture(params=list(ARCHITECTURES))
def trained(request):
    """A checkpoint of every kind of network, and the network itself."""
    torch.manual_seed(0)
    return checkpoint_of(request.param)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint and the file it was saved to."""
    checkpoint, _ = checkpoint_of("shallow")
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    return checkpoint, tmp_path / "model.safetensors"


def test_what_is_saved_is_what_is_loaded(trained, tmp_path):
    """Every field and every bit of every weight."""
    checkpoint, _ = trained
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")

    for name in ("arm", "dataset", "images", "seeds", "best_epochs"):
        assert getattr(loaded, name) == getattr(checkpoint, name)
    assert loaded.weights.keys() == checkpoint.weights.keys()
    for name, tensor in checkpoint.weights.items():
        assert torch.equal(loaded.weights[name], tensor), name
        assert loaded.weights[name].dtype == tensor.dtype


def test_a_loaded_checkpoint_builds_the_network_that_was_saved(trained, tmp_path):
    """In evaluation mode, with the same logits and parts."""
    checkpoint, model = trained
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    rebuilt = load_checkpoint(tmp_path / "model.safetensors").build()
    x = torch.randn(len(SEEDS), 5, 12)

    assert not rebuilt.training
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(x), model(x))


def test_weights_are_saved_however_they_lie_in_memory(tmp_path):
    """Views and transposed tensors, as the chosen seeds of a larger stack are."""
    checkpoint, _ = checkpoint_of("shallow")
    scattered = {name: t.repeat_interleave(2, dim=-1)[..., ::2] for name, t in checkpoint.weights.items()}
    save_checkpoint(replace(checkpoint, weights=scattered), tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors").weights

    assert not any(tensor.is_contiguous() for tensor in scattered.values())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in checkpoint.weights.items())


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    """The file stands alone in its folder."""
    path = tmp_path / "a" / "b" / "model.safetensors"
    save_checkpoint(checkpoint_of("shallow")[0], path)

    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99], ids=["empty", "header", "json", "half", "end"])
def test_a_truncated_file_is_refused(saved, keep):
    """Wherever it was cut, the message names it."""
    _, path = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])

    with pytest.raises(UserError, match=path.name) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\x00" * 200, b"\xff" * 200, b"not a checkpoint at all", b"PK\x03\x04" + b"\x00" * 100]
)
def test_a_damaged_file_is_refused(saved, content):
    """Its beginning overwritten, the message names it."""
    _, path = saved
    path.write_bytes(content + path.read_bytes()[len(content) :])

    with pytest.raises(UserError, match=path.name):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "about",
    [
        None,
        {"arm": "{}", "dataset": "mnist", "seeds": "[1]", "best_epochs": "[1]"},
        {"arm": "no json", "dataset": "mnist", "seeds": "[1]", "best_epochs": "[1]"},
        {"format": "pt"},
    ],
    ids=["nothing", "empty_arm", "no_json", "other_words"],
)
def test_a_foreign_file_is_refused(tmp_path, about):
    """Tensors that are not one of our checkpoints, the message names the file."""
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(3)}, path, about)

    with pytest.raises(UserError, match="foreign"):
        load_checkpoint(path)


@pytest.mark.parametrize("field", ["arm", "dataset", "images", "seeds", "best_epochs"])
def test_a_file_without_one_of_our_fields_is_refused(tmp_path, field):
    """All of them are needed to use it."""
    checkpoint, _ = checkpoint_of("shallow")
    about = {
        "arm": checkpoint.arm.model_dump_json(),
        "dataset": "mnist",
        "images": checkpoint.images.model_dump_json(),
        "seeds": "[3, 7]",
        "best_epochs": "[4, 9]",
    }
    del about[field]
    save_file({"weight": torch.ones(3)}, tmp_path / "partly.safetensors", about)

    with pytest.raises(UserError, match=f"partly.* lacks '{field}'"):
        load_checkpoint(tmp_path / "partly.safetensors")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "folder"])
def test_what_is_no_file_is_refused(tmp_path, make):
    """Missing, or a folder: the message names the path."""
    path = tmp_path / "model.safetensors"
    make(path)

    with pytest.raises(UserError, match=path.name):
        load_checkpoint(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(saved, monkeypatch, step):
    """The file from before is whole, and no partial one stands beside it."""
    _, path = saved
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (type(path), "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(checkpoint_of("deep_resnet")[0], path)

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_new_checkpoint_replaces_the_old_one(saved):
    """Writing twice leaves the second."""
    _, path = saved
    save_checkpoint(checkpoint_of("deep_resnet")[0], path)

    assert load_checkpoint(path).arm.model_type == "deep_resnet"


@pytest.mark.parametrize("change", [{"shape": (3, 2, 3)}, {"mean": (0.1,)}, {"class_names": ("a", "b")}])
def test_images_that_the_network_cannot_read_are_refused(saved, change):
    """A header that was changed by hand."""
    checkpoint, path = saved
    save_checkpoint(replace(checkpoint, images=checkpoint.images.model_copy(update=change)), path)

    with pytest.raises(UserError, match="the images that it names are not those that its network reads"):
        load_checkpoint(path)


def test_one_seed_can_be_taken_out(trained):
    """It answers as it does beside the others."""
    checkpoint, model = trained
    alone = checkpoint.of_seeds([7])
    x = torch.randn(len(SEEDS), 5, 12)

    assert (alone.seeds, alone.best_epochs) == ((7,), (9,))
    with torch.no_grad():
        torch.testing.assert_close(alone.build()(x[1:])[0], model(x)[0][1:])
