"""A search space is checked before anything is trained, and each arm searches only what is its own."""

import optuna
import pytest

from collective_pipeline.config import MODEL_TYPES, PHASE1, SPACE, Range, UserError, check_parameters
from collective_pipeline.tuning.space import check_space, space_of, suggest


def refusal(space, **sweep):
    with pytest.raises(UserError) as error:
        check_space(check_parameters({"sweep": {"mode": "search", "space": space} | sweep}))
    return str(error.value)


def test_the_usual_space_can_be_used():
    check_space(check_parameters({"sweep": {"mode": "search"}}))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_arm_searches_its_own_knobs_and_those_of_training(model_type):
    foreign = "baselines." if model_type == "collective" else "collective."
    own = space_of(SPACE, model_type)

    assert own.keys() == {name for name in SPACE if not name.startswith(foreign)}
    assert {name for name in own if name.startswith("training.")}


def test_suggestions_are_in_the_space_and_of_its_types():
    trial = optuna.create_study().ask()
    values = suggest(trial, PHASE1.sweep.space | {"collective.expert_hidden": ((16, 8), (32, 16))})

    assert values.keys() == {*SPACE, "collective.expert_hidden"}
    assert values["collective.expert_hidden"] in {(16, 8), (32, 16)}
    for name, possible in SPACE.items():
        if isinstance(possible, Range):
            assert possible.low <= values[name] <= possible.high
        else:
            assert values[name] in possible


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"training.lr": [1e-3]}, "unknown parameter 'training.lr': did you mean 'training.learning_rate'?"),
        ({"training.epochs.deep": [1]}, "unknown parameter 'training.epochs.deep'"),
        ({"training.optimizer": ["adam", "lion"]}, "training.optimizer='lion' is unknown"),
        ({"training.learning_rate": {"low": -1, "high": 1}}, "training.learning_rate=-1"),
        ({"training.batch_size": [64], "collective.n_totl": None}, "did you mean 'collective.n_total'?"),
        ({"training.batch_size": [64], "sweep.trials": None}, "sweep.trials cannot be searched"),
        ({"training": [64]}, "unknown parameter 'training'"),
        ({"dataset": ["mnist"]}, "dataset cannot be searched"),
        ({"collective.n_total": [6]}, "nothing to search for shallow"),
    ],
)
def test_what_cannot_be_searched_is_refused(space, message):
    assert message in refusal(space)


def test_a_plan_that_is_too_short_for_the_trials_is_refused():
    with pytest.raises(UserError, match=r"sweep\.trial_epochs=5: training: warmup_epochs"):
        check_space(check_parameters({"training": {"warmup_epochs": 10}, "sweep": {"trial_epochs": 5}}))


def test_more_best_trials_than_trials_are_refused_in_a_search_alone():
    with pytest.raises(UserError, match="sweep: retrain=5 is more than trials=2"):
        check_parameters({"sweep": {"mode": "search", "trials": 2, "retrain": 5}})
    check_parameters({"sweep": {"trials": 2, "retrain": 5}})
