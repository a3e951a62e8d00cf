"""Every unit is done exactly once, whoever works on the study and whoever dies."""

import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from collective_pipeline.config import UserError
from collective_pipeline.tuning.study import Unit, open_study

on_a_journal = pytest.mark.parametrize("storage", ["journal"], indirect=True)

UNITS = [Unit("grid", "shallow", str(size), (0, 1)) for size in range(1, 13)]
SEARCH = [Unit("search", "shallow", str(number), (0,)) for number in range(3)]


@pytest.fixture
def opened(storage, make_settings):
    """Opens the one study again and again, each time as a worker of its own."""
    settings = make_settings(storage=storage)
    name = uuid.uuid4().hex  # the server is the same for all tests

    def open_again(identity=None, **sweep):
        config = settings.sweep.model_copy(update=sweep)
        return open_study(config, name, identity or {"dataset": "mnist"}, Path("unused"))

    open_again.space = {"shallow": {name: settings.sweep.space[name] for name in settings.sweep.space}}
    return open_again


def test_each_unit_is_claimed_once_by_workers_that_hurry(opened):
    """Five workers of two threads each take twelve units: none is taken twice, none is left."""
    workers = [opened() for _ in range(5)]
    begin = threading.Barrier(10)

    def take(worker):
        begin.wait()
        taken = []
        while (claim := worker.claim(UNITS, {"shallow": {}})) is not None:
            taken.append(claim.unit)
            claim.study.tell(claim.trial, values=[1.0])
        return taken

    with contextlib.ExitStack() as at_work, ThreadPoolExecutor(10) as pool:
        for worker in workers:
            at_work.enter_context(worker.at_work(2))
        taken = [unit for units in pool.map(take, workers * 2) for unit in units]

    assert sorted(taken, key=str) == sorted(UNITS, key=str)
    assert len(opened().part("grid", "shallow").trials) == len(UNITS)


def test_what_a_dead_worker_left_is_taken_again_with_the_same_values(opened):
    """And what a living one does is not."""
    living, dying = opened(), opened()
    with living.at_work():
        with dying.at_work():
            left = dying.claim(SEARCH, opened.space)
            kept = living.claim(SEARCH, opened.space)
            assert living.claim([left.unit, kept.unit], opened.space) is None
        again = living.claim(SEARCH, opened.space)

        assert again.unit == left.unit
        assert again.values == left.values
        assert living.claim([left.unit, kept.unit], opened.space) is None
    states = [trial.state for trial in opened().attempts([left.unit])[left.unit]]
    assert states == [TrialState.FAIL, TrialState.RUNNING]


def test_more_seeds_are_a_claim_of_the_new_ones_alone(opened):
    """Of a unit that is done, or that another worker is doing at the moment."""
    first, second = opened(), opened()
    with first.at_work(), second.at_work():
        claim = first.claim(UNITS[:1], {"shallow": {}})
        beside = second.claim([replace(UNITS[0], seeds=(0, 1, 2))], {"shallow": {}})
        for taken in (claim, beside):
            taken.study.tell(taken.trial, values=[1.0])
        after = first.claim([replace(UNITS[0], seeds=(3, 1, 4))], {"shallow": {}})

    assert [taken.unit.seeds for taken in (claim, beside, after)] == [(0, 1), (2,), (3, 4)]
    assert set(first.outcomes([replace(UNITS[0], seeds=(2, 0))])) == {replace(UNITS[0], seeds=(2, 0))}
    assert not first.outcomes([replace(UNITS[0], seeds=(2, 3))])


@on_a_journal
def test_what_a_dead_worker_left_is_taken_with_its_seeds_before_new_ones(opened):
    """Its saved state is of those."""
    dying, living, another = opened(), opened(), opened()
    with dying.at_work():
        dying.claim(UNITS[:1], {"shallow": {}})
    more = [replace(UNITS[0], seeds=(0, 1, 2))]
    with living.at_work(), another.at_work():
        claims = [worker.claim(more, {"shallow": {}}) for worker in (living, another)]

    assert [claim.unit.seeds for claim in claims] == [(0, 1), (2,)]


@on_a_journal
def test_what_is_left_is_shared_by_how_much_each_takes_at_once(opened):
    """Or one worker would take the last units while another stands idle; one that has left is not waited for."""
    large, small, gone = opened(), opened(), opened()
    with gone.at_work(6):
        pass
    with large.at_work(6), small.at_work(3):
        taken = [large.claim(UNITS[:6], {"shallow": {}}) for _ in range(6)]
        rest = [small.claim(UNITS[:6], {"shallow": {}}) for _ in range(3)]

    assert [claim is not None for claim in taken] == [True] * 4 + [False] * 2
    assert [claim is not None for claim in rest] == [True] * 2 + [False]


@on_a_journal
def test_a_trial_that_failed_for_good_is_done_and_one_that_was_left_is_not(opened):
    worker = opened()
    with worker.at_work():
        claim = worker.claim(UNITS[:1], {"shallow": {}})
        claim.trial.set_user_attr("failure", "the loss diverged")
        claim.study.tell(claim.trial, state=TrialState.FAIL)

        assert worker.claim(UNITS[:1], {"shallow": {}}) is None
        assert set(worker.outcomes(UNITS[:1])) == {UNITS[0]}


@on_a_journal
def test_a_unit_whose_workers_die_is_given_up_after_three(opened):
    """Or it would take down one worker after the other."""
    for _ in range(3):
        dying = opened()
        with dying.at_work():
            assert dying.claim(SEARCH[:1], opened.space) is not None
    worker = opened()
    with worker.at_work():
        assert worker.claim(SEARCH[:1], opened.space) is None

    [given_up] = worker.outcomes(SEARCH[:1])[SEARCH[0]]
    assert "died 3 times" in given_up.user_attrs["failure"]


@on_a_journal
def test_what_a_worker_left_between_two_steps_disturbs_nobody(opened):
    """Values that were to be tried again, and a trial without a unit."""
    left = opened().part("search", "shallow")
    left.enqueue_trial({"training.learning_rate": 0.05})
    left.ask()
    left.enqueue_trial({"training.learning_rate": 0.05})
    worker = opened()
    with worker.at_work(3):
        claims = [worker.claim(SEARCH, opened.space) for _ in SEARCH]

    rates = [claim.values["training.learning_rate"] for claim in claims]
    assert len(set(rates)) == 3 and 0.05 not in rates


@on_a_journal
def test_workers_that_begin_together_try_different_values(opened):
    first, second = opened(), opened()
    with first.at_work(), second.at_work():
        claims = [worker.claim(SEARCH, opened.space) for worker in (first, second)]

    assert claims[0].unit != claims[1].unit
    assert claims[0].values != claims[1].values


@on_a_journal
def test_a_study_of_other_settings_is_refused_naming_what_differs(opened):
    opened({"dataset": "mnist", "training.epochs": 200})

    with pytest.raises(UserError, match=r"training\.epochs was 200 and is 100.*sweep\.fork=true"):
        opened({"dataset": "mnist", "training.epochs": 100})


@on_a_journal
def test_a_fork_is_another_study_and_the_same_command_finds_it_again(opened):
    own = opened({"training.epochs": 200})
    fork = opened({"training.epochs": 100}, fork=True)

    assert fork.name == f"{own.name}-2"
    assert opened({"training.epochs": 100}, fork=True).name == fork.name
    assert opened({"training.epochs": 50}, fork=True).name == f"{own.name}-3"
    assert opened({"training.epochs": 200}, fork=True).name == own.name


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mysql://host/db", "choose a file for the processes of one machine"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot be used"),
        ("/proc/nowhere/study.journal", "cannot be used"),
        ("sqlite://", "choose a file for the processes of one machine"),
        ("/usr", "cannot be used"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_plainly(make_settings, place, message):
    with pytest.raises(UserError, match=message) as refusal:
        open_study(make_settings(storage=place).sweep, "study", {}, Path("unused"))

    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)
