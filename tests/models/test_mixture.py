"""A mixture is its equations, for every seed alone; its size is the original's, and a file of it decides as it did."""

import pytest
import torch
from torch import nn

from collective_pipeline.config import Arm, ImageSpec, MixtureArchitecture, SubModelArchitecture, UserError
from collective_pipeline.evaluation.cost import count_macs
from collective_pipeline.models.build import build_model, initialise
from collective_pipeline.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from collective_pipeline.models.layers import Dropout, RandomBits
from collective_pipeline.models.mixture import normal_from_bits
from collective_pipeline.randomness import make_generator

SHAPE, CLASSES, BATCH = (2, 8, 9), 4, 5
SEEDS = (3, 7, 11)
NO_ROUTING = {"diversity": 0, "balance": 0}
CPU = torch.device("cpu")


def tiny(**changes):
    """A mixture that is small enough for a moment."""
    given = {"image_shape": SHAPE, "channels": (3, 4, 5, 6), "gate_width": 7} | changes
    return MixtureArchitecture.model_validate(given)


TINY = {
    "features": tiny(),
    "logits": tiny(combine="logits"),
    "five experts": tiny(n_experts=5),
    "single expert": tiny(n_experts=1, losses=NO_ROUTING),
    "sub-model": SubModelArchitecture(image_shape=SHAPE, channels=(3, 4, 5, 6)),
}


def make(architecture, seeds=SEEDS):
    model = build_model(architecture, in_dim=144, num_classes=CLASSES, num_seeds=len(seeds))
    initialise(model, [make_generator(seed, "weights") for seed in seeds])
    return model


def make_images(num_seeds=3):
    return torch.randn(num_seeds, BATCH, 144, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=list(TINY))
def architecture(request):
    return TINY[request.param]


@pytest.mark.parametrize(
    ("architecture", "num_classes", "params"),
    [
        (SubModelArchitecture(image_shape=(3, 32, 32)), 5, 1_404_997),
        (MixtureArchitecture(image_shape=(3, 32, 32)), 15, 2_280_274),
        (MixtureArchitecture(image_shape=(3, 64, 64)), 12, 2_277_967),
        (MixtureArchitecture(image_shape=(3, 32, 32), combine="logits"), 15, 2_093_680),
        (MixtureArchitecture(image_shape=(3, 32, 32), n_experts=8), 15, 2_280_274 + 5 * (267_776 + 257)),
    ],
)
def test_sizes_are_the_originals(architecture, num_classes, params):
    with torch.device("meta"):
        model = build_model(architecture, in_dim=0, num_classes=num_classes, num_seeds=2)

    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * params


def test_all_experts_are_run_for_every_image():
    for side, millions in ((32, 380), (64, 1521)):
        mixture = MixtureArchitecture(image_shape=(3, side, side))
        arm = Arm(
            model_type="merged_moe", in_dim=3 * side**2, num_classes=15, params=1, target_params=1, architecture=mixture
        )

        assert count_macs(arm) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_shapes(architecture):
    model = make(architecture).train()
    logits, parts = model(make_images())

    assert logits.shape == (len(SEEDS), BATCH, CLASSES)
    if isinstance(architecture, MixtureArchitecture):
        assert parts["gates"].shape == (len(SEEDS), BATCH, architecture.n_experts)
        assert torch.allclose(parts["gates"].sum(dim=-1), torch.ones(len(SEEDS), BATCH))


def test_a_gradient_reaches_every_parameter(architecture):
    model = make(architecture).train()
    model(make_images())[0].square().sum().backward()

    assert not [name for name, weight in model.named_parameters() if not weight.grad.isfinite().all()]
    assert not [name for name, weight in model.named_parameters() if (weight.grad.flatten(1) == 0).all(dim=1).any()]


def test_a_file_of_a_mixture_decides_as_the_network_that_was_saved(tmp_path, architecture):
    """Bit for bit, its temperature included."""
    model = make(architecture).train()
    model(make_images())
    if isinstance(architecture, MixtureArchitecture) and architecture.n_experts > 1:
        model.gate.temperature.copy_(torch.tensor([0.5, 0.7, 1.1]))
    is_sub_model = architecture.kind == "sub_model"
    arm = Arm(
        model_type="sub_model" if is_sub_model else "merged_moe",
        in_dim=144, num_classes=CLASSES, params=1, target_params=1, architecture=architecture,
    )  # fmt: skip
    images = ImageSpec(shape=SHAPE, mean=(0.1, 0.2), std=(0.3, 0.2), class_names=tuple("abcd"))
    save_checkpoint(
        Checkpoint(arm, "cifar10", images, SEEDS, (1, 1, 1), model.state_dict()), tmp_path / "best.safetensors"
    )
    reloaded = load_checkpoint(tmp_path / "best.safetensors").build()

    assert torch.equal(reloaded(make_images())[0], model.eval()(make_images())[0])
    one = load_checkpoint(tmp_path / "best.safetensors").of_seeds([7]).build()
    assert torch.allclose(one(make_images()[1:2])[0], model(make_images())[0][1:2], atol=1e-5)


def test_the_temperature_divides_the_logits_of_the_gate():
    model = make(tiny()).eval()
    model.gate.temperature.copy_(torch.tensor([2.0, 0.5, 1e-4]))
    _, pooled = model.read(make_images())
    z = model.gate.network(pooled).squeeze(1)
    gates = model(make_images())[1]["gates"]

    assert torch.allclose(gates, (z / torch.tensor([2.0, 0.5, 1e-4]).view(3, 1, 1)).softmax(dim=-1))
    assert torch.allclose(gates[2].amax(dim=-1), torch.ones(BATCH))


def test_noise_is_added_after_the_temperature_and_only_while_training():
    model = make(tiny(gate_dropout=0.0, gate_noise=0.3), seeds=(1,)).eval()
    _, pooled = model.read(make_images(1))
    model.gate.network.eval()
    quiet = model.gate(pooled)
    model.gate.training = True
    model.gate.draw.bits = torch.tensor([-(2**15), 0, 2**15 - 1], dtype=torch.int16).expand(1, 1, BATCH, 3)
    noisy = model.gate(pooled)
    added = (noisy / quiet).log()

    assert torch.allclose((added - added[..., 1:2]) / 0.3, normal_from_bits(model.gate.draw.bits).squeeze(1), atol=1e-3)


def test_the_noise_is_normal():
    noise = normal_from_bits(torch.arange(-(2**15), 2**15, dtype=torch.int16)).double()

    assert noise.mean().abs() < 1e-6 and noise.std().item() == pytest.approx(1, abs=1e-3)
    assert (noise.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=1e-3)


def test_dropout_of_the_experts_is_pixel_by_pixel_and_then_feature_by_feature():
    experts = make(tiny(expert_dropout=0.5)).experts

    assert [site.dim for site in experts.modules() if isinstance(site, RandomBits)] == [6 * 2 * 2, 6]
    assert all(site.rate == 0.5 for site in experts.modules() if isinstance(site, Dropout))


@pytest.mark.parametrize("combine", ["features", "logits"])
def test_an_expert_alone_is_what_a_one_hot_gate_gives(combine):
    model = make(tiny(combine=combine)).eval()
    images = make_images()
    alone, without = model.expert_logits(images), model.logits_without(images)
    gates = model(images)[1]["gates"]
    features, pooled = model.read(images)

    assert alone.shape == without.shape == (len(SEEDS), 3, BATCH, CLASSES)
    for n in range(3):
        hot = nn.functional.one_hot(torch.tensor(n), 3).expand_as(gates).float()
        rest = gates * (1 - hot) / (gates * (1 - hot)).sum(dim=-1, keepdim=True)
        assert torch.allclose(alone[:, n], model.head(hot, features, pooled), atol=1e-6)
        assert torch.allclose(without[:, n], model.head(rest, features, pooled), atol=1e-6)


def test_mixed_logits_are_the_experts_weighed():
    model = make(tiny(combine="logits")).eval()
    logits, parts = model(make_images())

    mixed = torch.einsum("sbn,snbk->sbk", parts["gates"], model.expert_logits(make_images()))
    assert torch.allclose(logits, mixed, atol=1e-6)


def test_images_that_pooling_would_use_up_are_refused():
    with pytest.raises(UserError, match="images of 3x9 pixels are too small"):
        make(tiny(image_shape=(2, 3, 9)))


def test_one_expert_has_no_gates_to_train():
    with pytest.raises(ValueError, match="n_experts=1 leaves no gates for the losses diversity, balance"):
        tiny(n_experts=1)
