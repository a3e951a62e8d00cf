"""Every knob of the project: typed, frozen, unknown names refused at every depth.

The defaults are phase 1 as the seed documents describe it. `conf/base/parameters.yml` repeats them where people
look for them, `conf/debug/parameters.yml` holds what the quick test changes; a test keeps the three the same.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

BaselineName = Literal["shallow", "balanced", "deep", "very_deep", "deep_resnet", "very_deep_resnet"]
ModelType = Literal["collective", "shallow", "balanced", "deep", "very_deep", "deep_resnet", "very_deep_resnet"]
ImageModelType = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet18_moe", "resnet34_moe",
    "resnet50_moe_a", "resnet50_moe_b", "resnet101_moe_a", "resnet101_moe_b", "resnet152_moe_a", "resnet152_moe_b",
    "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn",
    "vgg11_moe", "vgg13_moe", "vgg16_moe", "vgg19_moe", "vgg11_bn_moe", "vgg13_bn_moe", "vgg16_bn_moe", "vgg19_bn_moe",
]  # fmt: skip
ResNetModelType = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
NarrowModelType = Literal["narrow"]
# A plain residual network, and the same with a technique.
Technique = Literal[
    "plain",
    "progressive_resizing",
    "mixup",
    "cutmix",
    "stochastic_depth",
    "blur",
    "conv_head",
    "ema",
    "label_smoothing",
    "all_techniques",
]
Stem = Literal["cifar", "imagenet"]
Head = Literal["linear", "conv"]
MixtureModelType = Literal["merged_moe", "single_expert", "dense", "conv_collective", "sub_model"]
# Of every experiment.
ArmName = Literal[ModelType, ImageModelType, NarrowModelType, MixtureModelType, Technique]
# With a data set, seeds and training of their own, in a section of their own.
OwnExperiment = Literal["deepmoe", "merged_moe", "tiny_imagenet", "imagenet"]
DatasetName = Literal["mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet64"]
Strategy = Literal["end_to_end", "pretrain_freeze_finetune", "layerwise_autoencoding"]

BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)
TECHNIQUES: tuple[Technique, ...] = get_args(Technique)
IMAGE_MODEL_TYPES: tuple[ImageModelType, ...] = get_args(ImageModelType)
DATASETS: tuple[DatasetName, ...] = get_args(DatasetName)
# Of the column that lines of progress begin with.
ARM_NAME_WIDTH = max(len(name) for name in get_args(ArmName))

# What people who come from the originals type.
ORIGINAL_NAMES = {
    "batch": "training.batch_size",
    "collective_version": "collective.head",
    "diversity_lambda": "collective.expert_diversity.weight",
    "diversity_temperature": "collective.expert_diversity.temperature",
    "gradient_accumulation_steps": "training.accumulation_steps",
    "lr": "training.learning_rate",
    "model": "model_type",
    "num_experts": "merged_moe.n_experts",
    "seed": "seeds",
    "training_strategy": "training.strategy",
    "use_augmentation": "training.augmentation_strength",
    "use_mixed_precision": "training.precision",
    "val_split": "data.val_fraction",
}

# Plans, and the sums of their stages' epochs.
PLANNED = (
    "imagenet.training.stages",
    "imagenet.training.epochs",
    "tiny_imagenet.stages",
    "tiny_imagenet.training.epochs",
)
IN_A_FILE = (
    "in a parameters.yml of an environment (conf/<name>/, --env <name>; conf/debug and conf/imagenet_* have plans), "
    "since the command line has no lists"
)
HOW_TO_PLAN = f"where there are stages, `epochs` is their sum, and both are changed together, {IN_A_FILE}"

NUM_TOLD = 3  # of many names, in a message

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
# 65,536 features are far beyond any network of this kind: more is a slip of the finger.
Width = Annotated[int, Field(ge=1, le=65_536)]
Widths = Annotated[tuple[Width, ...], Field(min_length=2)]


def _as_list(values: Any) -> Any:
    """`--params seeds=7` and `--params seeds="7 8 9"` as well: the command line has no lists."""
    if values is None:  # `--params seeds=`
        return []
    if isinstance(values, str):
        return values.split()
    return [values] if isinstance(values, int) else values


def _once_each(values: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{', '.join(map(str, repeated))} repeated: name each once")
    return values


Item = TypeVar("Item")
# Whether a pipeline reads the parameter of this dotted name.
IsReader = Callable[[str], bool]
# At least one of each, named once; on the command line one alone, or several in one word with spaces.
Distinct = Annotated[tuple[Item, ...], Field(min_length=1), BeforeValidator(_as_list), AfterValidator(_once_each)]
Seeds = Distinct[Annotated[int, Field(ge=0, lt=2**32)]]


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence: what, where, what to do."""


class NotEnoughMemory(UserError):
    """What is free now is too little; it may be enough at another time or elsewhere."""


class Config(BaseModel):
    """Base of every configuration: frozen, unknown names and infinite or undefined numbers refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Config):
    """How the training part of a data set is divided."""

    val_fraction: float = Field(0.1, gt=0, lt=1, description="of the training images, stratified by class")
    split_seed: int = Field(42, ge=0, description="the same split for every arm and every training seed")


class ClassGroupsConfig(Config):
    """Which classes each sub-model of a mixture learns to tell apart."""

    groups: tuple[tuple[str | int, ...], ...] | None = Field(
        None, description="class names or labels; null: the data set's own (data/class_groups.py)"
    )
    leave_out_others: bool = Field(False, description="train and test on the groups' classes alone")

    @field_validator("groups")
    @classmethod
    def _several(cls, groups: tuple[tuple[str | int, ...], ...] | None) -> tuple[tuple[str | int, ...], ...] | None:
        if groups is not None and len(groups) < 2:
            raise ValueError("one group makes no mixture: give two at least")
        if groups is not None and not all(groups):
            raise ValueError(f"group {groups.index(()) + 1} is empty: give it classes, or leave it out")
        return groups


class DiversityConfig(Config):
    """A loss that keeps members from agreeing, D = mean over pairs of |mean over batch of cosine| / temperature."""

    weight: float = Field(0.0, ge=0, description="0 switches the term off")
    temperature: Positive = 1.0


class ModelDropoutConfig(Config):
    """Dropping whole members while training."""

    expert_rate: Fraction = 0.0
    analyst_rate: Fraction = 0.0
    form: Literal["per_image", "original"] = Field(
        "per_image",
        description="per_image draws a mask for every image and keeps the expected sum; original draws one mask for "
        "the whole batch, does not rescale, and lets the zeros into the diversity terms",
    )


class CollectiveConfig(Config):
    """The collective: experts, encoder, analysts that also see the input, head. All widths are features."""

    kind: Literal["collective"] = "collective"
    n_total: int = Field(8, ge=2, le=1024, description="experts + analysts")
    expert_ratio: float = Field(0.2, ge=0, le=1, description="experts / n_total, when n_experts is not given")
    n_experts: int | None = Field(None, ge=1)
    expert_hidden: Widths = (512, 256)
    expert_output: Width = 128
    analyst_hidden: Widths = (256, 128)
    analyst_output: Width = 64
    c_expert: Positive = Field(0.25, description="width of the encoded experts / width of all experts' outputs")
    analyst_encoder: bool = Field(False, description="an encoder between the analysts and the head")
    c_collective: Positive = Field(
        1.0, description="width factor of the analyst encoder, where there is one, and of the encoder_head"
    )
    adaptive_collective_min_dim: Width = 64
    adaptive_collective_max_dim: Width = 2048
    head: Literal["simple_mlp", "encoder_head"] = "simple_mlp"
    collective_hidden_scale: Positive = Field(1.0, description="hidden width of the head / its input width")
    vary_expert_architectures: bool = False
    vary_analyst_architectures: bool = False
    member_dropout: Fraction = 0.2
    encoder_dropout: Fraction = 0.1
    head_dropout: Fraction = 0.2
    model_dropout: ModelDropoutConfig = ModelDropoutConfig()
    expert_diversity: DiversityConfig = DiversityConfig()
    analyst_diversity: DiversityConfig = DiversityConfig()

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.n_experts is not None and self.n_experts >= self.n_total:
            raise ValueError(
                f"n_experts={self.n_experts} leaves no analyst among n_total={self.n_total} members: "
                f"choose n_experts from 1 to {self.n_total - 1}, or a larger n_total"
            )
        if self.adaptive_collective_min_dim > self.adaptive_collective_max_dim:
            raise ValueError("adaptive_collective_min_dim is larger than adaptive_collective_max_dim: swap them")
        for name, dim in (("c_expert", self.encoded_dim), ("c_collective", self.head_input_dim)):
            if dim < 1:
                raise ValueError(f"{name}={getattr(self, name):g} leaves no feature to pass on: choose a larger one")
        return self

    @property
    def num_experts(self) -> int:
        """`n_experts`, or `n_total * expert_ratio` rounded, at least 2 where there is room (diversity needs a pair)."""
        if self.n_experts is not None:
            return self.n_experts
        return min(max(2, round(self.n_total * self.expert_ratio)), self.n_total - 1)

    @property
    def num_analysts(self) -> int:
        return self.n_total - self.num_experts

    @property
    def encoded_dim(self) -> int:
        """Width of the encoded experts; this and the other widths are truncated as the original does."""
        return int(self.num_experts * self.expert_output * self.c_expert)

    @property
    def head_input_dim(self) -> int:
        """Width of what the head reads: all analysts side by side, or what their encoder makes of them.

        The encoder's output is clamped before `c_collective` scales it, as in the original.
        """
        if not self.analyst_encoder:
            return self.num_analysts * self.analyst_output
        adaptive = int(self.analyst_output * (1 + math.log2(self.num_analysts)))
        clamped = min(self.adaptive_collective_max_dim, max(self.adaptive_collective_min_dim, adaptive))
        return int(clamped * self.c_collective)


class BaselineConfig(Config):
    """What the six single networks share; their shapes are found by matching the parameter budget."""

    target_params: int | None = Field(None, gt=0, description="null: as many as the collective has")
    tolerance: float = Field(0.001, gt=0, lt=1, description="largest relative error of the match")
    dropout: Fraction = 0.1


class MlpArchitecture(Config):
    """One single network, found by matching: hidden widths and whether every layer is skipped."""

    kind: Literal["mlp"] = "mlp"
    hidden_dims: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    residual: bool = False
    dropout: Fraction = 0.1


class GateConfig(Config):
    """Gates on the channels of convolutions, from an embedding of the image (DeepMoE, Wang et al. 2019).

    Their losses and stages are configured here too: a network without gates has none.
    """

    embedding_dim: int = Field(128, ge=5, le=65_536)
    embedding: Stem = Field("cifar", description="4 convolutions (cifar) or 5 (imagenet)")
    position: Literal["post_norm", "pre_norm"] = Field(
        "post_norm", description="post_norm: a closed gate makes a zero channel; pre_norm: a constant one (original)"
    )
    offset: float = Field(1.0, ge=0, description="about what gates are at first; 0: the original, most are nearly shut")
    lambda_val: float = Field(1e-4, ge=0, description="weight of the sparsity term in stage 1")
    sparsity: Literal["l1", "legacy_matrix1"] = Field(
        "l1", description="l1: sum of an image's gates; legacy_matrix1: the original's largest column sum of each layer"
    )
    mu: float = Field(1.0, ge=0, description="weight of the embedding's own cross-entropy in stage 1")
    freeze_epochs: int = Field(5, ge=0, description="the last ones, stage 2: without both terms, gates frozen")
    freeze: Literal["gates", "embedding"] = Field(
        "gates", description="gates: what an image opens stays as it is; embedding: the heads go on (original)"
    )


class ResNetArchitecture(Config):
    """A residual network (He et al. 2016) with any of its blocks' convolutions gated."""

    kind: Literal["resnet"] = "resnet"
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    stem: Stem = Field("cifar", description="3x3; imagenet: 7x7 at stride 2 and max-pooling")
    blocks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 2, 2, 2)
    width: Width = Field(64, description="channels of the stem and of the first stage; each stage doubles them")
    bottleneck: bool = Field(False, description="blocks of 1x1, 3x3 and 1x1 to four times the width; else two 3x3")
    gated: tuple[Annotated[int, Field(ge=0, le=2)], ...] = Field((), description="positions in a block, from 0")
    gates: GateConfig | None = None
    blur: bool = Field(False, description="halve maps at stride 1 and then by a binomial mean, which does not alias")
    drop_path: Fraction = Field(
        0.0, description="stochastic depth: how often an image skips the last block in training; the first one, never"
    )
    head: Head = Field("linear", description="conv: the same function as a 1x1 convolution of one pixel")
    zero_init_residual: bool = Field(False, description="at first, every block gives what its shortcut gives")

    @model_validator(mode="after")
    def _check_gates(self) -> Self:
        if (self.gates is None) != (not self.gated):
            raise ValueError("gated and gates belong together: give both or neither")
        if list(self.gated) != sorted({*self.gated} & {*range(len(self.block_channels(0)))}):
            raise ValueError(f"gated={self.gated} are not positions of a block's convolutions in ascending order")
        return self

    def block_channels(self, stage: int) -> tuple[int, ...]:
        """Channels that each convolution of a block makes."""
        width = self.width << stage
        return (width, width, 4 * width) if self.bottleneck else (width, width)

    @property
    def gated_channels(self) -> tuple[int, ...]:
        """Of every gated layer, from the image on."""
        return tuple(
            self.block_channels(stage)[position]
            for stage, num_blocks in enumerate(self.blocks)
            for _ in range(num_blocks)
            for position in self.gated
        )

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """How often an image skips each block in training: in even steps from 0 to `drop_path`."""
        last = sum(self.blocks) - 1
        return tuple(self.drop_path * block / max(last, 1) for block in range(last + 1))

    @property
    def smallest_side(self) -> int:
        """Pixels that an image must have for every stage to have something to halve."""
        scale = (4 if self.stem == "imagenet" else 1) << len(self.blocks) - 1
        if not self.blur:
            return scale // 2 + 1
        # A blur reads two pixels back from the edge; the pool between the stem's two has no padding.
        return scale + (5 if self.stem == "imagenet" else 1)


class VggArchitecture(Config):
    """A VGG network (Simonyan & Zisserman 2015); with gates, all of its convolutions are gated."""

    kind: Literal["vgg"] = "vgg"
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    channels: Annotated[tuple[Annotated[tuple[Width, ...], Field(min_length=1)], ...], Field(min_length=1)] = Field(
        description="of every convolution, stage by stage; max-pooling ends a stage"
    )
    normalise: bool = False
    pooled_side: int = Field(1, ge=1, description="of the maps that the head reads; 7 in the imagenet form")
    hidden: Width = Field(512, description="of the head's two hidden layers; 4096 in the imagenet form")
    dropout: Fraction = 0.5
    gates: GateConfig | None = None

    @property
    def gated_channels(self) -> tuple[int, ...]:
        """Of every gated layer, from the image on."""
        return () if self.gates is None else tuple(width for stage in self.channels for width in stage)

    @property
    def smallest_side(self) -> int:
        """Pixels that an image must have for something to be left of it."""
        return 1 << len(self.channels)


Channels = tuple[Width, Width, Width, Width]


class SubModelArchitecture(Config):
    """The network of one group of classes, and with all classes the dense baseline of a mixture."""

    kind: Literal["sub_model"] = "sub_model"
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    channels: Channels = Field((64, 128, 256, 512), description="of the extractor's four stages")
    dropout: Fraction = 0.5


class RoutingLossConfig(Config):
    """Weights of the losses on a mixture's gates, whose formulas are in training/routing_losses.py; 0 switches one off.

    Those called legacy are what the original's code computed, not what its documents say.
    """

    diversity: float = Field(0.1, ge=0, description="few experts for an image")
    balance: float = Field(0.5, ge=0, description="all experts used alike")
    min_usage: float = Field(0.0, ge=0, description="no expert hardly used")
    decorrelation: float = Field(0.0, ge=0, description="no two experts used together")
    legacy_diversity: float = Field(0.0, ge=0, description="the gates' entropy; the original: 0.1")
    legacy_balance: float = Field(0.0, ge=0, description="depends on the batch size; the original: 0.5")
    legacy_min_usage: float = Field(0.0, ge=0, description="of every image by itself; the original: 0.5")
    legacy_correlation: float = Field(0.0, ge=0, description="constant, without a gradient; the original: 0.1")


class MixtureConfig(Config):
    """A mixture of experts merged from sub-models, what its gates are trained for included, for whatever images."""

    n_experts: int = Field(3, ge=1, le=1024, description="1: no gate, the single-expert baseline")
    combine: Literal["features", "logits"] = Field(
        "features", description="features: of the experts and of an analyst, for one classifier; logits: one each"
    )
    channels: Channels = Field((64, 128, 256, 512), description="of the extractor's four stages")
    gate_width: Width = 256
    expert_dropout: Fraction = 0.5
    gate_dropout: Fraction = 0.2
    gate_noise: float = Field(0.1, ge=0, description="standard deviation, after the temperature, while training")
    initial_temperature: Positive = Field(2.0, description="of the gate's softmax, at the first update")
    final_temperature: Positive = Field(0.5, description="at the last one; between them half a cosine")
    initialise: Literal["average", "copy", "fresh"] = Field(
        "average",
        description="of the extractor: mean of the sub-models, statistics of norms included, or copied from one; the "
        "experts are copied each from its own; fresh: everything drawn, without sub-models",
    )
    copy_of: int = Field(1, ge=1, description="copy: the number of the group whose sub-model gives the extractor")
    losses: RoutingLossConfig = RoutingLossConfig()

    @model_validator(mode="after")
    def _check_gates(self) -> Self:
        weighed = [name for name, weight in self.losses if weight]
        if self.n_experts == 1 and weighed:
            raise ValueError(
                f"n_experts=1 leaves no gates for the losses {', '.join(weighed)}: choose two experts at least, or "
                "weigh those losses with 0"
            )
        return self


class MixtureArchitecture(MixtureConfig):
    """A mixture for images of one shape."""

    kind: Literal["mixture"] = "mixture"
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")


class ImageCollectiveConfig(Config):
    """A collective on the maps of a stem, for whatever stem; an expert is as wide as the stem's maps have channels."""

    n_experts: int = Field(3, ge=1, le=1024)
    n_analysts: int = Field(6, ge=1, le=1024)
    analyst_hidden: Widths = (128, 64)
    analyst_output: Width = 32
    c_expert: Positive = Field(0.25, description="width of the encoded experts, at least 1 / of all experts' features")
    member_dropout: Fraction = Field(0.2, description="of experts (pixels, then features) and analysts")
    encoder_dropout: Fraction = 0.1
    head_dropout: Fraction = 0.2


class ImageCollectiveArchitecture(ImageCollectiveConfig):
    """A collective for images of one shape."""

    kind: Literal["image_collective"] = "image_collective"
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    channels: Channels = Field((64, 128, 256, 512), description="of the stem's four stages")

    @property
    def encoded_dim(self) -> int:
        """Width of the encoded experts."""
        return max(1, int(self.n_experts * self.channels[-1] * self.c_expert))


ImageArchitecture = ResNetArchitecture | VggArchitecture
Architecture = (
    CollectiveConfig
    | MlpArchitecture
    | ImageArchitecture
    | SubModelArchitecture
    | MixtureArchitecture
    | ImageCollectiveArchitecture
)


class Arm(Config):
    """One model of a comparison, complete: enough to build it again without anything else."""

    model_type: ArmName
    in_dim: int = Field(gt=0, description="features of one flattened image")
    num_classes: int = Field(ge=2)
    params: int = Field(gt=0, description="trainable parameters of one seed")
    target_params: int = Field(gt=0)
    architecture: Annotated[Architecture, Field(discriminator="kind")]

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        shape = self.image_shape
        if shape is not None and math.prod(shape) != self.in_dim:
            raise ValueError(f"images of {'x'.join(map(str, shape))} do not have in_dim={self.in_dim} features")
        return self

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width where the network is convolutional; None where it knows features alone."""
        if isinstance(self.architecture, CollectiveConfig | MlpArchitecture):
            return None
        return self.architecture.image_shape

    @property
    def is_convolutional(self) -> bool:
        return self.image_shape is not None

    @property
    def param_error_pct(self) -> float:
        return 100 * (self.params - self.target_params) / self.target_params


class ImageSpec(Config):
    """What a network was trained to read and to tell apart: all that stands between raw images and its answer."""

    shape: tuple[int, int, int] = Field(description="channels, height, width")
    mean: tuple[float, ...] = Field(description="of each channel of the training part, on [0, 1]")
    std: tuple[Positive, ...] = Field(description="likewise")
    class_names: tuple[str, ...]
    centre: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the shorter side: the square in the middle that is seen; null: all of it",
    )


class Stage(Config):
    """A stretch of training with images, batches and regularisation of its own; together they are the plan."""

    epochs: int = Field(ge=1)
    image_size: int | None = Field(None, ge=8, le=1024, description="pixels of a side; null: as the images are")
    batch_size: int | None = Field(None, ge=2, description="null: training.batch_size")
    mixing: bool = Field(True, description="MixUp and CutMix, where they are on")
    drop_path: bool = Field(True, description="stochastic depth, where it is on")


class TrainingConfig(Config):
    """What every arm shares: how long, how hard, and with which images."""

    epochs: int = Field(200, ge=1)
    stages: tuple[Stage, ...] = Field(
        (), description="of residual networks without gates: what changes on the way; their epochs sum to `epochs`"
    )
    batch_size: int = Field(256, ge=2, description="images a step; the last, smaller batch of an epoch is left out")
    accumulation_steps: int = Field(1, ge=1, description="batches whose mean gradient makes one update")
    eval_batch_size: int = Field(1024, ge=1)
    strategy: Strategy = "end_to_end"
    optimizer: Literal["adam", "adamw", "adamax", "sgd", "rmsprop", "adagrad", "adadelta"] = "adam"
    learning_rate: Positive = Field(1e-3, description="its highest value, where a schedule moves it")
    weight_decay: float = Field(1e-4, ge=0, description="of weight matrices; biases and norms are not decayed")
    momentum: Fraction = Field(0.9, description="sgd and rmsprop")
    nesterov: bool = Field(False, description="sgd: momentum that looks ahead")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="adam, adamw and adamax")
    epsilon: Positive = Field(1e-8, description="all but sgd")
    alpha: Fraction = Field(0.99, description="rmsprop: how slowly the mean of squares forgets")
    lr_decay: float = Field(0.0, ge=0, description="adagrad: the rate is divided by 1 + lr_decay for every update")
    rho: Fraction = Field(0.9, description="adadelta: how slowly the means of squares forget")
    schedule: Literal["constant", "cosine", "one_cycle", "multi_step"] = "constant"
    warmup_epochs: float = Field(
        0, ge=0, description="linear, from 0; where a strategy has several phases, of each, and at most half of it"
    )
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.5, 0.75), description="multi_step: parts of a phase, after its warm-up, at which the rate falls"
    )
    decay_factor: float = Field(0.1, gt=0, lt=1, description="multi_step: what the rate is multiplied by")
    clip_norm: Positive | None = Field(None, description="largest norm of a seed's gradient")
    label_smoothing: Fraction = 0.0
    augmentation_strength: float = Field(
        1.0, ge=0, le=3, description="1: the seed documents' rotation, shift, scale, flip, crop; 0: off"
    )
    cutout: int = Field(0, ge=0, description="side in pixels of a square left out of every training image; 0: off")
    mixup_alpha: float = Field(0.0, ge=0, description="MixUp: shares are Beta(alpha, alpha); 0: off")
    cutmix_alpha: float = Field(0.0, ge=0, description="CutMix, likewise; with both, a coin chooses for each batch")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="averaged weights are validated and kept, if given")
    early_stopping_patience: int | None = Field(None, ge=1, description="epochs without anything better")
    early_stopping_metric: Literal["accuracy", "loss"] = Field(
        "accuracy", description="of validation; which epoch is kept is always chosen by accuracy"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto", description="auto: tf32 on CUDA, fp32 elsewhere"
    )
    compile: bool = Field(
        False, description="torch.compile of what trains, on CUDA: fewer passes over maps, after half a minute's wait"
    )
    expert_analysis_interval: int | None = Field(
        None, ge=0, description="epochs from one heat map of experts in MLflow to the next; null or 0: at the end alone"
    )

    @model_validator(mode="after")
    def _check_nesterov(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true looks ahead along the momentum, and momentum=0: give one, for example 0.9")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        planned = sum(stage.epochs for stage in self.stages)
        if self.stages and planned != self.epochs:
            raise ValueError(
                f"stages have {count_of(planned, 'epoch')} together and epochs={self.epochs}: change both, {IN_A_FILE}"
            )
        if len({stage.image_size is None for stage in self.stages}) > 1:
            raise ValueError("stages: some have an image_size and others none: give it to all of them, or to none")
        if self.stages and self.strategy != "end_to_end":
            raise ValueError(f"strategy={self.strategy} has phases of its own: leave stages empty, or it at end_to_end")
        return self

    def plan(self) -> tuple[Stage, ...]:
        """The stages, each with its batch size; without any, one."""
        stages = self.stages or (Stage(epochs=self.epochs),)
        return tuple(stage.model_copy(update={"batch_size": stage.batch_size or self.batch_size}) for stage in stages)

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_epochs and self.schedule == "one_cycle":
            raise ValueError("schedule=one_cycle warms up by itself: leave warmup_epochs at 0")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs:g} leaves nothing of epochs={self.epochs}: choose a smaller warm-up"
            )
        return self


def _without_stages(training: TrainingConfig) -> TrainingConfig:
    if training.stages:
        raise ValueError("stages are for the residual networks of imagenet and tiny_imagenet alone: leave them empty")
    return training


def _refuse_phases(training: TrainingConfig) -> None:
    if training.strategy != "end_to_end":
        raise ValueError("training.strategy: only a collective has members to pretrain; leave it at end_to_end")


UniformTraining = Annotated[TrainingConfig, AfterValidator(_without_stages)]

# What only looks on: trainings that differ in it are the same training.
LOOKS_ON = frozenset({"training.expert_analysis_interval"})


class ComparisonConfig(Config):
    """How the arms are compared."""

    reference: ModelType = Field(
        "collective", description="the arm of phase 1 or of a sweep that the others are compared to"
    )

    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(10_000, ge=100, description="of the bootstrap")


class Range(Config):
    """Where a hyperparameter is searched; of whole numbers if both ends are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="equal chances for equal factors")
    step: Positive | None = None

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} is not below high={self.high:g}")
        if self.step is not None and self.step != int(self.step) and isinstance(self.low, int):
            raise ValueError(f"step={self.step:g} is not whole, and both ends are: write them with a decimal point")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log=true needs a positive low and no step")
        return self


def _kind_of_values(values: Any) -> str:
    return "range" if isinstance(values, Mapping | Range) else "choices"


def _is_range(values: Any) -> bool:
    return isinstance(values, Mapping) and bool(values) and values.keys() <= Range.model_fields.keys()


def _is_nested(values: Any) -> bool:
    """Whether these are names in a section, and not the ends of a range with or without a slip of the finger."""
    return isinstance(values, Mapping) and bool(values) and not values.keys() & Range.model_fields.keys()


def list_nested(
    section: Mapping[str, Any], is_section: Callable[[Any], bool], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The dotted names in nested sections, and what stands under each; `is_section` tells what is another section."""
    for name, values in section.items():
        if is_section(values):
            yield from list_nested(values, is_section, f"{prefix}{name}.")
        else:
            yield prefix + name, values


def _is_section(name: str, known: Sequence[str]) -> bool:
    return any(other.startswith(f"{name}.") for other in known)


def parameter_names(model: type[Config], prefix: str = "") -> list[str]:
    """The dotted names of all fields of `model`, its nested ones included."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            names += parameter_names(field.annotation, f"{prefix}{name}.")
    return names


def _check_searched(name: str) -> None:
    """Of all names of a space, those that are left out by a null among them."""
    if not name.startswith(("training", "collective", "baselines")):
        raise ValueError(f"{name} cannot be searched: choose from training.*, collective.* and baselines.*")
    known = parameter_names(Parameters)
    if name not in known or _is_section(name, known):
        raise ValueError(f"unknown parameter '{name}'{_nearest(name)}")


def _as_choices(values: Any) -> Any:
    """Words of the command line as a list, with what they are in YAML: numbers, true, false and null among them."""
    if isinstance(values, str):
        return [_as_scalar(word) for word in values.split()]
    return [values] if isinstance(values, bool | int | float) else values


def _as_scalar(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


Space = dict[
    str,
    Annotated[
        Annotated[Range, Tag("range")] | Annotated[tuple[Any, ...], Tag("choices")], Discriminator(_kind_of_values)
    ],
]

# The sweep of the seed documents. What is of the collective or of the single networks is searched for those alone.
SPACE: Space = {
    "training.batch_size": (256, 512),
    "training.learning_rate": Range(low=5e-4, high=2e-3, log=True),
    "training.optimizer": ("adam", "adamw"),
    "training.weight_decay": (0.0, 1e-4, 1e-3),
    "training.augmentation_strength": (0.0, 1.0),
    "collective.n_total": (6, 8, 10, 12),
    "collective.expert_ratio": Range(low=0.1, high=0.4),
    "collective.expert_output": (64, 128, 256),
    "collective.analyst_output": (32, 64, 128),
    "collective.c_expert": Range(low=0.125, high=0.5),
    "collective.collective_hidden_scale": Range(low=0.5, high=2.0),
    "collective.expert_diversity.weight": (0.0, 0.005, 0.01, 0.02),
    "collective.expert_diversity.temperature": Range(low=0.5, high=2.0),
    "collective.analyst_diversity.weight": (0.0, 0.005, 0.01, 0.02),
    "collective.analyst_diversity.temperature": Range(low=0.5, high=2.0),
    "collective.vary_expert_architectures": (False, True),
    "collective.vary_analyst_architectures": (False, True),
    "baselines.target_params": (1_800_000, 2_850_000, 3_950_000, 5_000_000, 6_100_000, 7_150_000),
    "baselines.dropout": Range(low=0.0, high=0.3),
}


class SweepConfig(Config):
    """Parameter efficiency over sizes (`grid`), or over hyperparameters (`search`)."""

    mode: Literal["grid", "search"] = Field(
        "grid", description="grid: every model type at every size; search: Optuna, then the best trained anew"
    )
    study: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = Field(
        None, description="its name; null: made of the mode and the data set"
    )
    storage: str | None = Field(
        None, description="a file, sqlite:///file or postgresql://user@host/database; null: a file in data/"
    )
    fork: bool = Field(False, description="where the study is of other settings, begin another beside it")
    workers: Annotated[int, Field(ge=1, le=64)] = Field(1, description="processes that this command starts")
    side_by_side: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="trainings at once in a worker; null: 7 on CUDA, 1 elsewhere"
    )
    model_types: Distinct[ModelType] = MODEL_TYPES
    sizes: Distinct[Annotated[int, Field(gt=0)]] = Field(
        (1_800_000, 2_850_000, 3_950_000, 5_000_000, 6_100_000, 7_150_000), description="grid: trainable parameters"
    )
    trials: int = Field(40, ge=1, description="search: of each model type")
    trial_epochs: int = Field(60, ge=1, description="search: at most")
    trial_seeds: Seeds = Field((0,), description="search: of every trial; what is tested has the other `seeds`")
    objective: Literal["accuracy", "accuracy_and_params"] = Field(
        "accuracy", description="search: validation accuracy; accuracy_and_params looks for the Pareto front, unpruned"
    )
    retrain: int = Field(1, ge=1, description="search: the best of each model type that are trained anew and tested")
    space: Space = Field(SPACE, min_length=1, description="search: a list of choices, or {low, high, log, step}")

    @field_validator("space", mode="before")
    @classmethod
    def _by_dotted_names(cls, space: Any) -> Any:
        """Of the command line as well, whose dots Kedro makes nested sections of, beside the names in `conf/`."""
        if not isinstance(space, Mapping):
            return space
        nested = {name: values for name, values in space.items() if _is_nested(values)}
        named = {name: values for name, values in space.items() if name not in nested}
        for name, values in list_nested(nested, _is_nested):
            before = named.get(name)
            # An end of a range alone leaves the rest of it as it was.
            kept = before if _is_range(values) and isinstance(before, Mapping) else {}
            named[name] = {**kept, **values} if isinstance(values, Mapping) else values
        for name in named:
            _check_searched(name)
        # An environment cannot take a name out of what it adds to, but it can say that it is null.
        return {name: _as_choices(values) for name, values in named.items() if values is not None}

    @model_validator(mode="after")
    def _check_retrain(self) -> Self:
        if self.mode == "search" and self.retrain > self.trials:
            raise ValueError(
                f"retrain={self.retrain} is more than trials={self.trials}, of which the best are trained anew: choose "
                "fewer, or more trials"
            )
        return self

    @field_validator("space")
    @classmethod
    def _some_choices(cls, space: Space) -> Space:
        empty = [name for name, values in space.items() if values == ()]
        if empty:
            raise ValueError(f"{empty[0]} has no choices: give some, or leave it out")
        return space


class DeepMoeConfig(Config):
    """`kedro run --pipeline deepmoe`: a network whose channels are gated, beside the same one without gates.

    And beside a narrower one without gates, which saves multiply-adds as well, and in the simplest way.
    """

    model: ImageModelType = Field("resnet18_moe", description="any whose name has moe in it")
    dataset: DatasetName = "cifar10"
    seeds: Seeds = (42, 43, 44)
    stem: Stem = Field("cifar", description="for about 32 pixels; imagenet: for 224")
    width: Width = Field(64, description="channels of the first stage; 64 is the networks' own")
    wide: bool = Field(False, description="twice the channels, with gates and without")
    narrow: float = Field(
        0.75, gt=0, le=1, description="width of the third network, without gates, as a part: what narrowing alone does"
    )
    gates: GateConfig = GateConfig(freeze_epochs=22)
    training: UniformTraining = TrainingConfig(
        epochs=45,
        batch_size=512,
        optimizer="sgd",
        nesterov=True,
        learning_rate=0.2,
        weight_decay=5e-4,
        schedule="one_cycle",
        label_smoothing=0.1,
        cutout=12,
        precision="bf16",
        expert_analysis_interval=10,
    )

    @model_validator(mode="after")
    def _check_gates(self) -> Self:
        _refuse_phases(self.training)
        if "_moe" not in self.model:
            raise ValueError(f"model={self.model} has no gates: choose one with moe in its name")
        if self.training.epochs <= self.gates.freeze_epochs:
            raise ValueError(
                f"gates.freeze_epochs={self.gates.freeze_epochs} leaves the gates none of training.epochs="
                f"{self.training.epochs} to learn in: choose fewer, or more epochs"
            )
        return self

    @property
    def dense_model(self) -> ImageModelType:
        """The same network without gates."""
        name = self.model.partition("_moe")[0]
        return next(known for known in IMAGE_MODEL_TYPES if known == name)


MIXTURE_TRAINING = TrainingConfig(
    epochs=20,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-4,
    schedule="one_cycle",
    cutout=12,
    precision="bf16",
    expert_analysis_interval=10,
)
# Sub-models have no experts to look at.
SUB_MODEL_TRAINING = MIXTURE_TRAINING.model_copy(update={"epochs": 10, "expert_analysis_interval": None})
DEBUG_TRAINING = {"augmentation_strength": 0.0, "cutout": 0, "precision": "auto"}


class MergedMoeConfig(MixtureConfig):
    """`kedro run --pipeline merged_moe`: a mixture merged from sub-models, beside three networks of its size."""

    dataset: DatasetName = "cifar10"
    seeds: Seeds = (42, 43, 44)
    class_groups: ClassGroupsConfig = ClassGroupsConfig()
    n_experts: int = Field(3, ge=2, le=1024, description="those beyond the groups are drawn")
    tolerance: float = Field(0.001, gt=0, lt=1, description="largest relative error of the three networks' sizes")
    collective: ImageCollectiveConfig = ImageCollectiveConfig()
    sub_models: UniformTraining = SUB_MODEL_TRAINING
    training: UniformTraining = Field(
        MIXTURE_TRAINING, description="of the mixture; the three networks have as many updates as it and its sub-models"
    )

    @model_validator(mode="after")
    def _check_strategies(self) -> Self:
        for name in ("sub_models", "training"):
            if getattr(self, name).strategy != "end_to_end":
                raise ValueError(f"{name}.strategy: these networks are trained end to end only; leave it at end_to_end")
        if self.sub_models.expert_analysis_interval:
            raise ValueError(
                "sub_models.expert_analysis_interval: a sub-model has no experts to look at; leave it at null"
            )
        return self

    def architecture(self, image_shape: tuple[int, int, int]) -> MixtureArchitecture:
        """The mixture for images of this shape."""
        values = {name: getattr(self, name) for name in MixtureConfig.model_fields}
        return MixtureArchitecture(image_shape=image_shape, **values)


class TinyImagenetConfig(Config):
    """`kedro run --pipeline tiny_imagenet`: a plain residual network, the same with each technique, and with all.

    All arms have as many epochs and updates. `stages` are those of progressive resizing; its default costs about as
    many multiply-adds as images of 64 pixels throughout.
    """

    dataset: DatasetName = "tiny_imagenet"
    seeds: Seeds = (42, 43, 44)
    model: ResNetModelType = "resnet50"
    stem: Stem = "imagenet"
    width: Width = 64
    image_size: int | None = Field(None, ge=8, le=1024, description="pixels of a side; null: as the images are")
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = Field(
        (Stage(epochs=14, image_size=48), Stage(epochs=13, image_size=64), Stage(epochs=13, image_size=80)),
        description="of progressive_resizing",
    )
    mixup_alpha: Positive = 0.2
    cutmix_alpha: Positive = 1.0
    drop_path: Fraction = Field(0.2, description="of stochastic_depth: the rate of the last block")
    ema_decay: float = Field(0.999, gt=0, lt=1)
    label_smoothing: Fraction = 0.1
    training: UniformTraining = Field(
        TrainingConfig(
            epochs=40,
            batch_size=128,
            optimizer="adamw",
            learning_rate=1.17e-3,
            weight_decay=5e-4,
            schedule="one_cycle",
            clip_norm=1.0,
            precision="bf16",
        ),
        description="of the plain network",
    )

    @model_validator(mode="after")
    def _check_plain(self) -> Self:
        planned = sum(stage.epochs for stage in self.stages)
        if planned != self.training.epochs:
            raise ValueError(
                f"stages have {count_of(planned, 'epoch')} together and training.epochs={self.training.epochs}: all "
                f"arms are trained equally long, so change both, {IN_A_FILE}"
            )
        if not all(stage.image_size for stage in self.stages):
            raise ValueError("stages are those of progressive_resizing: give each its image_size")
        if any(stage.batch_size for stage in self.stages):
            raise ValueError("stages: another batch_size would be another number of updates than the other arms have")
        _refuse_phases(self.training)
        on = [name for name in ("mixup_alpha", "cutmix_alpha", "ema_decay", "label_smoothing") if self._is_on(name)]
        if on:
            raise ValueError(
                f"training.{on[0]} is a technique, and the plain network has none: set tiny_imagenet.{on[0]}"
            )
        return self

    def _is_on(self, name: str) -> bool:
        return bool(getattr(self.training, name))

    def training_of(self, technique: Technique) -> TrainingConfig:
        """How the arm with this technique is trained."""
        changes: dict[Technique, dict[str, Any]] = {
            "progressive_resizing": {"stages": self.stages},
            "mixup": {"mixup_alpha": self.mixup_alpha},
            "cutmix": {"cutmix_alpha": self.cutmix_alpha},
            "ema": {"ema_decay": self.ema_decay},
            "label_smoothing": {"label_smoothing": self.label_smoothing},
        }
        names = list(changes) if technique == "all_techniques" else [technique]
        same = (
            {}
            if self.image_size is None
            else {"stages": (Stage(epochs=self.training.epochs, image_size=self.image_size),)}
        )
        return self.training.model_copy(
            update=same | {k: v for name in names for k, v in changes.get(name, {}).items()}
        )

    def image_size_of(self, technique: Technique, own: int) -> int:
        """The side of the images that its network is evaluated on, where those of the data set have the side `own`."""
        resized = technique in {"progressive_resizing", "all_techniques"}
        return (self.stages[-1].image_size if resized else self.image_size) or own


class AugmentationConfig(Config):
    """What is done to training images from files beside a random resized crop and a mirror; all of it in one batch.

    Strengths are those at which the original uses them; a probability of 0 switches one off.
    """

    crop_area: tuple[Fraction, float] = Field((0.08, 1.0), description="of the image: least and most that is cut out")
    brightness: Fraction = 0.2
    contrast: Fraction = 0.2
    saturation: Fraction = 0.2
    hue: float = Field(0.1, ge=0, le=0.5)
    colour_probability: float = Field(0.0, ge=0, le=1)
    shift: Fraction = Field(0.0625, description="of the side")
    zoom: Fraction = 0.1
    degrees: float = Field(15.0, ge=0, le=180)
    move_probability: float = Field(0.0, ge=0, le=1)
    cutout: Fraction = Field(0.25, description="side of the square that is left out / side of the image")
    cutout_probability: float = Field(0.0, ge=0, le=1)

    @field_validator("crop_area")
    @classmethod
    def _ordered(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError("give the least and the most, above 0 and up to 1")
        return area


class ImageNetConfig(Config):
    """`kedro run --pipeline imagenet`: a residual network on image files of any size, on one GPU or several."""

    dataset: ClassVar[str] = "imagenet"  # whatever is in the folder

    folder: str = Field("data/01_raw/imagenet", min_length=1, description="of the images, in any layout that is known")
    subset_size: int | None = Field(None, ge=1, description="training images, evenly of all classes; null: all")
    val_fraction: float = Field(0.02, gt=0, lt=1, description="of the training images; the official part is the test")
    pack_side: int | None = Field(
        None, ge=64, le=1024, description="make a packed copy with this shorter side, and read that; null: the files"
    )
    pack_quality: int = Field(90, ge=50, le=100, description="of its JPEG")
    seeds: Seeds = (42,)
    model: ResNetModelType = "resnet50"
    stem: Stem = "imagenet"
    width: Width = 64
    blur: bool = Field(False, description="against aliasing, wherever maps are halved")
    drop_path: Fraction = Field(0.0, description="stochastic depth: the rate of the last block")
    head: Literal["linear", "conv"] = "linear"
    zero_init_residual: bool = True
    augmentation: AugmentationConfig = AugmentationConfig()
    rate_scaling: Literal["none", "sqrt", "linear"] = Field(
        "linear", description="of the learning rate with the number of GPUs, each of which has a whole batch"
    )
    sync_norm: bool = Field(False, description="statistics of norms over the batches of all GPUs")
    threads: int | None = Field(
        None,
        ge=1,
        le=512,
        description="that read images, of each GPU; null: its share of cores, 8 where a GPU decodes",
    )
    max_bad: Fraction = Field(
        0.001, description="of all image files: so many may be unreadable in a part, more stop the run"
    )
    training: TrainingConfig = TrainingConfig(
        epochs=16,
        stages=(
            Stage(epochs=8, image_size=160),
            Stage(epochs=6, image_size=192),
            Stage(epochs=2, image_size=224),
        ),
        batch_size=512,
        eval_batch_size=512,
        optimizer="sgd",
        nesterov=True,
        learning_rate=1.0,
        weight_decay=5e-5,
        schedule="cosine",
        warmup_epochs=2,
        label_smoothing=0.1,
        precision="bf16",
        compile=True,
    )

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        training = self.training
        _refuse_phases(training)
        if not training.stages or None in {stage.image_size for stage in training.stages}:
            raise ValueError("training.stages: give at least one, each with its image_size, since files have any size")
        if training.cutout or training.augmentation_strength != 1:
            raise ValueError(
                "training.cutout and augmentation_strength are those of small images: use imagenet.augmentation"
            )
        return self

    @property
    def image_size(self) -> int:
        """Pixels of a side at which the network is evaluated: that of the last stage."""
        size = self.training.stages[-1].image_size
        assert size is not None
        return size


class DemoConfig(Config):
    """`kedro run --pipeline demo`: where the page is served."""

    host: str = Field("127.0.0.1", min_length=1, description="this machine alone; 0.0.0.0: whoever reaches it")
    port: int = Field(7860, ge=0, le=65_535, description="0: any that is free")


class LrFinderConfig(Config):
    """`kedro run --pipeline lr_finder`: the first updates of an experiment's first arm, at ever higher rates."""

    experiment: Literal["single", "deepmoe", "tiny_imagenet", "imagenet"] = Field(
        "tiny_imagenet", description="the experiment; its own parameters say what is trained, on what and how"
    )
    lowest: Positive = Field(1e-7, description="learning rate of the first update")
    highest: Positive = Field(1.0, description="of the last one; each is the same factor above the one before")
    updates: int = Field(300, ge=20, le=100_000, description="fewer are done where the loss explodes")
    seed: int = Field(42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest:g} is not below highest={self.highest:g}")
        return self


MOST_GPUS = 64  # of one machine: more is a mistake in typing


def _check_gpus(number: Any) -> Any:
    # In place of what pydantic would say of each of the two types.
    if number != "auto" and (type(number) is not int or not 1 <= number <= MOST_GPUS):
        raise ValueError(f"give a number from 1 to {MOST_GPUS}, or auto for all that this machine has")
    return number


class Parameters(Config):
    """All parameters of a run, as `conf/` and `--params` give them."""

    model_type: ModelType = "collective"
    dataset: DatasetName = "mnist"
    resume: bool = Field(False, description="go on from where an interrupted run was saved")
    device: str = "auto"
    price_per_gpu_hour: Positive | None = Field(
        None, description="money for an hour of one GPU, in any currency: tables are in the same; null: not known"
    )
    seeds: Seeds = tuple(range(42, 52))
    images: str | None = Field(
        None, min_length=1, description="predict: a folder of images, one image, or an idx file, from where one types"
    )
    arm: str | None = Field(
        None, min_length=1, description="predict: a network of any experiment, or its folder; null: that of model_type"
    )
    checkpoint: str | None = Field(
        None, min_length=1, description="predict: a file; null: the newest of the arm, demo: the best"
    )
    checkpoint_seed: int | None = Field(
        None, ge=0, description="predict and demo: this seed alone; null: the mean of all"
    )
    data: DataConfig = DataConfig()
    collective: CollectiveConfig = CollectiveConfig()
    baselines: BaselineConfig = BaselineConfig()
    training: UniformTraining = TrainingConfig()
    comparison: ComparisonConfig = ComparisonConfig()
    sweep: SweepConfig = SweepConfig()
    deepmoe: DeepMoeConfig = DeepMoeConfig()
    merged_moe: MergedMoeConfig = MergedMoeConfig()
    tiny_imagenet: TinyImagenetConfig = TinyImagenetConfig()
    imagenet: ImageNetConfig = ImageNetConfig()
    demo: DemoConfig = DemoConfig()
    lr_finder: LrFinderConfig = LrFinderConfig()
    num_gpus: Annotated[int | Literal["auto"], BeforeValidator(_check_gpus)] = Field(
        1, description="imagenet: processes that train together, one for each GPU; auto: all there are"
    )

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise ValueError("choose from auto, cpu, cuda, cuda:0, cuda:1, ..., mps")
        return device

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        layers = 4 if self.collective.analyst_encoder else 3
        phases = {"end_to_end": 1, "pretrain_freeze_finetune": 3, "layerwise_autoencoding": layers + 1}
        needed = phases[self.training.strategy]
        if self.training.epochs < needed:
            raise ValueError(
                f"training.epochs={self.training.epochs} is too few for "
                f"training.strategy={self.training.strategy}, whose {needed} phases need an epoch each: give more"
            )
        return self

    def of_experiment(self, name: OwnExperiment) -> Self:
        """The same with the experiment's own data set, seeds and training, and the reference of its arms."""
        own = getattr(self, name)
        reference = {"merged_moe": "merged_moe", "tiny_imagenet": "plain"}.get(name) or own.model
        comparison = self.comparison.model_copy(update={"reference": reference})
        shared = {"dataset": own.dataset, "seeds": own.seeds, "training": own.training, "comparison": comparison}
        return self.model_copy(update=shared)

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        both = sorted(set(self.seeds) & set(self.sweep.trial_seeds))
        if both and self.sweep.mode == "search":
            raise ValueError(
                f"sweep.trial_seeds and seeds share {', '.join(map(str, both))}: what is tested is to have seeds that "
                "the search has not seen"
            )
        return self


PHASE1 = Parameters()
DEBUG = Parameters(
    seeds=(42, 43, 44),
    collective=CollectiveConfig(expert_hidden=(128, 64), expert_output=32, analyst_hidden=(64, 32), analyst_output=16),
    training=TrainingConfig(epochs=5, batch_size=128, eval_batch_size=512, weight_decay=0.0, augmentation_strength=0.0),
    sweep=SweepConfig(
        sizes=(300_000, 560_000),
        trials=6,
        trial_epochs=5,
        space=SPACE
        | {
            "collective.expert_output": (16, 32, 64),
            "collective.analyst_output": (8, 16, 32),
            "baselines.target_params": (300_000, 430_000, 560_000, 690_000),
        },
    ),
    deepmoe=DeepMoeConfig(
        dataset="mnist",
        seeds=(42, 43),
        stem="imagenet",
        width=8,
        gates=GateConfig(embedding_dim=16, freeze_epochs=1),
        training=DeepMoeConfig().training.model_copy(update={"epochs": 3, "cutout": 0, "precision": "auto"}),
    ),
    merged_moe=MergedMoeConfig(
        dataset="mnist",
        seeds=(42, 43),
        class_groups=ClassGroupsConfig(groups=(("0", "1"), ("1", "7")), leave_out_others=True),
        channels=(2, 4, 4, 8),
        gate_width=8,
        tolerance=0.05,
        collective=ImageCollectiveConfig(n_analysts=2, analyst_hidden=(4, 4), analyst_output=4),
        sub_models=SUB_MODEL_TRAINING.model_copy(update={"epochs": 1, **DEBUG_TRAINING}),
        training=MIXTURE_TRAINING.model_copy(update={"epochs": 1, **DEBUG_TRAINING}),
    ),
    tiny_imagenet=TinyImagenetConfig(
        dataset="mnist",
        seeds=(42, 43),
        model="resnet18",
        width=4,
        image_size=48,
        stages=(Stage(epochs=1, image_size=40), Stage(epochs=1, image_size=48)),
        training=TinyImagenetConfig().training.model_copy(
            update={"epochs": 2, "batch_size": 256, "augmentation_strength": 0.0, "precision": "auto"}
        ),
    ),
    imagenet=ImageNetConfig(
        model="resnet18",
        width=8,
        training=ImageNetConfig().training.model_copy(
            update={
                "epochs": 2,
                "stages": (Stage(epochs=1, image_size=48), Stage(epochs=1, image_size=64)),
                "batch_size": 32,
                "learning_rate": 0.1,
                "warmup_epochs": 0,
                "precision": "auto",
                "compile": False,
            }
        ),
    ),
    lr_finder=LrFinderConfig(updates=60),
)


def check_parameters(
    raw: Mapping[str, Any], *, experiments: Mapping[str, IsReader] = MappingProxyType({})
) -> Parameters:
    """The parameters in `raw`, typed.

    Args:
        raw: As `conf/` and the command line give them.
        experiments: By name those that are run; an unknown name is looked for in their sections first, and in what
            any of them reads. Without any: in all parameters.

    Raises:
        UserError: Naming every value that cannot be used, where it stands, and the nearest name for an unknown one.
    """
    try:
        return Parameters.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        places = [problem["loc"] for problem in problems]
        # A list none of whose entries is valid is also called too short: the entries say it better.
        told = [
            problem
            for problem in problems
            if problem["type"] != "too_short"
            or sum(place[: len(problem["loc"])] == problem["loc"] for place in places) == 1
        ]
        raise UserError("; ".join(_sentence(problem, experiments) for problem in told)) from None


def with_values(settings: Parameters, values: Mapping[str, Any]) -> Parameters:
    """`settings` with other values under these dotted names.

    Raises:
        UserError: If there is no such parameter, or it cannot have the value.
    """
    raw = settings.model_dump()
    for name, value in values.items():
        section: Any = raw
        *sections, leaf = name.split(".")
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            raise UserError(f"unknown parameter '{name}'{_nearest(name)}")
        section[leaf] = value
    return check_parameters(raw)


def _sentence(problem: Any, experiments: Mapping[str, IsReader]) -> str:
    path = ".".join(str(part) for part in problem["loc"] if part not in {"range", "choices"})
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown parameter '{path}'{_nearest(path, experiments)}"
        case "literal_error":
            told = f"{path}={problem['input']!r} is unknown{suggest(str(problem['input']), _choices(problem))}"
            elsewhere = path == "model_type" and problem["input"] in get_args(ArmName)
            return f"{told}; --pipeline predict takes any network as arm={problem['input']}" if elsewhere else told
        case "value_error":
            if isinstance(problem["input"], Mapping):  # a check across several fields
                return f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
            return f"{path}={problem['input']!r}: {problem['ctx']['error']}"
        case _:
            # pydantic's words for Python's types, in those of YAML.
            told = re.sub(r"dictionary or instance of \w+", "section of names and values", problem["msg"])
            told = f"{told[:1].lower()}{told[1:]}".replace("tuple", "list").replace("after validation, ", "")
            return f"{path}={problem['input']!r}: {told}"


def _choices(problem: Any) -> list[str]:
    return [choice.strip("' ") for choice in problem["ctx"]["expected"].replace(" or ", ", ").split(",")]


def list_some(told: Sequence[str], separator: str = "; ") -> str:
    """For messages: the first few, and how many more there are."""
    more = f"{separator.strip(', ')} and {len(told) - NUM_TOLD:,} more" if len(told) > NUM_TOLD else ""
    return separator.join(told[:NUM_TOLD]) + more


def count_of(number: int, noun: str) -> str:
    """For messages: "1 class", "2,000 classes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def suggest(name: str, known: Sequence[str]) -> str:
    """What follows "... is unknown": the nearest of the known names, if one is near, and all of them."""
    nearest = difflib.get_close_matches(name, known, n=1)
    guess = f": did you mean '{nearest[0]}'?" if nearest else ""
    return f"{guess or ':'} choose from {', '.join(known)}"


def _nearest(path: str, experiments: Mapping[str, IsReader] = MappingProxyType({})) -> str:
    known = _known_to(path, experiments)
    parent, _, leaf = path.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    anywhere = _first_called(known)
    sections = (path.partition(".")[0], *experiments)
    # What it is called in the originals, or elsewhere; what is spelt alike beside it, or elsewhere.
    meant = ORIGINAL_NAMES.get(leaf) or _first_called(parameter_names(Parameters)).get(leaf, leaf)
    guess = _own_name(path, meant, sections, known) or (meant if meant in known else None)
    guess = guess or anywhere.get(meant.rpartition(".")[2]) or _spelt_alike(leaf, beside)
    # Who knows how it is called means no other.
    if guess is None and meant == leaf and (alike := _spelt_alike(leaf, anywhere)) is not None:
        guess = _own_name(alike, alike, sections, known) or alike
    told = f": did you mean '{guess}'? " if guess else ": "
    return told + f"{HOW_TO_PLAN}; " * (guess in PLANNED) + "all names stand in conf/base/parameters.yml"


def _known_to(path: str, experiments: Mapping[str, IsReader]) -> list[str]:
    """The names that any of the experiments reads; those in the section of `path` if that is of none of them.

    A file may have sections of experiments that are not run.
    """
    known = parameter_names(Parameters)
    section = path.partition(".")[0]
    inside = [name for name in known if name.startswith(f"{section}.")]
    read = [name for name in known if any(is_read(name) for is_read in experiments.values())]
    is_theirs = any(name in read for name in inside) or any(f"{name}.{section}" in read for name in experiments)
    if not experiments:
        return known
    return inside if inside and not is_theirs else read


def _first_called(known: Sequence[str]) -> dict[str, str]:
    """The first of the names with each last part, sections left out."""
    sections = {name.rpartition(".")[0] for name in known}
    return {name.rpartition(".")[2]: name for name in reversed(known) if name not in sections}


def _spelt_alike(leaf: str, name_of: Mapping[str, str]) -> str | None:
    return next((name_of[found] for found in difflib.get_close_matches(leaf, name_of, n=1)), None)


def _own_name(path: str, meant: str, sections: Iterable[str], known: Sequence[str]) -> str | None:
    """What the first of the sections with any such name among the `known` ones calls it, or its plan.

    Args:
        path: What was given.
        meant: A name of the same elsewhere.
        sections: Names of sections, in the order in which they are looked through.
        known: Names that can be suggested.
    """
    parent, _, leaf = path.rpartition(".")
    renamed = meant.rpartition(".")[2]
    for section in sections:
        own = [name for name in known if name.startswith(f"{section}.")]
        ways = (f"{section}.{leaf}", f"{parent}.{renamed}", f"{section}.{meant}")
        called_so = [name for name in own if name.rpartition(".")[2] in {leaf, renamed}]
        plans = [name for name in own if name in PLANNED and name.endswith(".stages") and leaf in Stage.model_fields]
        found = [*(name for name in ways if name in own), *called_so, *plans]
        if found:
            return found[0]
    return None


def hide_password(text: str) -> str:
    """The same without the passwords of addresses in it."""
    return re.sub(r"(://[^:/@\s]+):[^@\s]+@", r"\1:***@", text)


def flatten(config: Config) -> dict[str, Any]:
    """Every value of `config` by its dotted name, without passwords."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            values |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        elif isinstance(value, dict):
            for key, entry in value.items():
                values[f"{name}.{key}"] = entry.model_dump_json() if isinstance(entry, Config) else list(entry)
        else:
            shown = hide_password(value) if isinstance(value, str) else value
            entries = shown if isinstance(shown, tuple) else ()
            plain = [entry.model_dump() if isinstance(entry, Config) else entry for entry in entries]
            values[name] = plain if isinstance(shown, tuple) else shown
    return values
