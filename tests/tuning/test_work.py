"""A sweep from end to end, on arms of a second."""

import contextlib
import logging
import math
import multiprocessing
import signal
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
import torch
from optuna.trial import TrialState
from tests.conftest import wait_until

from collective_pipeline.config import UserError
from collective_pipeline.models.checkpoint import load_checkpoint
from collective_pipeline.models.matching import match_size
from collective_pipeline.training import interrupt, snapshots
from collective_pipeline.training.train import score, train_arm
from collective_pipeline.tuning import work as module
from collective_pipeline.tuning.outcome import collect_models, collect_runs, collect_trials, rank_importance
from collective_pipeline.tuning.study import Study, is_done
from collective_pipeline.tuning.work import Task, check_sizes, list_finals, list_units, run_workers, work

CPU = torch.device("cpu")


@pytest.fixture
def make_task(splits, tmp_path, make_settings):
    def make(**sweep):
        return Task(make_settings(**sweep), splits, tmp_path / "unused.journal", tmp_path / "states")

    return make


def with_epochs(task, epochs):
    training = task.settings.training.model_copy(update={"epochs": epochs})
    return replace(task, settings=task.settings.model_copy(update={"training": training}))


def finished(task):
    """The study after all the work."""
    work(task, CPU)
    return task.open()


def test_a_grid_trains_every_type_at_every_size_as_if_it_were_alone(make_task, splits):
    task = make_task()
    runs, arms = collect_runs(finished(task), task.settings)

    assert len(runs) == 2 * 2 * 2
    assert set(arms) == {(model_type, size) for model_type in ("shallow", "deep") for size in (3000, 5000)}
    settings = task.settings
    alone = match_size("deep", 5000, settings.collective, settings.baselines, in_dim=36, num_classes=3)
    checkpoint, _ = train_arm(alone, splits, settings.training, seeds=settings.seeds, device=CPU)
    expected = score(checkpoint, splits.test, splits, settings.training, device=CPU)["accuracy"]
    own = runs[(runs["model_type"] == "deep") & (runs["target_params"] == 5000)]
    assert own["test_accuracy"].tolist() == pytest.approx(expected)


def test_a_study_that_is_done_is_not_trained_again(make_task, monkeypatch):
    task = make_task()
    finished(task)
    monkeypatch.setattr(module, "train_arm", None)

    runs, _ = collect_runs(finished(task), task.settings)
    assert len(runs) == 8


def test_a_study_that_is_done_says_so_and_starts_nobody(make_task, monkeypatch, caplog):
    task = make_task(mode="search", workers=2, trials=1, trial_epochs=1)
    finished(task)
    monkeypatch.setattr(module, "work", None)
    with caplog.at_level(logging.INFO, "collective_pipeline"):
        run_workers(task, CPU)

    assert "Nothing is left of the 4 trainings of the study 'search-mnist'" in caplog.text


def test_the_best_models_of_a_search_are_told_by_their_files(make_task, tmp_path, monkeypatch):
    """From where the command was typed, with those of seeds that were added later; a grid has none."""
    task = make_task(mode="search", model_types=["shallow"], trials=2, trial_epochs=1, retrain=2)
    finished(task)
    more = replace(task, settings=task.settings.model_copy(update={"seeds": (1, 2, 3)}))
    study = finished(more)
    monkeypatch.chdir(tmp_path)
    models = collect_models(study, more.settings, more.folder)

    assert list(models) == ["shallow", "shallow 2"]
    for files in models.values():
        assert [load_checkpoint(tmp_path / file).seeds for file in files] == [(1, 2), (3,)]
        assert all(file.startswith("states/search-mnist-") for file in files)
    grid = make_task(study="grid")
    assert collect_models(grid.open(), grid.settings, grid.folder) == {}


def test_more_sizes_and_types_are_added_to_what_is_done(make_task):
    small = make_task(sizes=[3000], model_types=["shallow", "deep"])
    finished(small)
    larger = make_task(sizes=[3000, 5000], model_types=["shallow", "deep", "balanced"])
    study = finished(larger)

    assert len(collect_runs(study, small.settings)[0]) == 4
    assert len(collect_runs(study, larger.settings)[0]) == 12
    assert all(len(attempts) == 1 for attempts in study.attempts(list_units(larger.settings)).values())


def test_more_seeds_are_added_to_what_is_done(make_task, splits, tmp_path, make_settings):
    """And come out as if all had been asked for at once."""
    few, more = make_task(), make_task()
    more = replace(more, settings=more.settings.model_copy(update={"seeds": (3, *more.settings.seeds)}))
    finished(few)
    study = finished(more)
    at_once = replace(more, settings=more.settings.model_copy(deep=True), file=tmp_path / "other.journal")

    trained = [trial.user_attrs["seeds"] for trial in study.part("grid", "deep").trials]
    assert trained == [[1, 2], [1, 2], [3], [3]]
    runs, expected = (collect_runs(s, more.settings)[0] for s in (study, finished(at_once)))
    keys, scores = ["model_type", "target_params", "seed"], ["val_accuracy", "test_accuracy", "best_epoch"]
    pd.testing.assert_frame_equal(
        *(table.sort_values(keys, ignore_index=True)[keys + scores] for table in (runs, expected))
    )


def test_two_that_train_other_seeds_of_the_same_keep_their_states_apart(make_task):
    task = make_task()
    worker = module.Worker(task, task.open(), CPU, 1)
    one, other = (replace(list_units(task.settings)[0], seeds=seeds) for seeds in ((1, 2), (3, 4)))

    assert worker._folder(one) != worker._folder(other)


def test_what_a_sweep_does_not_read_does_not_part_its_studies(make_task):
    """Settings of another pipeline, for example, or how often one looks at a training."""
    task = make_task(sizes=[3000], model_types=["shallow"])
    finished(task)
    deepmoe = task.settings.deepmoe.model_copy(update={"width": 16})
    training = task.settings.training.model_copy(update={"expert_analysis_interval": 3})
    other = task.settings.model_copy(update={"deepmoe": deepmoe, "training": training})

    assert len(collect_runs(finished(replace(task, settings=other)), task.settings)[0]) == 2


def test_more_trials_of_another_command_do_not_change_what_is_best_here(make_task):
    few, more = (
        make_task(mode="search", model_types=["shallow"], trials=1),
        make_task(mode="search", model_types=["shallow"], trials=4),
    )
    work(few, CPU)
    before = list_finals(few.open(), few.settings)
    work(more, CPU)

    assert [unit for unit, _ in list_finals(few.open(), few.settings)] == [unit for unit, _ in before]
    assert collect_runs(few.open(), few.settings)[0]["seed"].tolist() == [1, 2]


def test_a_search_tests_only_its_best_with_seeds_it_has_not_seen(make_task, monkeypatch):
    tested = []
    monkeypatch.setattr(
        module,
        "score",
        lambda checkpoint, *rest, **named: tested.append(checkpoint.seeds) or score(checkpoint, *rest, **named),
    )
    task = make_task(mode="search")
    study = finished(task)
    trials = collect_trials(study, task.settings)
    runs, _ = collect_runs(study, task.settings)

    assert tested == [(1, 2), (1, 2)]
    assert trials.groupby("model_type").size().to_dict() == {"shallow": 3, "deep": 3}
    assert set(trials["state"]) <= {"complete", "pruned"}
    assert set(runs["model_type"]) == {"shallow", "deep"} and set(runs["seed"]) == {1, 2}
    for unit, best in list_finals(study, task.settings):
        values = [
            trial.values[0]
            for trial in study.part("search", unit.model_type).trials
            if trial.state == TrialState.COMPLETE
        ]
        assert best.values[0] == max(values)


def test_hyperparameters_that_diverge_or_cannot_be_used_fail_and_the_study_goes_on(make_task, caplog):
    """One choice ends in infinity, another has a warm-up that is longer than a trial."""
    space = {"training.learning_rate": [1e38, 1e-2], "training.warmup_epochs": [0, 10]}
    task = make_task(mode="search", model_types=["shallow"], trials=12, space=space)
    trials = collect_trials(finished(task), task.settings)

    failures = set(trials["failure"].dropna().str.split(":").str[0])
    assert failures == {"the loss of a seed diverged before it had good weights", "training"}
    assert (trials["state"] == "complete").any()
    assert len(trials) == 12


def test_a_grid_reports_what_diverged_at_once(make_task):
    """A size at which every seed diverges has rows without accuracies, and is not trained again."""
    task = make_task(model_types=["shallow"], sizes=[3000])
    training = task.settings.training.model_copy(update={"learning_rate": 1e38})
    task = replace(task, settings=task.settings.model_copy(update={"training": training}))
    study = finished(task)
    runs, arms = collect_runs(study, task.settings)

    assert len(runs) == 2 and runs["test_accuracy"].isna().all() and runs["diverged"].all()
    assert ("shallow", 3000) in arms
    assert len(study.attempts(list_units(task.settings))[list_units(task.settings)[0]]) == 1


def test_more_trials_find_a_new_best_and_train_it(make_task):
    few, more = (make_task(mode="search", model_types=["shallow"], trials=trials) for trials in (1, 6))
    finished(few)
    study = finished(more)
    (unit, best) = list_finals(study, more.settings)[0]

    assert best.values[0] == max(trial.values[0] for trial in study.part("search", "shallow").trials if trial.values)
    assert unit in study.outcomes([unit])
    assert len(collect_runs(study, more.settings)[0]) == 2


def test_an_error_in_a_thread_ends_the_worker(make_task, monkeypatch):
    """And does not leave the others waiting for what it had taken."""
    monkeypatch.setattr(Study, "claim", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError), interrupt.listen():
        work(make_task(side_by_side=3), CPU)


def test_pruning_stops_hopeless_trials_of_every_type(make_task):
    """A learning rate at which nothing is learnt does not get all its epochs."""
    space = {"training.learning_rate": [1e-9, 1e-2]}
    task = make_task(mode="search", trials=9, trial_epochs=9, space=space)
    trials = collect_trials(finished(task), task.settings)

    pruned = trials[trials["state"] == "pruned"]
    assert set(pruned["model_type"]) == {"shallow", "deep"}
    assert (pruned["epochs"] < 9).all()
    assert (trials.loc[trials["state"] == "complete", "epochs"] == 9).all()


def test_two_objectives_look_for_the_front_and_prune_nothing(make_task):
    task = make_task(mode="search", objective="accuracy_and_params", trials=5, retrain=2)
    study = finished(task)

    assert set(collect_trials(study, task.settings)["state"]) == {"complete"}
    for unit, trial in list_finals(study, task.settings):
        front = study.part("search", unit.model_type).best_trials
        assert trial.number in {best.number for best in front}
    names = collect_runs(study, task.settings)[0]["model_type"]
    assert {"shallow", "deep"} <= set(names)


def test_importance_finds_what_matters(make_task):
    space = {"training.learning_rate": {"low": 1e-6, "high": 1e-1, "log": True}, "baselines.dropout": [0.0, 0.01]}
    task = make_task(mode="search", model_types=["shallow"], trials=14, trial_epochs=1, space=space)
    importance = rank_importance(finished(task), task.settings).set_index("parameter")["importance"]

    assert importance.sum() == pytest.approx(1)
    assert importance.idxmax() == "training.learning_rate"


def test_a_stopped_worker_leaves_its_unit_and_another_goes_on_from_its_state(make_task, monkeypatch):
    """Two sizes are done before and after; the unit in between is trained in two parts, with one result."""
    task = make_task(model_types=["shallow"])
    expected = collect_runs(finished(task), task.settings)[0].drop(columns=["train_seconds", "samples_per_second"])

    stopped = make_task(model_types=["shallow"], study="stopped")
    epochs = []

    def stop(epoch):
        epochs.append(epoch.number)
        if len(epochs) == 3:  # the first of the second size
            interrupt.request(KeyboardInterrupt())

    monkeypatch.setattr(module, "Curves", lambda: stop)
    with pytest.raises(KeyboardInterrupt), interrupt.listen():
        work(stopped, CPU)
    study = finished(stopped)

    pd_columns = collect_runs(study, stopped.settings)[0].drop(columns=["train_seconds", "samples_per_second"])
    assert pd_columns.equals(expected)
    assert epochs == [1, 2, 1, 1, 2]  # the epoch before the stop is told again, not trained
    assert not any(stopped.folder.rglob("*.safetensors"))


def test_studies_of_one_name_in_two_storages_share_no_folder(make_task, tmp_path):
    """And whoever opens one of them again finds the states that were saved."""
    one, other = make_task(), make_task(storage=str(tmp_path / "other.journal"))
    names = [task.open().folder_name for task in (one, other, one)]

    assert names[0] == names[2] != names[1]
    assert all(name.startswith("grid-mnist-") for name in names)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"model_types": ["collective"], "sizes": [1000]}, "no collective .*; change sweep.sizes$"),
        ({"model_types": ["collective", "shallow"], "sizes": [5_000_000_000]}, "no collective .*; change sweep.sizes$"),
        (
            {"mode": "search", "space": {"baselines.target_params": [3000, 5]}},
            "no shallow .* 5 parameters .*; change baselines.target_params in sweep.space$",
        ),
        (
            {"mode": "search", "space": {"baselines.target_params": {"low": 300, "high": 5000}}},
            "no shallow .* 300 parameters .*; change baselines.target_params in sweep.space$",
        ),
    ],
)
def test_a_size_out_of_reach_is_refused_before_any_work(make_task, splits, sweep, message):
    """By the name of what is to be changed."""
    task = make_task(**sweep)
    with pytest.raises(UserError, match=message):
        check_sizes(task.settings, splits)


@pytest.mark.parametrize("mode", ["grid", "search"])
def test_sizes_within_reach_are_not_refused(make_task, splits, mode):
    check_sizes(make_task(mode=mode).settings, splits)


@pytest.mark.parametrize("stopped", [True, False])
def test_nobody_is_said_to_have_done_the_work_of_a_stopped_worker(make_task, monkeypatch, caplog, stopped):
    """Where the run is stopped, all of its workers end early and nothing is done; where it is not, it is told."""

    class Ended:
        pid, exitcode = 1, 130

        def start(self):
            pass

        terminate = join = start

    def own_work(*_, **__):
        if stopped:
            raise interrupt.Interrupted("the study is saved")

    context = SimpleNamespace(Process=lambda **_: Ended())
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(module, "work", own_work)
    with pytest.raises(interrupt.Interrupted) if stopped else contextlib.nullcontext():
        run_workers(make_task(workers=2), CPU)

    assert ("A worker ended early (exit status 130)" in caplog.text) is not stopped


def work_and_save_every_step(task):
    """As a process of its own."""
    torch.set_num_threads(1)
    snapshots.SECONDS_BETWEEN, snapshots.SHARE = -1.0, math.inf
    work(task, CPU)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing_and_nothing_is_done_twice(make_task):
    """SIGKILL in the middle of a training, of one of two processes: the other goes on with it from its saved state."""
    alone, task = (with_epochs(make_task(study=name), 30) for name in ("alone", "shared"))
    expected = finished(alone)
    started = multiprocessing.get_context("spawn")
    victim, other = workers = [started.Process(target=work_and_save_every_step, args=(task,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        wait_until(lambda: len(list(task.folder.rglob("last.safetensors"))) == 2)
        victim.kill()
        other.join(300)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    study = task.open()
    attempts = study.attempts(list_units(task.settings))
    keys, scores = ["model_type", "target_params", "seed"], ["val_accuracy", "test_accuracy", "best_epoch"]
    runs, unbroken = (collect_runs(one, task.settings)[0][keys + scores] for one in (study, expected))

    assert (victim.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    assert [sum(map(is_done, trials)) for trials in attempts.values()] == [1] * 4
    assert sorted(map(len, attempts.values())) == [1, 1, 1, 2]
    assert not any(trial.state == TrialState.RUNNING for trials in attempts.values() for trial in trials)
    assert runs.equals(unbroken)
    assert not list(task.folder.rglob("last.safetensors"))


@pytest.mark.slow
def test_several_processes_share_the_work(make_task):
    """Started by one command: everything is done once, and the search is followed by its finals."""
    # Long enough that the others have started before it is over.
    task = make_task(mode="search", workers=3, trials=12, trial_epochs=60, objective="accuracy_and_params")
    run_workers(task, CPU)
    study = task.open()

    units = [*list_units(task.settings), *(unit for unit, _ in list_finals(study, task.settings))]
    attempts = study.attempts(units)
    assert all(len(trials) == 1 for trials in attempts.values())
    assert len({trial.user_attrs["worker"] for trials in attempts.values() for trial in trials}) > 1
    assert all(not math.isnan(trial.values[0]) for trials in attempts.values() for trial in trials if trial.values)
    assert optuna.get_all_study_names(study.storage)
