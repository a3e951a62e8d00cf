"""The 29 convolutional networks by name have the shapes, sizes and costs of the originals."""

import pytest
import torch

from collective_pipeline.config import IMAGE_MODEL_TYPES, Arm, GateConfig, ResNetArchitecture, UserError
from collective_pipeline.evaluation.cost import count_macs
from collective_pipeline.models.build import build_arm
from collective_pipeline.models.image_arms import NETWORKS, image_architecture, make_image_arm

# Of the originals: parameters, 10^9 multiply-accumulates at 224 pixels, gated layers; 100 classes.
ORIGINALS = {
    "resnet18": (11_227_812, 1.81, 0),
    "resnet34": (21_335_972, 3.66, 0),
    "resnet50": (23_712_932, 4.09, 0),
    "resnet101": (42_705_060, 7.80, 0),
    "resnet152": (58_348_708, 11.51, 0),
    "resnet18_moe": (11_921_576, 1.95, 16),
    "resnet34_moe": (22_508_584, 3.80, 32),
    "resnet50_moe_a": (24_885_544, 4.22, 32),
    "resnet50_moe_b": (24_398_440, 4.22, 16),
    "resnet101_moe_a": (45_000_488, 7.94, 66),
    "resnet101_moe_b": (43_951_976, 7.93, 33),
    "resnet152_moe_a": (61_634_856, 11.65, 100),
    "resnet152_moe_b": (60_090_984, 11.65, 50),
    "vgg11": (129_176_036, 7.61, 0),
    "vgg13": (129_360_548, 11.31, 0),
    "vgg16": (134_670_244, 15.47, 0),
    "vgg19": (139_979_940, 19.63, 0),
    "vgg11_bn": (129_181_540, 7.61, 0),
    "vgg13_bn": (129_366_436, 11.31, 0),
    "vgg16_bn": (134_678_692, 15.47, 0),
    "vgg19_bn": (139_990_948, 19.63, 0),
    "vgg11_moe": (129_726_696, 7.74, 8),
    "vgg13_moe": (129_935_784, 11.44, 10),
    "vgg16_moe": (135_409_320, 15.60, 13),
    "vgg19_moe": (140_882_856, 19.76, 16),
    "vgg11_bn_moe": (129_732_200, 7.74, 8),
    "vgg13_bn_moe": (129_941_672, 11.44, 10),
    "vgg16_bn_moe": (135_417_768, 15.60, 13),
    "vgg19_bn_moe": (140_893_864, 19.76, 16),
}
WIDE = {
    "resnet18_moe": (45_959_656, 7.15),
    "resnet34_moe": (87_335_144, 14.55),
    "resnet50_moe_a": (96_463_592, 16.25),
    "resnet50_moe_b": (95_489_384, 16.25),
    "resnet101_moe_a": (174_573_288, 31.10),
    "resnet101_moe_b": (172_476_264, 31.10),
    "resnet152_moe_a": (239_037_160, 45.95),
    "resnet152_moe_b": (235_949_416, 45.95),
    "vgg11_moe": (260_334_440, 28.19),
    "vgg13_moe": (261_194_984, 41.14),
    "vgg16_moe": (282_758_888, 57.78),
    "vgg19_moe": (304_322_792, 74.43),
}


def arm(name, *, side=224, **choices):
    choices = {"stem": "imagenet", "gates": GateConfig()} | choices
    return make_image_arm(name, image_architecture(name, (3, side, side), **choices), num_classes=100)


def test_every_name_is_in_the_table():
    """And every one is compared with its original."""
    assert list(NETWORKS) == list(IMAGE_MODEL_TYPES) == list(ORIGINALS)
    assert len(IMAGE_MODEL_TYPES) == 29


@pytest.mark.parametrize("name", IMAGE_MODEL_TYPES)
def test_sizes_are_those_of_the_originals(name):
    """Wherever the gates are: a bias that the norm would cancel is the gate's."""
    params, giga_macs, num_gated = ORIGINALS[name]
    ours = arm(name)

    assert ours.params == arm(name, gates=GateConfig(position="pre_norm")).params == params
    assert count_macs(ours) / 1e9 == pytest.approx(giga_macs, abs=0.01)
    assert len(ours.architecture.gated_channels) == num_gated


@pytest.mark.parametrize("name", WIDE)
def test_wide_sizes_are_those_of_the_originals(name):
    """Twice the channels."""
    params, giga_macs = WIDE[name]

    assert arm(name, wide=True).params == params
    assert count_macs(arm(name, wide=True)) / 1e9 == pytest.approx(giga_macs, abs=0.01)


@pytest.mark.parametrize(
    ("side", "plain", "original"), [(64, 0.336, 0.51), (128, 1.34, 2.06), (224, 4.09, 6.35), (288, 6.76, 10.52)]
)
def test_blur_costs_a_third_of_the_multiply_accumulates_and_not_half(side, plain, original):
    """In 10^9 of a ResNet-50: what halves maps runs before them. The original blurs its shortcuts behind theirs."""
    without, blurred = (
        count_macs(
            make_image_arm(
                "resnet50",
                image_architecture("resnet50", (3, side, side), GateConfig(), stem="imagenet", blur=blur),
                num_classes=1000,
            )
        )
        for blur in (False, True)
    )

    assert without / 1e9 == pytest.approx(plain, rel=0.01)
    assert 1.3 < blurred / without < 1.35 < original / plain


@pytest.mark.parametrize(
    "options", [{}, {"blur": True}, {"head": "conv"}, {"drop_path": 0.2}, {"zero_init_residual": True}]
)
def test_no_option_has_parameters_of_its_own(options):
    """A ResNet-50 with 1000 classes has 25,557,032."""
    architecture = image_architecture("resnet50", (3, 224, 224), GateConfig(), stem="imagenet", **options)

    assert make_image_arm("resnet50", architecture, num_classes=1000).params == 25_557_032
    for name, value in options.items():
        assert getattr(architecture, name) == value
        with pytest.raises(UserError, match="vgg11 has no residual blocks"):
            image_architecture("vgg11", (3, 224, 224), GateConfig(), **options)


def test_resnet18_gates_all_channels_of_its_blocks():
    """3,840 of them."""
    assert sum(arm("resnet18_moe").architecture.gated_channels) == 3_840


@pytest.mark.parametrize(("gates", "params"), [("cifar", 185_504), ("imagenet", 228_753)])
def test_both_embeddings_have_the_sizes_of_the_originals(gates, params):
    """Four convolutions or five, ever wider."""
    with torch.device("meta"):
        embedding = build_arm(arm("resnet18_moe", gates=GateConfig(embedding=gates))).gating.embedding

    assert sum(parameter.numel() for parameter in embedding.parameters()) == params


@pytest.mark.parametrize("name", ["resnet18_moe", "resnet50_moe_b", "vgg11_bn_moe"])
def test_the_default_form_is_for_small_images(name):
    """A network without gates has a wide twin too."""
    small = arm(name, side=32, stem="cifar")
    with torch.device("meta"):
        logits, parts = build_arm(small, num_seeds=2)(torch.empty(2, 5, 3 * 32 * 32))

    assert logits.shape == parts["embedding_logits"].shape == (2, 5, 100)
    assert parts["gates"].shape == (2, 5, sum(small.architecture.gated_channels))
    assert arm("resnet18", wide=True).params > 3.9 * arm("resnet18").params


@pytest.mark.parametrize(
    ("name", "stem", "smallest"), [("resnet18", "cifar", 5), ("resnet50_moe_a", "imagenet", 17), ("vgg11", "cifar", 32)]
)
def test_images_too_small_for_the_network_are_refused(name, stem, smallest):
    """In one sentence with both sizes; the smallest that it names is enough."""
    side = smallest - 1
    with pytest.raises(UserError, match=f"{side}x{side} pixels are too small .* {smallest}x{smallest}"):
        arm(name, side=side, stem=stem)
    assert arm(name, side=smallest, stem=stem).params


def test_an_arm_is_whole_in_its_text():
    """Read back, it is the same."""
    ours = arm("vgg11_bn_moe", side=32, stem="cifar")

    assert Arm.model_validate_json(ours.model_dump_json()) == ours


def test_what_cannot_be_built_is_refused():
    """Gates without places, places without gates or outside a block, images of another size."""
    shape = (3, 16, 16)
    for gated, gates in [((0,), None), ((), GateConfig()), ((2,), GateConfig()), ((1, 0), GateConfig())]:
        with pytest.raises(ValueError, match="gated"):
            ResNetArchitecture(image_shape=shape, gated=gated, gates=gates)
    with pytest.raises(ValueError, match="images of 3x16x16 do not have in_dim=100 features"):
        Arm.model_validate(
            arm("resnet18").model_dump() | {"in_dim": 100, "architecture": {"kind": "resnet", "image_shape": shape}}
        )
