"""The convolutional networks by their names: rows of a table over a few blocks."""

import math
from typing import NamedTuple

from collective_pipeline.config import (
    Arm,
    GateConfig,
    Head,
    ImageArchitecture,
    ImageModelType,
    NarrowModelType,
    ResNetArchitecture,
    Stem,
    Technique,
    UserError,
    VggArchitecture,
)
from collective_pipeline.models.build import count_model_params

WIDTH = 64
VGG_FACTORS = (1, 2, 4, 8, 8)


class _ResNet(NamedTuple):
    blocks: tuple[int, ...]
    bottleneck: bool = False
    gated: tuple[int, ...] = ()


class _Vgg(NamedTuple):
    repeats: tuple[int, ...]
    normalise: bool = False
    gated: bool = False


_18, _34, _101, _152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
_50 = _34
_BOTH, _REDUCE_AND_MIDDLE, _MIDDLE = (0, 1), (0, 1), (1,)
_11, _13, _16, _19 = (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)

NETWORKS: dict[ImageModelType, _ResNet | _Vgg] = {
    "resnet18": _ResNet(_18),
    "resnet34": _ResNet(_34),
    "resnet50": _ResNet(_50, bottleneck=True),
    "resnet101": _ResNet(_101, bottleneck=True),
    "resnet152": _ResNet(_152, bottleneck=True),
    "resnet18_moe": _ResNet(_18, gated=_BOTH),
    "resnet34_moe": _ResNet(_34, gated=_BOTH),
    "resnet50_moe_a": _ResNet(_50, bottleneck=True, gated=_REDUCE_AND_MIDDLE),
    "resnet50_moe_b": _ResNet(_50, bottleneck=True, gated=_MIDDLE),
    "resnet101_moe_a": _ResNet(_101, bottleneck=True, gated=_REDUCE_AND_MIDDLE),
    "resnet101_moe_b": _ResNet(_101, bottleneck=True, gated=_MIDDLE),
    "resnet152_moe_a": _ResNet(_152, bottleneck=True, gated=_REDUCE_AND_MIDDLE),
    "resnet152_moe_b": _ResNet(_152, bottleneck=True, gated=_MIDDLE),
    "vgg11": _Vgg(_11),
    "vgg13": _Vgg(_13),
    "vgg16": _Vgg(_16),
    "vgg19": _Vgg(_19),
    "vgg11_bn": _Vgg(_11, normalise=True),
    "vgg13_bn": _Vgg(_13, normalise=True),
    "vgg16_bn": _Vgg(_16, normalise=True),
    "vgg19_bn": _Vgg(_19, normalise=True),
    "vgg11_moe": _Vgg(_11, gated=True),
    "vgg13_moe": _Vgg(_13, gated=True),
    "vgg16_moe": _Vgg(_16, gated=True),
    "vgg19_moe": _Vgg(_19, gated=True),
    "vgg11_bn_moe": _Vgg(_11, normalise=True, gated=True),
    "vgg13_bn_moe": _Vgg(_13, normalise=True, gated=True),
    "vgg16_bn_moe": _Vgg(_16, normalise=True, gated=True),
    "vgg19_bn_moe": _Vgg(_19, normalise=True, gated=True),
}


def image_architecture(
    name: ImageModelType,
    image_shape: tuple[int, int, int],
    gates: GateConfig,
    *,
    stem: Stem = "cifar",
    width: int = WIDTH,
    wide: bool = False,
    blur: bool = False,
    drop_path: float = 0.0,
    head: Head = "linear",
    zero_init_residual: bool = False,
) -> ImageArchitecture:
    """The network of this name.

    Args:
        name: One of `config.IMAGE_MODEL_TYPES`.
        image_shape: Channels, height, width.
        gates: How channels are gated, where they are.
        stem: `imagenet` is the form for 224 pixels. For about 32 pixels, a ResNet's stem keeps the size, and the head
            of a VGG reads one pixel, with 512 hidden features: replicated to 7x7, as the original does, that pixel
            would only cost 49 times the weights.
        width: Channels of the first stage; those of the others, and a VGG's, are in proportion.
        wide: With twice the channels, but in the first convolution of a VGG; of a network without gates as well, so
            that there is a twin to compare with.
        blur: Of a ResNet, as all that follow; `ResNetArchitecture` says what they do.
        drop_path: Stochastic depth.
        head: The last layer.
        zero_init_residual: Whether blocks begin as their shortcuts.

    Raises:
        UserError: If a VGG is to have what only a ResNet has.
    """
    match NETWORKS[name]:
        case _ResNet(blocks, bottleneck, gated):
            return ResNetArchitecture(
                image_shape=image_shape,
                stem=stem,
                blocks=blocks,
                width=width * (1 + wide),
                bottleneck=bottleneck,
                gated=gated,
                gates=gates if gated else None,
                blur=blur,
                drop_path=drop_path,
                head=head,
                zero_init_residual=zero_init_residual,
            )
        case _Vgg(repeats, normalise, is_gated):
            if blur or drop_path or head != "linear" or zero_init_residual:
                raise UserError(
                    f"{name} has no residual blocks for blur, drop_path, head and zero_init_residual: use a ResNet"
                )
            channels = [[width * factor * (1 + wide)] * n for factor, n in zip(VGG_FACTORS, repeats, strict=True)]
            channels[0][0] = width
            return VggArchitecture(
                image_shape=image_shape,
                channels=tuple(map(tuple, channels)),
                normalise=normalise,
                pooled_side=7 if stem == "imagenet" else 1,
                hidden=4096 if stem == "imagenet" else 512,
                gates=gates if is_gated else None,
            )


def make_image_arm(
    model_type: ImageModelType | NarrowModelType | Technique, architecture: ImageArchitecture, *, num_classes: int
) -> Arm:
    """The arm with this network; its own size is its budget.

    Raises:
        UserError: If the images are too small for it.
    """
    in_dim = math.prod(architecture.image_shape)
    params = count_model_params(architecture, in_dim=in_dim, num_classes=num_classes)
    return Arm(
        model_type=model_type,
        in_dim=in_dim,
        num_classes=num_classes,
        params=params,
        target_params=params,
        architecture=architecture,
    )
