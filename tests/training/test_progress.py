"""What a person is told while an arm trains."""

import logging
import threading
from dataclasses import replace
from typing import get_args

import pytest
import torch
from tests.conftest import wait_until

from collective_pipeline.config import ArmName, Parameters, Stage, TrainingConfig
from collective_pipeline.training import progress
from collective_pipeline.training.loop import Epoch
from collective_pipeline.training.progress import Progress, duration, make_progress, measure_pace, weigh_epochs
from collective_pipeline.training.train import match_to_splits


@pytest.fixture
def clock(monkeypatch):
    """Wall and processor time that only the test moves on."""
    now = {"wall": 100.0, "processor": 50.0}
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(progress.time, "process_time", lambda: now["processor"])
    return now


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger=progress.__name__)
    return caplog


def epoch(number: int, seconds: float, num_epochs: int = 10) -> Epoch:
    metrics = {"train_loss": [0.5, 0.7], "val_accuracy": [96.0, 98.0]}
    return Epoch(number, num_epochs, "train", metrics, (True, True), 1e-3, seconds, finished=number == num_epochs)


def test_a_line_says_where_it_is_and_how_long_it_takes(clock, told):
    """The first epoch's line has the mean over seeds, the pace and the time left."""
    Progress("shallow", num_epochs=10, num_arms=7, device_type="cpu")(epoch(1, 2.0))

    (line,) = told.messages
    assert " ".join(line.split()) == "shallow epoch 1/10 validation accuracy 97.00 % 2.0 s/epoch 18 s left"


def test_lines_of_all_arms_begin_in_the_same_column(clock, told):
    """Behind the longest of their names."""
    for name in get_args(ArmName):
        Progress(name, num_epochs=10, num_arms=1, device_type="cpu")(epoch(1, 2.0))

    assert len({line.rindex("epoch 1/10") for line in told.messages}) == 1


def test_seeds_that_train_in_turn_have_a_pace_each_and_the_time_of_all_that_is_left(clock, told):
    """The clock of every part begins at 0, its first epoch takes longer."""
    report = Progress("resnet18", num_epochs=10, num_arms=1, device_type="cuda")
    report(replace(epoch(1, 5.0), group=(1, 3)))
    clock["wall"] += 60
    report(replace(epoch(9, 21.0), group=(1, 3)))
    report(replace(epoch(1, 4.0), group=(2, 3)))
    clock["wall"] += 60
    report(replace(epoch(5, 12.0), group=(2, 3)))

    lines = [" ".join(line.split()) for line in told.messages]
    assert lines[1] == "resnet18 seeds, part 1/3 epoch 9/10 validation accuracy 97.00 % 2.0 s/epoch 42 s left"
    assert lines[3] == "resnet18 seeds, part 2/3 epoch 5/10 validation accuracy 97.00 % 2.0 s/epoch 30 s left"


def test_the_length_of_a_run_counts_seeds_that_train_in_turn(clock, told):
    """Before the first epoch has ended; and every part counts its own epochs."""
    report = Progress("resnet18", num_epochs=45, num_arms=1, device_type="cpu", num_parts=3)
    for _ in report.watch(range(1, 11)):
        clock["wall"] += 12
    report(replace(epoch(45, 60.0, num_epochs=45), group=(1, 3)))
    for _ in report.watch(range(1, 3)):
        clock["wall"] += 30

    lines = [" ".join(line.split()) for line in told.messages]
    assert sum("At this pace resnet18 will take about 4.5 h; for an answer in minutes" in line for line in lines) == 1
    assert lines[-1].startswith("resnet18 seeds, part 2/3 epoch 1: ")


def test_lines_are_some_seconds_apart_and_the_last_is_always_told(clock, told):
    """Fast epochs do not flood the terminal."""
    report = Progress("shallow", num_epochs=10, num_arms=1, device_type="cuda")
    for number in range(1, 11):
        clock["wall"] += 0.9
        report(epoch(number, 0.9 * number))

    assert [line.split()[2] for line in told.messages] == ["1/10", "7/10", "10/10"]
    assert told.messages[-1].endswith("done in 9 s")


def test_long_run_on_a_cpu_names_the_debug_environment(clock, told):
    """After the first epoch a comparison that takes hours says how long, and what to do instead."""
    Progress("shallow", num_epochs=200, num_arms=7, device_type="cpu")(epoch(1, 80.0, num_epochs=200))

    assert "shallow will take about 4.4 h, and it is one of 7 arms; for an answer in minutes" in told.messages[-1]
    assert "kedro run --env debug" in told.messages[-1]


def test_long_run_on_a_gpu_says_how_long(clock, told):
    """There the quick test is no advice, and the first epoch, which compiles kernels, no measure."""
    report = Progress("shallow", num_epochs=200, num_arms=1, device_type="cuda")
    report(epoch(1, 400.0, num_epochs=200))
    assert "will take" not in told.text
    report(epoch(2, 480.0, num_epochs=200))

    assert "shallow will take about 4.4 h." in told.messages[-1]


def test_short_run_has_no_warning(clock, told):
    """A run of minutes is not called long."""
    Progress("shallow", num_epochs=10, num_arms=7, device_type="cpu")(epoch(1, 2.0))

    assert all(record.levelno == logging.INFO for record in told.records)


@pytest.mark.parametrize(("share", "warned"), [(1.9, False), (1.1, True)])
def test_busy_machine_is_told(clock, told, monkeypatch, share, warned):
    """Two threads that get about one core between them wait for each other; with nearly two they do not."""
    monkeypatch.setattr(progress.torch, "get_num_threads", lambda: 2)
    report = Progress("shallow", num_epochs=10, num_arms=1, device_type="cpu")
    for _ in report.watch(range(progress.WARM_UP_STEPS + 2)):
        pass
    clock["wall"] += 10
    clock["processor"] += 10 * share
    report(epoch(1, 10.0))

    assert ("Other programs use this machine's cores" in told.text) == warned


def test_long_epoch_shows_how_far_it_is(clock, told):
    """Within an epoch of minutes there is a line now and then."""
    report = Progress("shallow", num_epochs=5, num_arms=1, device_type="cuda")
    for _ in report.watch(range(1, 101)):
        clock["wall"] += 1

    assert [line.split()[3] for line in told.messages] == ["20", "40", "60", "80", "100"]


def test_a_run_of_hours_says_so_after_a_minute(clock, told):
    """Not only once its first epoch is over, and not twice."""
    report = Progress("shallow", num_epochs=200, num_arms=7, device_type="cpu")
    for _ in report.watch(range(1, 1001)):
        clock["wall"] += 1
        if clock["wall"] < 160:
            assert "will take" not in told.text
    report(epoch(1, 1000.0, num_epochs=200))

    assert told.text.count("At this pace shallow will take about 55.6 h, and it is one of 7 arms; for an answer") == 1


def test_what_was_trained_before_is_not_told_again(clock, told):
    """But that it is done."""
    report = Progress("shallow", num_epochs=10, num_arms=7, device_type="cpu")
    for number in range(1, 5):
        report(replace(epoch(number, 2.0 * number), restored=True))
    for _ in report.watch(range(1, 4)):
        pass
    for number in range(5, 11):
        report(replace(epoch(number, 2.0 * number), restored=True))

    assert [" ".join(line.split()) for line in told.messages] == ["shallow epoch 10/10 is done"]


def test_seeds_that_stopped_or_diverged_do_not_count(clock, told):
    """The mean is over the seeds that are still trained; a last epoch before the plan's end is told as such."""
    metrics = {"train_loss": [0.5, 0.7, 0.9], "val_accuracy": [96.0, 98.0, float("nan")]}
    early = Epoch(5, 10, "train", metrics, (False, True, True), 1e-3, 10.0, finished=True)
    Progress("shallow", num_epochs=10, num_arms=1, device_type="cuda")(early)

    assert early.mean("val_accuracy") == 98.0 and early.mean("train_loss") == pytest.approx(0.8)
    assert "98.00 %" in told.text and told.text.strip().endswith("done in 10 s")


STAGES = (
    Stage(epochs=2, image_size=64, batch_size=50),
    Stage(epochs=1, image_size=128),
    Stage(epochs=1, image_size=256),
)


def test_the_work_of_an_epoch_is_the_pixels_of_its_images():
    """Those of whole batches alone; an epoch at twice the side has four times as many."""
    plan = TrainingConfig(epochs=4, batch_size=40, stages=STAGES)
    assert weigh_epochs(plan, num_images=100, image_size=128) == pytest.approx([0.25, 0.25, 0.8, 3.2])
    assert weigh_epochs(TrainingConfig(epochs=2, batch_size=50), num_images=100, image_size=28) == [1.0, 1.0]


def test_the_pace_counts_work_not_epochs():
    weights = [1.0, 1.0, 4.0]
    assert measure_pace(weights, (0, 0.0), (0.25, 10.0)) == pytest.approx(40)
    assert measure_pace(weights, (1, 50.0), (2.5, 140.0)) == pytest.approx(90 / 3)
    assert measure_pace(weights, (0, 0.0), (3, 120.0)) * sum(weights) == pytest.approx(120)


def test_two_minutes_within_the_first_epoch_tell_the_whole_plan(clock, told):
    """By the pace of the second one, since the first has compiled; once, and with what it will cost."""
    report = Progress(
        "resnet50", num_epochs=3, num_arms=1, device_type="cuda", weights=[1.0, 1.0, 4.0], price_per_hour=2.0
    )
    for number in report.watch(range(1, 1001)):
        clock["wall"] += 10 if number <= 6 else 3.6
    report(epoch(1, 4000.0, num_epochs=3))

    (line,) = (line for line in told.messages if "takes about" in line and "At this pace" not in line)
    assert line.endswith("at the pace of its updates the plan of 3 epochs takes about 6.0 h and costs 12.00")


@pytest.mark.parametrize("seconds", [7, 25, 55, 70, 110])
def test_updates_of_a_cpu_may_be_as_slow_as_they_are(clock, told, seconds):
    """Nothing compiles there: the forecast comes within two minutes, the advice with the first update after one."""
    report = Progress("resnet50", num_epochs=40, num_arms=1, device_type="cpu")
    advised, forecast = [], []
    for _ in report.watch(range(1, 101)):
        advised += [clock["wall"] - 100] * ("kedro run --env debug" in told.text)
        forecast += [clock["wall"] - 100] * ("the plan of 40 epochs takes about" in told.text)
        clock["wall"] += seconds

    whole = duration(40 * 100 * seconds)
    assert advised[0] <= 60 + seconds and f"resnet50 will take about {whole};" in told.text
    assert forecast[0] <= 120 and f"the plan of 40 epochs takes about {whole}" in told.text


def test_an_update_that_takes_longer_than_that_is_told_while_it_goes_on(told, monkeypatch):
    """By the time that it has taken until then; also where training goes on in the midst of an epoch."""
    monkeypatch.setattr(progress, "LONG_EPOCH_SECONDS", 0.05)
    before = set(threading.enumerate())
    report = Progress("resnet50", num_epochs=1000, num_arms=1, device_type="cpu")
    stops = report.watch(range(901, 1_000_001))
    next(stops)
    wait_until(lambda: set(threading.enumerate()) <= before)  # whoever tells it has done so
    stops.close()

    assert "resnet50 will take over " in told.text and "kedro run --env debug" in told.text
    assert told.text.count("will take") == 1


@pytest.mark.parametrize(("device_type", "last"), [("cuda", 1), ("cpu", 2)])
def test_an_update_that_compiles_or_is_done_is_not_told_so(told, device_type, last):
    """Nobody waits to tell it, in a minute."""
    before = set(threading.enumerate())
    report = Progress("resnet50", num_epochs=1000, num_arms=1, device_type=device_type)
    stops = report.watch(range(1, 1_000_001))
    for _ in range(last):
        next(stops)
    wait_until(lambda: set(threading.enumerate()) <= before)
    stops.close()

    assert not told.messages


def test_what_the_first_update_compiles_is_no_pace(clock, told):
    """It took 80 s on four H200, whose epochs took 15: the plan of seven minutes was told as one of two hours."""
    report = Progress("resnet50", num_epochs=30, num_arms=1, device_type="cuda", price_per_hour=2.0)
    for number in report.watch(range(1, 281)):
        clock["wall"] += 80 if number == 1 else 0.05
    clock["wall"] += 1  # validates
    report(epoch(1, 95.0, num_epochs=30))

    (line,) = (line for line in told.messages if "epoch 1/30" in line)
    assert line.endswith("15.0 s/epoch  7 min 15 s left") and "will take" not in told.text


def test_updates_that_only_wait_to_be_done_are_no_pace(clock, told):
    """A GPU is some updates behind: the first that come after what was compiled took no time."""
    report = Progress("resnet50", num_epochs=10, num_arms=1, device_type="cuda", price_per_hour=3.6)
    for number in report.watch(range(1, 1001)):
        clock["wall"] += 130 if number == 1 else 0.002 if number < 4 else 1.0

    (line,) = (line for line in told.messages if "takes about" in line and "At this pace" not in line)
    assert line.endswith("takes about 2.8 h and costs 10.00") and told.text.count("will take about 2.7 h") == 1


def test_the_rest_of_an_epoch_is_validated_once(clock, told):
    """One that goes on shortly before its end is no measure of the time of a whole one."""
    report = Progress("resnet50", num_epochs=90, num_arms=1, device_type="cuda")
    report(replace(epoch(1, 200.0, num_epochs=90), restored=True))
    for _ in report.watch(range(2490, 2501)):
        clock["wall"] += 0.08
    clock["wall"] += 20
    report(epoch(2, 400.0, num_epochs=90))

    assert " 200.0 s/epoch" in told.text


@pytest.mark.parametrize(
    ("device_type", "num_gpus", "price"), [("cuda", 4, 12.0), ("cuda", 0.5, 1.5), ("cpu", 1, None)]
)
def test_an_arm_costs_what_its_gpus_do(splits, device_type, num_gpus, price):
    """All of them, or a part of one that it shares; nothing is told on a CPU."""
    settings = Parameters(price_per_gpu_hour=3.0, training=TrainingConfig(epochs=7))
    arm = match_to_splits(settings, splits, "shallow")
    report = make_progress("name", arm, splits, settings, torch.device(device_type), num_gpus=num_gpus)

    assert report.price_per_hour == price and len(report.weights) == report.num_epochs == 7


def test_time_left_counts_stages_that_are_still_to_come_by_their_pixels(clock, told):
    """At the pace of the stage that trains, without its first epoch once there is another."""
    report = Progress("resnet50", num_epochs=6, num_arms=1, device_type="cuda", weights=[1.0] * 3 + [4.0] * 3)
    for number, seconds in ((1, 30.0), (2, 40.0), (3, 50.0), (4, 150.0), (5, 210.0)):
        clock["wall"] += 60
        report(epoch(number, seconds, num_epochs=6))

    assert [" ".join(line.split()).partition("97.00 % ")[2] for line in told.messages] == [
        "30.0 s/epoch 7 min 00 s left",
        "10.0 s/epoch 2 min 10 s left",
        "10.0 s/epoch 2 min 00 s left",
        "100.0 s/epoch 3 min 20 s left",
        "60.0 s/epoch 60 s left",
    ]


def test_durations_read_well():
    """Seconds, minutes or hours, as a person would say them."""
    spoken = {4.4: "4 s", 99: "99 s", 245: "4 min 05 s", 600: "10 min", 5400: "90 min", 7200: "2.0 h"}

    assert {seconds: duration(seconds) for seconds in spoken} == spoken
    assert duration(539.7) == "9 min 00 s"
