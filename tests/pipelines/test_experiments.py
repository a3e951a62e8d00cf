"""What every pipeline says before it runs: the parameters that it reads, and the room that it needs."""

import pytest

from collective_pipeline.config import DEBUG, HOW_TO_PLAN, Parameters, UserError, parameter_names, with_values
from collective_pipeline.pipeline_registry import register_pipelines
from collective_pipeline.pipelines.experiments import EXPERIMENTS, check_read


def test_every_pipeline_says_what_it_reads_and_every_parameter_is_read():
    names = parameter_names(Parameters)
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    refused = {name for one in EXPERIMENTS.values() for name in one.ignores}
    unread = [
        name
        for name in leaves
        if name not in refused and not any(one.is_reader_of(name) for one in EXPERIMENTS.values())
    ]

    assert EXPERIMENTS.keys() == register_pipelines().keys() - {"__default__"}
    # Some have no part in a pipeline whose other training parameters have: it refuses them.
    assert set(unread) <= {name for one in EXPERIMENTS.values() for name in one.ignores}
    assert {read for one in EXPERIMENTS.values() for read in one.reads} <= set(names)


@pytest.mark.parametrize(
    ("pipeline", "given", "advice"),
    [
        ("deepmoe", "seeds", "use `deepmoe.seeds`"),
        ("deepmoe", "training.epochs", "use `deepmoe.training.epochs`"),
        ("merged_moe", "dataset", "use `merged_moe.dataset`"),
        ("merged_moe", "deepmoe.seeds", "use `merged_moe.seeds`"),
        ("single", "deepmoe.training.epochs", "use `training.epochs`"),
        ("sweep", "merged_moe.seeds", "use `seeds`"),
        ("deepmoe", "comparison.reference", "it is a parameter of --pipeline single, phase1, sweep"),
        ("sweep", "training.expert_analysis_interval", "it is a parameter of --pipeline single, phase1"),
        ("phase1", "model_type", "it is a parameter of --pipeline single, lr_finder, predict"),
        ("single", "sweep.space.training.batch_size", "it is a parameter of --pipeline sweep"),
        ("tiny_imagenet", "training.mixup_alpha", "use `tiny_imagenet.training.mixup_alpha`"),
        ("imagenet", "training.epochs", f"use `imagenet.training.epochs`; {HOW_TO_PLAN}"),
        ("tiny_imagenet", "deepmoe.width", "use `tiny_imagenet.width`"),
        ("tiny_imagenet", "tiny_imagenet.training.expert_analysis_interval", "nothing reads it: leave it out"),
    ],
)
def test_what_a_pipeline_does_not_read_is_refused_with_what_it_reads(pipeline, given, advice):
    with pytest.raises(UserError) as error:
        check_read(["device", given], [pipeline])

    assert str(error.value) == f"`{given}` is not read by --pipeline {pipeline}: {advice}"


def test_of_several_pipelines_one_is_to_read_it():
    check_read(["seeds", "deepmoe.seeds"], ["phase1", "deepmoe"])
    with pytest.raises(UserError, match=r"`sweep\.mode` is not read by --pipeline phase1,deepmoe"):
        check_read(["seeds", "sweep.mode"], ["phase1", "deepmoe"])


@pytest.mark.parametrize(
    ("pipeline", "change", "factor"),
    [
        ("single", {"seeds": [1, 2, 3, 4, 5, 6]}, 2),
        ("phase1", {"seeds": [1, 2, 3, 4, 5, 6]}, 2),
        ("deepmoe", {"deepmoe.seeds": [1, 2, 3, 4]}, 2),
        ("merged_moe", {"merged_moe.seeds": [1, 2, 3, 4]}, 2),
        ("tiny_imagenet", {"tiny_imagenet.seeds": [1, 2, 3, 4]}, 2),
        ("sweep", {"sweep.sizes": [300_000, 1_120_000]}, 2),
        ("sweep", {"sweep.workers": 3}, 3),
        ("sweep", {"sweep.side_by_side": 4}, 4),
        ("predict", {"seeds": [1]}, 1),
    ],
)
def test_more_seeds_networks_or_trainings_at_once_need_more_room(pipeline, change, factor):
    count = EXPERIMENTS[pipeline].count_weights
    settings = with_values(DEBUG, {"device": "cpu"})

    assert count(with_values(settings, change)) == factor * count(settings)


def test_a_search_needs_room_for_the_largest_of_its_space_and_for_what_it_keeps():
    search = with_values(DEBUG, {"device": "cpu", "sweep.mode": "search"})
    count = EXPERIMENTS["sweep"].count_weights
    wider = search.sweep.space | {"collective.expert_output": (16, 512)}
    impossible = search.sweep.space | {"collective.n_experts": (30,)}

    assert count(with_values(search, {"sweep.space": wider})) > count(search)
    assert count(with_values(search, {"sweep.retrain": 3})) > count(search)
    assert count(with_values(search, {"sweep.space": impossible})) > 0
