"""A collective on images is its six equations, for every seed alone, and its members are read as any collective's."""

import pytest
import torch
import torch.nn.functional as F
from tests.models.test_collective import separate, separate_members, unsettle
from tests.models.test_mixture import BATCH, CLASSES, SEEDS, SHAPE, make, make_images
from torch import nn

from collective_pipeline.config import Arm, ImageCollectiveArchitecture, ImageSpec, UserError
from collective_pipeline.evaluation.members import ablation_drops
from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from collective_pipeline.models.mixture import ConvBlock, ResidualBlock


def tiny(**changes):
    """A collective that is small enough for a moment."""
    given = {"image_shape": SHAPE, "channels": (3, 4, 5, 6), "analyst_hidden": (8, 7), "analyst_output": 5} | changes
    return ImageCollectiveArchitecture.model_validate(given)


TINY = {
    "default": tiny(),
    "four experts, two analysts": tiny(n_experts=4, n_analysts=2, analyst_hidden=(9, 8, 7)),
    "one of each": tiny(n_experts=1, n_analysts=1, c_expert=1.0),
    "hardly encoded": tiny(c_expert=1e-6),
}


@pytest.fixture(params=list(TINY))
def architecture(request):
    return TINY[request.param]


def conv(module, s, n, x_BCHW):
    return F.conv2d(x_BCHW, module.weight[s, n], padding=module.padding, groups=module.groups)


def norm(module, s, n, x_BCHW):
    statistics, affine = (module.running_mean, module.running_var), (module.weight, module.bias)
    return F.batch_norm(x_BCHW, *(tensor[s, n] for tensor in [*statistics, *affine]))


def stem(layers, s, x_BCHW):
    for layer in layers:
        match layer:
            case ConvBlock():
                x_BCHW = norm(layer[1], s, 0, conv(layer[0], s, 0, x_BCHW)).relu()
            case ResidualBlock():
                x_BCHW = (stem(layer.blocks, s, x_BCHW) + conv(layer.shortcut, s, 0, x_BCHW)).relu()
            case nn.MaxPool2d():
                x_BCHW = layer(x_BCHW)
    return x_BCHW


def expert(experts, s, n, f_BCHW):
    y_BCHW = conv(experts.pointwise, s, n, conv(experts.depthwise, s, n, f_BCHW))
    return norm(experts.norm, s, n, y_BCHW).relu().mean(dim=(2, 3))


def test_it_is_its_equations_member_by_member(architecture):
    """Written for one seed and one member at a time, with torch's own functions."""
    dropouts = ("member_dropout", "encoder_dropout", "head_dropout")
    model = unsettle(make(architecture.model_copy(update=dict.fromkeys(dropouts, 0.0)))).eval()
    x_SBI = make_images().double()
    logits, parts = model(x_SBI)

    for s in range(len(SEEDS)):
        f = stem(model.stem, s, x_SBI[s].unflatten(1, SHAPE))
        p = f.mean(dim=(2, 3))
        e = [expert(model.experts, s, n, f) for n in range(architecture.n_experts)]
        h = separate(model.expert_encoder, s).eval()(torch.cat(e, dim=1))
        a = [analyst.eval()(torch.cat([p, h], dim=1)) for analyst in separate_members(model.analysts, s)]
        z = separate(model.head, s)(torch.cat(a, dim=1))

        torch.testing.assert_close(parts["experts"][s], torch.stack(e))
        torch.testing.assert_close(parts["analysts"][s], torch.stack(a))
        torch.testing.assert_close(logits[s], z)


def test_shapes(architecture):
    logits, parts = make(architecture).train()(make_images())

    assert logits.shape == (len(SEEDS), BATCH, CLASSES)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "experts": (len(SEEDS), architecture.n_experts, BATCH, 6),
        "analysts": (len(SEEDS), architecture.n_analysts, BATCH, 5),
    }


def test_a_gradient_reaches_every_parameter(architecture):
    """In evaluation: norms hide biases before them, and dropout features."""
    model = unsettle(make(architecture)).eval()
    model(make_images().double())[0].square().sum().backward()

    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.flatten(1).any(dim=1).all(), name


def test_gradients_are_finite_with_every_dropout(architecture):
    model = make(architecture).train()
    logits, parts = model(make_images())
    (logits.square().sum() + sum(part.square().sum() for part in parts.values())).backward()

    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.fixture
def saved(architecture, tmp_path):
    """A file of a network whose statistics have moved; the network."""
    model = make(architecture).train()
    model(make_images())
    about = {"model_type": "conv_collective", "in_dim": 144, "num_classes": CLASSES}
    arm = Arm(**about, params=1, target_params=1, architecture=architecture)
    images = ImageSpec(shape=SHAPE, mean=(0.1, 0.2), std=(0.3, 0.2), class_names=tuple("abcd"))
    checkpoint = Checkpoint(arm, "cifar10", images, SEEDS, (1, 1, 1), model.state_dict())
    save_checkpoint(checkpoint, tmp_path / "best.safetensors")
    return tmp_path / "best.safetensors", model.eval()


def test_a_file_of_it_decides_as_the_network_that_was_saved(saved):
    """Bit for bit; one of its seeds alone to rounding."""
    path, model = saved
    reloaded = load_checkpoint(path).build()
    one = load_checkpoint(path).of_seeds([7]).build()

    assert torch.equal(reloaded(make_images())[0], model(make_images())[0])
    assert torch.allclose(one(make_images()[1:2])[0], model(make_images())[0][1:2], atol=1e-5)


@pytest.mark.parametrize("architecture", [tiny()])
def test_a_file_whose_images_lie_on_their_side_is_refused(saved):
    """They have as many pixels, but not those that the convolutions read."""
    checkpoint = load_checkpoint(saved[0])
    turned = checkpoint.images.model_copy(update={"shape": (2, 9, 8)})
    checkpoint = Checkpoint(checkpoint.arm, "cifar10", turned, SEEDS, (1, 1, 1), checkpoint.weights)
    save_checkpoint(checkpoint, saved[0])

    with pytest.raises(UserError, match="the images that it names are not those that its network reads"):
        load_checkpoint(saved[0])


def test_its_members_are_ablated_as_those_of_any_collective(architecture):
    """An expert that says its mean reaches the logits through the encoder alone, an analyst directly."""
    model = unsettle(make(architecture)).eval()
    images, labels = make_images().double(), torch.arange(BATCH) % CLASSES
    drops = ablation_drops(model, images, labels)
    with torch.no_grad():
        logits, parts = model(images)
        said = parts["analysts"].clone()
        said[:, -1] = said[:, -1].mean(dim=1, keepdim=True)
        without = model.head(said.transpose(1, 2).flatten(2).unsqueeze(1)).squeeze(1)

    lost = ((logits.argmax(dim=-1) == labels).double() - (without.argmax(dim=-1) == labels).double()).mean(dim=1)
    torch.testing.assert_close(drops["analysts"][:, -1], 100 * lost)
    assert drops["experts"].shape == (len(SEEDS), architecture.n_experts)
    assert drops["analysts"].shape == (len(SEEDS), architecture.n_analysts)


def test_images_that_pooling_would_use_up_are_refused():
    with pytest.raises(UserError, match="images of 3x9 pixels are too small"):
        make(tiny(image_shape=(2, 3, 9)))
