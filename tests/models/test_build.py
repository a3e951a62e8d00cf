"""Networks have exactly the parameters that the original's had, whichever of its options are on."""

import math
from itertools import pairwise

import pytest
import torch

from collective_pipeline.config import DEBUG, PHASE1, Arm, CollectiveConfig, MlpArchitecture
from collective_pipeline.models.build import build_arm, build_model, initialise, vary
from collective_pipeline.models.layers import Dropout
from collective_pipeline.randomness import make_generator

PRESETS = {"debug": DEBUG.collective, "phase1": PHASE1.collective}
HEAD = {"analyst_encoder": True}
VARIED = {"vary_expert_architectures": True, "vary_analyst_architectures": True}
ENCODER_HEAD = {"head": "encoder_head"}


def meta_model(architecture, **changes):
    """The network as shapes only, for Fashion-MNIST unless said otherwise."""
    dims = {"in_dim": 784, "num_classes": 10} | changes
    with torch.device("meta"):
        return build_model(architecture, **dims)


def num_params(module):
    """Trainable parameters of one seed."""
    return sum(parameter.numel() for parameter in module.parameters())


def formula(config, in_dim=784, num_classes=10):
    """The collective's parameters by hand: lin(i, o) = i o + o, a norm 2 d."""

    def lin(i, o):
        return i * o + o

    def member(i, hidden, o):
        dims = [i, *hidden]
        return sum(lin(a, b) + 2 * b for a, b in pairwise(dims)) + lin(dims[-1], o)

    def members(i, hidden, o, count, varied):
        return sum(member(i, vary(hidden, n) if varied and count > 1 else hidden, o) for n in range(count))

    def encoder(a, b):
        h = int(math.sqrt(a * b))
        return lin(a, h) + 2 * h + lin(h, b)

    def decide(c):
        m = max(int(c * config.collective_hidden_scale), 2 * num_classes)
        return lin(c, m) + lin(m, num_classes)

    experts, analysts = config.num_experts, config.num_analysts
    a, h, c = experts * config.expert_output, config.encoded_dim, config.head_input_dim
    total = members(in_dim, config.expert_hidden, config.expert_output, experts, config.vary_expert_architectures)
    total += encoder(a, h)
    total += members(
        in_dim + h, config.analyst_hidden, config.analyst_output, analysts, config.vary_analyst_architectures
    )
    if config.analyst_encoder:
        total += encoder(analysts * config.analyst_output, c)
    if config.head == "simple_mlp":
        return total + decide(c)
    compressed = max(int(c * config.c_collective), 2 * num_classes)
    return total + encoder(c, compressed) + decide(compressed)


@pytest.mark.parametrize(
    ("preset", "changes", "expected"),
    [
        ("debug", HEAD, 567_044),
        ("debug", HEAD | ENCODER_HEAD, 575_492),
        ("debug", HEAD | VARIED, 617_059),
        ("phase1", HEAD, 2_969_887),
        ("phase1", HEAD | ENCODER_HEAD, 3_075_685),
        ("phase1", HEAD | VARIED, 3_286_397),
        ("debug", {}, 559_738),
        ("debug", ENCODER_HEAD | {"c_collective": 0.25}, 556_234),
        ("phase1", {}, 2_884_042),
        ("phase1", ENCODER_HEAD | {"c_collective": 0.25}, 2_835_466),
    ],
)
def test_the_collective_is_as_large_as_the_original(preset, changes, expected):
    """Every build that was measured, with and without the analyst encoder, to the last parameter."""
    assert num_params(meta_model(PRESETS[preset].model_copy(update=changes))) == expected


@pytest.mark.parametrize(
    ("n_total", "expert_ratio", "expected"),
    [
        *[(6, ratio, 2_352_673) for ratio in (0.1, 0.2, 0.3, 0.4)],
        *[(8, ratio, 2_969_887) for ratio in (0.1, 0.2, 0.3)],
        (8, 0.4, 3_319_750),
        (10, 0.1, 3_598_600),
        (10, 0.2, 3_598_600),
        (10, 0.3, 3_958_365),
        (10, 0.4, 4_326_879),
        (12, 0.1, 4_234_886),
        (12, 0.2, 4_234_886),
        (12, 0.3, 4_988_360),
        (12, 0.4, 5_372_701),
        (14, 0.1, 4_881_647),
        (14, 0.2, 5_265_967),
        (14, 0.3, 5_657_414),
        (14, 0.4, 6_460_040),
    ],
)
def test_other_numbers_of_members_are_as_large_as_the_original(n_total, expert_ratio, expected):
    """The grid of n_total and expert_ratio that was measured."""
    config = PHASE1.collective.model_copy(update=HEAD | {"n_total": n_total, "expert_ratio": expert_ratio})

    assert num_params(meta_model(config)) == expected


@pytest.mark.parametrize(
    ("preset", "changes", "expected"),
    [
        (
            "debug",
            HEAD,
            {
                "experts": 222_400,
                "expert_encoder": 2_672,
                "analysts": 324_384,
                "analyst_encoder": 12_778,
                "head": 4_810,
            },
        ),
        ("debug", HEAD | ENCODER_HEAD, {"head": 13_258}),
        ("debug", HEAD | VARIED, {"experts": 252_752, "analysts": 344_047}),
        ("debug", {}, {"analyst_encoder": 0, "head": 10_282}),
        ("debug", ENCODER_HEAD | {"c_collective": 0.25}, {"head": 6_778}),
        (
            "phase1",
            HEAD,
            {
                "experts": 1_135_360,
                "expert_encoder": 41_408,
                "analysts": 1_555_584,
                "analyst_encoder": 182_565,
                "head": 54_970,
            },
        ),
        ("phase1", HEAD | ENCODER_HEAD, {"head": 160_768}),
        ("phase1", HEAD | VARIED, {"experts": 1_318_208, "analysts": 1_689_246}),
        ("phase1", {}, {"analyst_encoder": 0, "head": 151_690}),
        ("phase1", ENCODER_HEAD | {"c_collective": 0.25}, {"head": 103_114}),
    ],
)
def test_every_block_is_as_large_as_the_original(preset, changes, expected):
    """So the sums above are right for the right reason."""
    model = meta_model(PRESETS[preset].model_copy(update=changes))

    assert {name: num_params(getattr(model, name)) for name in expected} == expected


@pytest.mark.parametrize(("preset", "encoded", "head_input"), [("debug", 16, 64), ("phase1", 64, 229)])
def test_derived_widths_are_the_original_ones(preset, encoded, head_input):
    """What the experts' encoder and the analysts' encoder give."""
    config = PRESETS[preset].model_copy(update=HEAD)

    assert (config.num_experts, config.num_analysts) == (2, 6)
    assert (config.encoded_dim, config.head_input_dim) == (encoded, head_input)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        HEAD,
        VARIED,
        HEAD | VARIED | ENCODER_HEAD,
        {"n_experts": 1},
        {"n_experts": 7, "vary_analyst_architectures": True},
        {"n_total": 2},
        {"c_expert": 0.07, "collective_hidden_scale": 0.33},
        HEAD | {"c_collective": 0.37, "adaptive_collective_min_dim": 300},
        HEAD | ENCODER_HEAD | {"c_collective": 1.9, "adaptive_collective_max_dim": 70},
        {"expert_hidden": (30, 20, 10), "analyst_hidden": (9, 8, 7, 6)} | VARIED,
    ],
)
@pytest.mark.parametrize(("in_dim", "num_classes"), [(784, 10), (3072, 100)])
def test_the_size_is_the_formula(preset, changes, in_dim, num_classes):
    """Whatever is configured, the parameters are the sum of their layers'."""
    config = PRESETS[preset].model_copy(update=changes)
    model = meta_model(config, in_dim=in_dim, num_classes=num_classes)

    assert num_params(model) == formula(config, in_dim, num_classes)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (MlpArchitecture(hidden_dims=(460, 410)), 555_960),
        (MlpArchitecture(hidden_dims=(500, 330)), 562_800),
        (MlpArchitecture(hidden_dims=(1609, 804, 402, 201)), 2_970_170),
        (MlpArchitecture(hidden_dims=(230,) * 8), 558_450),
        (MlpArchitecture(hidden_dims=(193,) * 8, residual=True), 570_132),
        (MlpArchitecture(hidden_dims=(456,) * 12, residual=True), 3_023_746),
    ],
)
def test_single_networks_are_as_large_as_the_original(architecture, expected):
    """[460, 410] and others that were measured."""
    assert num_params(meta_model(architecture)) == expected


@pytest.mark.parametrize(
    ("position", "base", "expected"),
    [
        (0, (512, 256), (512, 256)),
        (1, (512, 256), (640, 320)),
        (2, (512, 256), (512, 384, 256)),
        (3, (512, 256), (409, 204)),
        (4, (512, 256), (512, 256)),
        (5, (64, 32), (80, 40)),
        (2, (512, 256, 128), (512, 320, 128)),
    ],
)
def test_variants_are_the_original_ones(position, base, expected):
    """As it is, wider, deeper, narrower, and from the start again."""
    assert vary(base, position) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {(784, 128, 64, 32): 2}),
        (VARIED, {(784, 128, 64, 32): 1, (784, 160, 80, 32): 1}),
        (VARIED | {"n_experts": 1}, {(784, 128, 64, 32): 1}),
    ],
)
def test_members_are_varied_where_there_are_several(changes, expected):
    """And only where it is asked for."""
    model = meta_model(DEBUG.collective.model_copy(update=changes))
    counts = {dims: model.experts.dims.count(dims) for dims in model.experts.dims}

    assert counts == expected


def test_encoder_head_compresses_before_it_decides():
    """An encoder of c_collective, then the small network of the simple head."""
    config = DEBUG.collective.model_copy(update=ENCODER_HEAD | {"c_collective": 0.25})
    encoder, decide = meta_model(config).head

    assert encoder.dims == (96, 48, 24)
    assert decide.dims == (24, 24, 10)


def test_dropout_stands_where_the_configuration_says():
    """Members, encoders and head each have their own rate."""
    config = DEBUG.collective.model_copy(
        update={"member_dropout": 0.3, "encoder_dropout": 0.4, "head_dropout": 0.5, "analyst_encoder": True}
    )
    model = meta_model(config)

    def rates(module):
        return [layer.rate for layer in module.modules() if isinstance(layer, Dropout)]

    assert rates(model.experts) == rates(model.analysts) == [0.3, 0.0]
    assert rates(model.expert_encoder) == rates(model.analyst_encoder) == [0.4]
    assert rates(model.head) == [0.5]


@pytest.mark.parametrize(
    "architecture",
    [
        CollectiveConfig(expert_hidden=(8, 6), analyst_hidden=(8, 6), **VARIED),
        MlpArchitecture(hidden_dims=(8, 6)),
        MlpArchitecture(hidden_dims=(8, 6), residual=True),
    ],
    ids=["collective", "plain", "residual"],
)
def test_a_seed_has_the_same_network_alone_or_among_others(architecture):
    """Weights are drawn from each seed's own generator; seeds differ."""

    def weights(seeds):
        model = build_model(architecture, in_dim=12, num_classes=3, num_seeds=len(seeds))
        initialise(model, [make_generator(seed, "weights") for seed in seeds])
        return model.state_dict()

    alone, among = weights([7]), weights([3, 7, 5])

    for name, tensor in among.items():
        assert torch.equal(tensor[1:2], alone[name]), name
        if tensor.dim() == 4 and name.endswith("weight"):  # of a Linear: the others start alike
            assert not torch.equal(tensor[0], tensor[1]), name


def test_an_arm_is_its_architecture_for_its_data():
    """Inputs, classes and seeds as asked for."""
    arm = Arm(
        model_type="shallow",
        in_dim=12,
        num_classes=3,
        params=1,
        target_params=1,
        architecture=MlpArchitecture(hidden_dims=(8, 6)),
    )
    logits, _ = build_arm(arm, num_seeds=2)(torch.randn(2, 5, 12))

    assert logits.shape == (2, 5, 3)
