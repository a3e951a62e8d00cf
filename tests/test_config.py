"""Every knob has one home; what cannot be used is refused by name, before anything runs."""

import re
from pathlib import Path

import pytest
import yaml
from kedro.config import OmegaConfigLoader
from pydantic import ValidationError

from collective_pipeline.config import (
    BASELINES,
    DATASETS,
    DEBUG,
    HOW_TO_PLAN,
    MODEL_TYPES,
    ORIGINAL_NAMES,
    PHASE1,
    PLANNED,
    SPACE,
    Arm,
    CollectiveConfig,
    MlpArchitecture,
    Parameters,
    Range,
    Stage,
    UserError,
    check_parameters,
    count_of,
    flatten,
    parameter_names,
)
from collective_pipeline.models.matching import count_collective
from collective_pipeline.pipelines.experiments import EXPERIMENTS, check_read
from collective_pipeline.pipelines.imagenet import make_arm
from collective_pipeline.training.optim import make_schedule

CONF = Path(__file__).parents[1] / "conf"
INF, NAN = float("inf"), float("nan")


def nested(path, value):
    """`a.b.c` and a value as nested dictionaries."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def value_at(config, path):
    """The value that stands at `a.b.c`."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def dotted(raw, prefix=""):
    """The dotted names in nested dictionaries, those of dictionaries included."""
    for name, value in raw.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")


def shipped(env):
    """The parameters of an environment in `conf/`, as Kedro resolves them."""
    loader = OmegaConfigLoader(
        conf_source=str(CONF), base_env="base", default_run_env=env, merge_strategy={"parameters": "soft"}
    )
    return loader["parameters"]


def readers(experiment):
    """What `check_parameters` takes of an experiment that is run."""
    return {experiment: EXPERIMENTS[experiment].is_reader_of}


def refusal(path, value):
    """What is said about this value at this path."""
    with pytest.raises(UserError) as caught:
        check_parameters(nested(path, value))
    return str(caught.value)


def test_base_is_phase_1():
    """What people read in conf/base is what the code has by default."""
    assert check_parameters(shipped("base")) == PHASE1 == check_parameters({})


def test_debug_is_debug():
    """What the quick test changes is what the code calls DEBUG."""
    assert check_parameters(shipped("debug")) == DEBUG


@pytest.mark.parametrize(
    ("env", "falls", "epochs", "frozen"), [("cifar", (150, 250), 350, 80), ("imagenet", (100, 130, 160, 190), 210, 30)]
)
def test_deepmoe_paper_is_the_schedule_that_the_original_names(env, falls, epochs, frozen):
    """A tenth of the rate after each of these epochs; the last ones with the gates as they are."""
    deepmoe = check_parameters(shipped(f"deepmoe_paper_{env}")).deepmoe
    rates = make_schedule(deepmoe.training, rate=0.1, num_updates=epochs, warmup_updates=0).tolist()

    assert rates == pytest.approx([0.1 * 0.1 ** sum(epoch >= fall for fall in falls) for epoch in range(epochs)])
    assert deepmoe.training.epochs == epochs and deepmoe.gates.freeze_epochs == frozen
    assert deepmoe.training.optimizer == "sgd"


def test_the_quick_search_is_of_networks_about_as_large_as_the_quick_collective():
    params = count_collective(DEBUG.collective, in_dim=784, num_classes=10)
    sizes = DEBUG.sweep.space["baselines.target_params"]

    assert min(sizes) < params < max(sizes) < 2 * params


def test_base_names_every_field_there_is():
    """Nobody has to read the code to find a knob."""
    named = {name if not name.startswith("sweep.space.") else "sweep.space" for name in dotted(shipped("base"))}

    assert sorted(named) == sorted(parameter_names(Parameters))


@pytest.mark.parametrize("env", ["base", "debug"])
def test_what_kedro_gives_survives_the_round_trip(env):
    """Dumped and checked again, nothing changes."""
    parameters = check_parameters(shipped(env))

    assert check_parameters(parameters.model_dump()) == parameters
    assert Parameters.model_validate_json(parameters.model_dump_json()) == parameters


@pytest.mark.parametrize(
    ("env", "stages"),
    [
        ("imagenet_seed_90", [(30, 64, 256), (20, 128, 128), (40, 224, 64)]),
        ("imagenet_seed_110", [(15, 128, 128), (65, 224, 128), (15, 288, 128), (15, 320, 64)]),
        ("imagenet_fast_32", [(16, 160, 512), (12, 192, 512), (4, 224, 512)]),
        ("imagenet_tiny_seed_60", [(30, 64, 128), (30, 128, 64)]),
        ("imagenet_tiny_seed_62", [(25, 64, 128), (15, 128, 64), (22, 224, 64)]),
        ("imagenet_tiny_fast_40", [(14, 48, 128), (13, 64, 128), (13, 80, 128)]),
    ],
)
def test_plans_for_imagenet_are_environments(env, stages):
    """The seed documents' plan, the original's later one, which ends without mixing, and twice the default.

    And for Tiny-ImageNet the original's two best, and that of our own techniques there.
    """
    imagenet = check_parameters(shipped(env)).imagenet
    plan = imagenet.training.plan()

    assert [(stage.epochs, stage.image_size, stage.batch_size) for stage in plan] == stages
    assert imagenet.image_size == stages[-1][1]
    is_mixed = [stage.mixing and imagenet.training.mixup_alpha > 0 for stage in plan]
    assert is_mixed == ([True, True, False, False] if env.endswith("110") else ["seed" in env] * len(stages))
    if env == "imagenet_tiny_fast_40":
        assert stages == [(stage.epochs, stage.image_size, 128) for stage in PHASE1.tiny_imagenet.stages]


@pytest.mark.parametrize("env", sorted(path.name for path in CONF.glob("imagenet_*")))
def test_an_environment_s_network_can_be_built_and_its_schedule_made(env):
    """A ResNet-50 of as many classes at every size of its plan; the rate rises to what is given, and falls."""
    imagenet = check_parameters(shipped(env)).imagenet
    num_classes = 200 if "tiny" in env else 1000
    arm = make_arm(imagenet, num_classes)
    rates = make_schedule(imagenet.training, rate=imagenet.training.learning_rate, num_updates=1000, warmup_updates=100)

    assert arm.params == 25_557_032 - 2049 * (1000 - num_classes)
    assert rates.max().item() == pytest.approx(imagenet.training.learning_rate) and rates[-1] < rates.max() / 1000


def test_one_thing_is_no_plural():
    """In whatever message."""
    assert [count_of(n, noun) for n in (0, 1, 2000) for noun in ("image", "class")] == [
        "0 images", "0 classes", "1 image", "1 class", "2,000 images", "2,000 classes",
    ]  # fmt: skip
    assert "leaves nothing of epochs=1" in refusal("training", {"epochs": 1, "warmup_epochs": 1})


# The one with two letters has none in common with most slips.
@pytest.mark.parametrize(
    "path", [name for name in parameter_names(Parameters) if name not in {"collective.kind", "deepmoe.gates.mu"}]
)
def test_a_misspelt_name_is_refused_with_the_right_one(path):
    """At every depth: where it stands, and what it should probably have been."""
    misspelt = path[:-1] + ("x" if path[-1] != "x" else "y")
    message = refusal(misspelt, 1)

    assert f"unknown parameter '{misspelt}'" in message
    assert f"did you mean '{path}'?" in message


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("epochs", "training.epochs"),
        ("batch_size", "training.batch_size"),
        ("c_expert", "collective.c_expert"),
        ("training.n_experts", "collective.n_experts"),
        ("collective.expert_rate", "collective.model_dropout.expert_rate"),
        ("learning_rat", "training.learning_rate"),
    ],
)
def test_a_name_in_the_wrong_place_is_refused_with_the_right_one(path, meant):
    """People write `epochs=3` for `training.epochs=3`."""
    assert f"did you mean '{meant}'?" in refusal(path, 3)


@pytest.mark.parametrize(
    ("experiment", "given", "meant"),
    [
        ("imagenet", "batch_size", "imagenet.training.batch_size"),
        ("imagenet", "lr", "imagenet.training.learning_rate"),
        ("imagenet", "model", "imagenet.model"),
        ("imagenet", "training.lr", "imagenet.training.learning_rate"),
        ("deepmoe", "epochs", "deepmoe.training.epochs"),
        ("deepmoe", "epoch", "deepmoe.training.epochs"),
        ("merged_moe", "epochs", "merged_moe.training.epochs"),
        ("tiny_imagenet", "image_size", "tiny_imagenet.image_size"),
        ("phase1", "epochs", "training.epochs"),
        ("phase1", "merged_moe.epochs", "merged_moe.training.epochs"),
        ("phase1", "sweep.trails", "sweep.trials"),
        ("phase1", "num_experts", "collective.n_experts"),
        ("merged_moe", "n_experts", "merged_moe.n_experts"),
        ("merged_moe", "num_experts", "merged_moe.n_experts"),
        ("merged_moe", "sub_models.lr", "merged_moe.sub_models"),
        ("merged_moe", "merged_moe.sub_models.lr", "merged_moe.sub_models.learning_rate"),
        ("tiny_imagenet", "mixup_alpha", "tiny_imagenet.mixup_alpha"),
        ("tiny_imagenet", "cutmix_alpha", "tiny_imagenet.cutmix_alpha"),
        ("tiny_imagenet", "ema_decay", "tiny_imagenet.ema_decay"),
        ("tiny_imagenet", "label_smoothing", "tiny_imagenet.label_smoothing"),
        ("imagenet", "cutout", "imagenet.augmentation.cutout"),
        ("imagenet", "imagenet.cutout", "imagenet.augmentation.cutout"),
        ("imagenet", "imagenet.augmentation_strength", "imagenet.augmentation"),
        ("imagenet", "training.momentu", "imagenet.training.momentum"),
    ],
)
def test_an_unknown_name_is_looked_for_in_the_section_of_what_is_run(experiment, given, meant):
    """Or in the one that it was given in."""
    with pytest.raises(UserError, match=rf"did you mean '{meant}'\? all names"):
        check_parameters(nested(given, 3), experiments=readers(experiment))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_is_suggested_is_read_by_what_is_run(experiment):
    """Whatever anything is called anywhere, in the originals or in a plan; with and without the section."""
    known = parameter_names(Parameters)
    leaves = {name.rpartition(".")[2] for name in known} | ORIGINAL_NAMES.keys() | Stage.model_fields.keys()
    for given in sorted({*leaves, *(f"{experiment}.{leaf}" for leaf in leaves if experiment in known)} - {*known}):
        with pytest.raises(UserError) as caught:
            check_parameters(nested(given, 3), experiments=readers(experiment))
        told = str(caught.value)
        suggested = re.findall(r"did you mean '([^']+)'", told)
        check_read(suggested, [experiment])
        assert (HOW_TO_PLAN in told) == (not {*suggested}.isdisjoint(PLANNED))


@pytest.mark.parametrize("given", ["imagenet.expert_analysis_interval", "augmentation_strength"])
def test_for_what_an_experiment_has_no_part_for_nothing_is_suggested(given):
    """Its training has parameters of this name that it does not read."""
    with pytest.raises(UserError, match=f"unknown parameter '{given}': all names stand"):
        check_parameters(nested(given, 1), experiments=readers("imagenet"))


def _plans(raw):
    """The lists of stages in nested dictionaries that are not empty."""
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from _plans(value)
        elif name == "stages" and value:
            yield value


@pytest.mark.parametrize("experiment", ["imagenet", "tiny_imagenet"])
@pytest.mark.parametrize("given", ["epochs", "mixing", "{}.epochs"])
def test_whoever_changes_a_part_of_a_plan_is_told_at_once_that_it_is_in_a_file(experiment, given):
    """And in which environments there is one to look at."""
    with pytest.raises(UserError) as caught:
        check_parameters(nested(given.format(experiment), 3), experiments=readers(experiment))

    told = str(caught.value)
    assert "stages" in told and "--env <name>; conf/debug and conf/imagenet_* have plans" in told
    for path in (CONF / "debug", *CONF.glob("imagenet_*")):
        assert list(_plans(yaml.safe_load((path / "parameters.yml").read_text())))


def test_a_name_like_no_other_is_refused_without_a_guess():
    """There is still a place to look."""
    message = refusal("qqqqqqqq", 3)

    assert "did you mean" not in message
    assert "conf/base/parameters.yml" in message


@pytest.mark.parametrize(
    ("path", "value", "choices"),
    [
        ("model_type", "shalow", MODEL_TYPES),
        ("dataset", "fashion-mnist", DATASETS),
        ("training.strategy", "end-to-end", ("end_to_end", "pretrain_freeze_finetune", "layerwise_autoencoding")),
        ("training.optimizer", "adamx", ("adam", "adamw", "sgd")),
        ("training.schedule", "cosin", ("constant", "cosine", "one_cycle", "multi_step")),
        ("training.precision", "fp61", ("auto", "fp32", "tf32", "bf16", "fp16")),
        ("collective.head", "simple", ("simple_mlp", "encoder_head")),
        ("collective.model_dropout.form", "per_batch", ("per_image", "original")),
    ],
)
def test_an_unknown_choice_is_refused_with_all_there_are(path, value, choices):
    """Where it stands, what was given, and what can be chosen."""
    message = refusal(path, value)

    assert message.startswith(f"{path}='{value}' is unknown")
    assert all(choice in message for choice in choices)


def test_the_nearest_choice_is_named():
    """A slip of the pen is recognised."""
    assert "did you mean 'shallow'?" in refusal("model_type", "shalow")


@pytest.mark.parametrize("path", [f"training.{name}" for name in ("learning_rate", "clip_norm")])
@pytest.mark.parametrize("value", [0, -1, INF, NAN])
def test_rates_are_positive_and_finite(path, value):
    """Nothing that would train by nothing, backwards or into infinity."""
    assert refusal(path, value).startswith(f"{path}=")


@pytest.mark.parametrize(
    "path",
    [
        f"collective.{name}"
        for name in (
            "c_expert",
            "c_collective",
            "collective_hidden_scale",
            "expert_diversity.temperature",
            "analyst_diversity.temperature",
        )
    ],
)
@pytest.mark.parametrize("value", [0, -1, INF, NAN])
def test_factors_are_positive_and_finite(path, value):
    """Widths are multiplied by them, losses divided."""
    assert refusal(path, value).startswith(f"{path}=")


@pytest.mark.parametrize(
    "path",
    [
        "training.label_smoothing",
        "training.momentum",
        "baselines.dropout",
        *[f"collective.{name}" for name in ("member_dropout", "encoder_dropout", "head_dropout")],
        *[f"collective.model_dropout.{name}" for name in ("expert_rate", "analyst_rate")],
    ],
)
def test_fractions_are_from_0_to_below_1(path):
    """0 is off, 1 would leave nothing."""
    assert value_at(check_parameters(nested(path, 0)), path) == 0
    assert value_at(check_parameters(nested(path, 0.99)), path) == 0.99
    for value in (-0.1, 1, 1.5, NAN):
        assert refusal(path, value).startswith(f"{path}=")


@pytest.mark.parametrize(
    ("path", "lowest"),
    [
        ("data.split_seed", 0),
        ("collective.n_total", 2),
        ("collective.n_experts", 1),
        *[
            (f"collective.{name}", 1)
            for name in (
                "expert_output",
                "analyst_output",
                "adaptive_collective_min_dim",
                "adaptive_collective_max_dim",
            )
        ],
        ("baselines.target_params", 1),
        ("training.epochs", 1),
        ("training.batch_size", 2),
        ("training.accumulation_steps", 1),
        ("training.eval_batch_size", 1),
        ("training.early_stopping_patience", 1),
        ("comparison.resamples", 100),
    ],
)
def test_counts_have_a_lowest_value(path, lowest):
    """One less is refused, and so is a half more, and what is no number."""
    raw = nested(path, lowest)
    if path == "collective.adaptive_collective_max_dim":
        raw["collective"]["adaptive_collective_min_dim"] = lowest
    if path == "collective.expert_output":
        raw["collective"]["c_expert"] = 1.0  # or nothing of it would be left

    assert value_at(check_parameters(raw), path) == lowest
    for value in (lowest - 1, lowest + 0.5, "many"):
        assert refusal(path, value).startswith(f"{path}=")


@pytest.mark.parametrize(
    ("path", "inside", "outside"),
    [
        ("data.val_fraction", (0.01, 0.99), (0, 1, -0.1, NAN)),
        ("collective.expert_ratio", (0, 1), (-0.1, 1.1, NAN)),
        ("collective.expert_diversity.weight", (0, 10), (-0.1, INF, NAN)),
        ("collective.analyst_diversity.weight", (0, 10), (-0.1, INF, NAN)),
        ("baselines.tolerance", (1e-9, 0.5), (0, 1, NAN)),
        ("training.weight_decay", (0, 1), (-1e-4, INF, NAN)),
        ("training.warmup_epochs", (0, 0.5, 199), (-1, INF, NAN)),
        ("training.decay_factor", (0.01, 0.99), (0, 1, NAN)),
        ("training.augmentation_strength", (0, 0.5, 3), (-0.1, 3.1, NAN)),
        ("training.ema_decay", (0.9, None), (0, 1, NAN)),
        ("comparison.confidence", (0.51, 0.999), (0.5, 1, NAN)),
        ("device", ("auto", "cpu", "mps", "cuda", "cuda:1"), ("gpu", "cuda:", "cuda:x", "CPU", "")),
        ("training.milestones", ((), (0.3,), (0.2, 0.4, 0.8)), ("half",)),
        ("collective.expert_hidden", ((8, 6), (9, 8, 7)), ((), (8,), 128, "128 64")),
        ("collective.analyst_hidden", ((8, 6), (9, 8, 7)), ((), (8,), 128, "128 64")),
    ],
)
def test_ranges(path, inside, outside):
    """What is inside is taken as it is, what is outside is refused by its path."""
    for value in inside:
        assert value_at(check_parameters(nested(path, value)), path) == value
    for value in outside:
        assert refusal(path, value).startswith(f"{path}=")


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("collective.expert_hidden", [8, 0], "collective.expert_hidden.1=0"),
        ("collective.analyst_hidden", [8, -1, 4], "collective.analyst_hidden.1=-1"),
        ("training.milestones", [0.5, 1.0], "training.milestones.1=1.0"),
        ("training.milestones", [0, 0.5], "training.milestones.0=0"),
    ],
)
def test_an_entry_of_a_list_is_refused_by_its_place(path, value, where):
    """The message says which of the entries cannot be used."""
    assert where in refusal(path, value)


def test_all_that_cannot_be_used_is_named_at_once():
    """Nobody mends one value after the other."""
    with pytest.raises(UserError) as caught:
        check_parameters({"model_type": "shalow", "training": {"epochs": 0, "mometum": 0.5}, "epochs": 3})

    message = str(caught.value)
    assert all(part in message for part in ("model_type", "training.epochs=0", "'training.mometum'", "'epochs'"))


@pytest.mark.parametrize(("n_total", "n_experts"), [(8, 8), (8, 9), (2, 2)])
def test_experts_leave_room_for_an_analyst(n_total, n_experts):
    """As many experts as members, or more, are refused with what could be chosen."""
    with pytest.raises(UserError) as caught:
        check_parameters({"collective": {"n_total": n_total, "n_experts": n_experts}})

    assert f"n_experts={n_experts}" in str(caught.value)
    assert f"from 1 to {n_total - 1}" in str(caught.value)


@pytest.mark.parametrize("n_total", [2, 3, 4, 8, 14])
@pytest.mark.parametrize("expert_ratio", [0, 0.2, 0.5, 0.9, 1])
def test_there_are_always_experts_and_analysts(n_total, expert_ratio):
    """At least two experts where there is room, at least one analyst always."""
    config = CollectiveConfig(n_total=n_total, expert_ratio=expert_ratio)

    assert config.num_experts + config.num_analysts == n_total
    assert config.num_experts >= min(2, n_total - 1)
    assert config.num_analysts >= 1


def test_n_experts_goes_before_the_ratio():
    """Also where it is 1."""
    assert [CollectiveConfig(n_experts=n, expert_ratio=0.5).num_experts for n in (1, 4, 7)] == [1, 4, 7]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"c_expert": 1e-4}, "c_expert"),
        ({"c_collective": 1e-4, "analyst_encoder": True}, "c_collective"),
        ({"adaptive_collective_min_dim": 100, "adaptive_collective_max_dim": 99}, "adaptive_collective_min_dim"),
    ],
)
def test_widths_that_leave_nothing_are_refused(changes, named):
    """The knob to turn is named."""
    with pytest.raises(UserError, match=f"collective: {named}"):
        check_parameters({"collective": changes})


STAGES = [{"epochs": 2, "image_size": 8}, {"epochs": 3, "image_size": 16}]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"training": {"stages": STAGES, "epochs": 5}}, "stages are for the residual networks of imagenet and tiny"),
        ({"deepmoe": {"training": {"stages": STAGES, "epochs": 5}}}, "deepmoe.training: stages are for the residual"),
        ({"tiny_imagenet": {"training": {"stages": STAGES, "epochs": 5}}}, "stages are for the residual networks"),
        ({"tiny_imagenet": {"stages": STAGES}}, "5 epochs together and training.epochs=40: all arms are trained equa"),
        ({"tiny_imagenet": {"stages": [{"epochs": 40}]}}, "give each its image_size"),
        (
            {"tiny_imagenet": {"training": {"epochs": 40, "mixup_alpha": 0.2}}},
            "plain network has none: set tiny_imagenet.mixup_alpha",
        ),
        ({"tiny_imagenet": {"model": "vgg11"}}, "choose from resnet18, resnet34, resnet50"),
        ({"imagenet": {"training": {"stages": STAGES}}}, "stages have 5 epochs together and epochs=200"),
        ({"imagenet": {"training": {"stages": [{"epochs": 5}], "epochs": 5}}}, "each with its image_size"),
        ({"imagenet": {"training": {"stages": [*STAGES, {"epochs": 1}], "epochs": 6}}}, "to all of them, or to none"),
        ({"training": {"strategy": "layerwise_autoencoding", "stages": STAGES, "epochs": 5}}, "leave stages empty"),
        ({"tiny_imagenet": {"stages": [{"epochs": 0, "image_size": 8}]}}, "tiny_imagenet.stages.0.epochs=0"),
        ({"tiny_imagenet": {"stages": [{"epochs": 40, "image_siz": 8}]}}, "stages.0.image_siz"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_one_sentence(given, told):
    with pytest.raises(UserError) as error:
        check_parameters(given)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_plan_gives_every_stage_its_batches():
    training = PHASE1.imagenet.training.model_copy(
        update={
            "epochs": 5,
            "batch_size": 4,
            "stages": (Stage(epochs=2, image_size=8, batch_size=30), Stage(epochs=3, image_size=16)),
        }
    )

    assert [stage.batch_size for stage in training.plan()] == [30, 4]
    assert PHASE1.training.plan() == (Stage(epochs=200, batch_size=256),)


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(5, 5), (5, 7.5), (1, 1)])
def test_a_warm_up_leaves_epochs_to_train(epochs, warmup_epochs):
    """It must end before the training does."""
    with pytest.raises(UserError, match="training: warmup_epochs"):
        check_parameters({"training": {"epochs": epochs, "warmup_epochs": warmup_epochs}})


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        (7, (7,)),
        ("7", (7,)),
        ("7 8", (7, 8)),
        ("  9   8 7 ", (9, 8, 7)),
        ([7], (7,)),
        ([7, 8, 9], (7, 8, 9)),
        (["7", 8], (7, 8)),
        ((0, 2**32 - 1), (0, 2**32 - 1)),
    ],
)
def test_seeds_come_in_several_forms(given, seeds):
    """One, several in quotes as the command line gives them, or a list; their order is kept."""
    assert check_parameters({"seeds": given}).seeds == seeds


@pytest.mark.parametrize(
    "given", ["", [], None, "seven", "7,8", "7 x", 7.5, "7.5", [7, 8.5], -1, "-1", [2**32], {"a": 1}, [None]]
)
def test_seeds_that_cannot_be_used_are_refused(given):
    """None at all, no whole numbers, or out of range."""
    assert refusal("seeds", given).startswith("seeds")


@pytest.mark.parametrize(
    ("given", "name", "searched"),
    [
        ({"training": {"batch_size": None}}, "training.batch_size", None),
        ({"training": {"batch_size": "128 256"}}, "training.batch_size", (128, 256)),
        ({"training": {"weight_decay": "0 1e-3"}}, "training.weight_decay", (0, 0.001)),
        ({"training": {"optimizer": "adam"}}, "training.optimizer", ("adam",)),
        ({"training": {"batch_size": 64}}, "training.batch_size", (64,)),
        ({"collective": {"vary_expert_architectures": "true"}}, "collective.vary_expert_architectures", (True,)),
        ({"training": {"learning_rate": {"high": 1}}}, "training.learning_rate", Range(low=5e-4, high=1, log=True)),
        ({"baselines": {"target_params": {"low": 10, "high": 20}}}, "baselines.target_params", Range(low=10, high=20)),
        ({"collective": {"expert_diversity": {"weight": "0 1"}}}, "collective.expert_diversity.weight", (0, 1)),
    ],
)
def test_the_command_line_changes_the_space_name_by_name(given, name, searched):
    """Kedro makes nested sections of its dotted names; all other names stay as they are in conf/."""
    raw = shipped("base")
    raw["sweep"]["space"] |= given
    space = check_parameters(raw).sweep.space

    assert space.get(name) == searched
    assert {other: space[other] for other in space if other != name} == {n: SPACE[n] for n in SPACE if n != name}


def test_a_range_with_a_slip_of_the_finger_is_told_by_its_name():
    message = refusal("sweep.space.training.learning_rate", {"low": 1e-4, "hihg": 1e-2})

    assert "sweep.space.training.learning_rate.high" in message and "hihg" in message


@pytest.mark.parametrize(("given", "repeated"), [("7 8 7", "7"), ([9, 1, 9, 1, 5], "1, 9")])
def test_repeated_seeds_are_refused(given, repeated):
    """The same seed twice would look like two independent runs."""
    assert f"{repeated} repeated" in refusal("seeds", given)


@pytest.mark.parametrize("path", parameter_names(Parameters))
def test_parameters_are_frozen(path):
    """No value changes after it was checked, at any depth."""
    *parents, name = path.split(".")
    owner = value_at(PHASE1, ".".join(parents)) if parents else PHASE1
    before = getattr(owner, name)

    with pytest.raises(ValidationError, match="frozen"):
        setattr(owner, name, before)


def test_flatten_names_every_value():
    """All leaves by their dotted names, and nothing nested."""
    flat = flatten(PHASE1)
    names = parameter_names(Parameters)
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    leaves = [name for name in leaves if name != "sweep.space"] + [f"sweep.space.{name}" for name in SPACE]

    assert sorted(flat) == sorted(leaves)
    assert flat["training.epochs"] == 200
    assert flat["collective.model_dropout.form"] == "per_image"
    assert flat["seeds"] == list(range(42, 52))
    assert not any(isinstance(value, (dict, tuple)) for value in flat.values())


def test_flatten_follows_the_architecture_of_an_arm():
    """Whichever of the two it is."""
    about = {"in_dim": 784, "num_classes": 10, "params": 100, "target_params": 80}
    collective = Arm(model_type="collective", architecture=CollectiveConfig(), **about)
    shallow = Arm(model_type="shallow", architecture=MlpArchitecture(hidden_dims=(8, 6)), **about)

    assert flatten(collective)["architecture.expert_hidden"] == [512, 256]
    assert flatten(shallow)["architecture.hidden_dims"] == [8, 6]


def test_an_arm_is_told_apart_by_its_kind():
    """An arm comes back from text as the architecture that it was."""
    for architecture in (CollectiveConfig(n_total=5), MlpArchitecture(hidden_dims=(8, 6), residual=True)):
        arm = Arm(
            model_type="collective",
            in_dim=784,
            num_classes=10,
            params=102,
            target_params=100,
            architecture=architecture,
        )

        assert Arm.model_validate_json(arm.model_dump_json()) == arm
        assert arm.param_error_pct == pytest.approx(2)


def test_the_baselines_are_all_types_but_the_collective():
    """Two lists that must not drift apart."""
    assert MODEL_TYPES[0] == "collective"
    assert MODEL_TYPES[1:] == BASELINES
