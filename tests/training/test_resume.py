"""An interrupted run that goes on ends as one that nobody interrupted: to the last bit, whatever had a state."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from tests.conftest import wait_until

from collective_pipeline.config import Arm, GateConfig, Parameters, ResNetArchitecture, UserError
from collective_pipeline.data.splits import Splits
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.pipelines.arm.nodes import clear
from collective_pipeline.training import interrupt, snapshots
from collective_pipeline.training.loop import Fit
from collective_pipeline.training.snapshots import let_go, read_snapshot
from collective_pipeline.training.train import _ArmTraining, snapshots_at, train_arm

CPU = torch.device("cpu")
EVERYTHING = {
    "optimizer": "adamw",
    "schedule": "cosine",
    "warmup_epochs": 1,
    "clip_norm": 1.0,
    "ema_decay": 0.9,
    "augmentation_strength": 1.0,
    "accumulation_steps": 2,
}


class Crash(Exception):
    """In the place of SIGKILL: nothing of the process is used again."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    """Every step is saved."""
    monkeypatch.setattr(snapshots, "SECONDS_BETWEEN", -1.0)
    monkeypatch.setattr(snapshots, "SHARE", float("inf"))


@pytest.fixture
def parameters(training):
    def make(*, resume: bool = False, seeds: tuple[int, ...] = (1, 2), **changes) -> Parameters:
        config = training.model_validate(training.model_dump() | changes)
        return Parameters(seeds=seeds, training=config, resume=resume)

    return make


def train_at(path: Path, arm: Arm, splits: Splits, settings: Parameters, *, updates: int | None = None):
    """Trains with the state saved at a path, until a number of updates, counted over everything, if one is given."""
    done = iter(range(1, 10_000))

    def watch(numbers):
        for number in numbers:
            yield number
            if next(done) == updates:
                raise Crash

    saved = snapshots_at(path, arm, splits, settings, CPU)
    seeds, config = settings.seeds, settings.training
    return train_arm(arm, splits, config, seeds=seeds, device=CPU, watch=watch, snapshots=saved)


@pytest.fixture
def run(arm, splits):
    """`train_at` of the collective."""
    return lambda path, settings, **options: train_at(path, arm, splits, settings, **options)


def ends(path: Path, checkpoint, result: Fit):
    """Everything that can be seen of how a run ended, but its clock."""
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]
    return read_snapshot(path).tensors, checkpoint.weights, history, (checkpoint.best_epochs, result.num_epochs)


def assert_same(one, other) -> None:
    for mine, yours in zip(one[:2], other[:2], strict=True):
        assert mine.keys() == yours.keys()
        assert not [name for name in mine if not torch.equal(mine[name], yours[name])]
    assert one[2:] == other[2:]


@pytest.mark.parametrize("updates", [1, 7, 10, 16])
@pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING,
        {"optimizer": "sgd", "schedule": "one_cycle", "precision": "fp16"},
        {"strategy": "pretrain_freeze_finetune"},
        {"strategy": "layerwise_autoencoding", "epochs": 6},
        {"early_stopping_patience": 1, "epochs": 8},
        {"early_stopping_patience": 1, "early_stopping_metric": "loss", "epochs": 8},
    ],
    ids=["everything", "fp16", "pretrain", "autoencode", "early_stopping", "early_stopping_by_loss"],
)
def test_going_on_equals_never_stopping(tmp_path, run, parameters, changes, updates):
    """Weights, moments, averages, scales, history, chosen epochs: in the middle of an epoch and at its end."""
    whole = run(tmp_path / "whole" / "last", parameters(**changes))
    path = tmp_path / "broken" / "last"
    with pytest.raises(Crash):
        run(path, parameters(**changes), updates=updates)
    resumed = run(path, parameters(resume=True, **changes))

    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))


@pytest.mark.parametrize("updates", [10, 18, 20])
def test_going_on_in_the_second_stage_equals_never_stopping(tmp_path, splits, parameters, updates):
    """Of a network with gates, nine updates an epoch: two epochs, then two with the moments and averages of before."""
    gates = GateConfig(embedding_dim=8, freeze_epochs=2)
    network = ResNetArchitecture(image_shape=splits.image_shape, blocks=(1,), width=4, gated=(0, 1), gates=gates)
    gated = make_image_arm("resnet18_moe", network, num_classes=3)
    changes = {"optimizer": "adamw", "schedule": "one_cycle", "ema_decay": 0.9}
    whole = train_at(tmp_path / "whole" / "last", gated, splits, parameters(seeds=(1,), **changes))
    path = tmp_path / "broken" / "last"
    with pytest.raises(Crash):
        train_at(path, gated, splits, parameters(seeds=(1,), **changes), updates=updates)
    resumed = train_at(path, gated, splits, parameters(seeds=(1,), resume=True, **changes))

    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))


def test_a_run_may_break_again_and_again(tmp_path, run, parameters):
    """It gets on by one update at a time."""
    whole = run(tmp_path / "whole" / "last", parameters(epochs=2, **EVERYTHING | {"warmup_epochs": 0}))
    path, attempts = tmp_path / "broken" / "last", 0
    settings = parameters(epochs=2, resume=True, **EVERYTHING | {"warmup_epochs": 0})
    while True:
        attempts += 1
        try:
            resumed = run(path, settings, updates=2)
            break
        except Crash:
            pass

    assert attempts > 3
    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))


def test_what_is_done_is_not_trained_again(tmp_path, run, parameters):
    """A finished arm gives its result without a single update."""
    first = run(tmp_path / "last", parameters())
    before = ends(tmp_path / "last", *first)
    second = run(tmp_path / "last", parameters(resume=True), updates=1)

    assert_same(ends(tmp_path / "last", *second), before)


def test_a_damaged_snapshot_is_named_and_the_one_before_it_used(tmp_path, run, parameters, caplog):
    """Any byte may be wrong, or missing; the end is the same."""
    whole = run(tmp_path / "whole" / "last", parameters())
    path = tmp_path / "broken" / "last"
    with pytest.raises(Crash):
        run(path, parameters(), updates=12)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    resumed = run(path, parameters(resume=True))

    assert f"{path} is damaged (its digest is not that of its contents)" in caplog.text
    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_half_a_snapshot_is_damaged(tmp_path, run, parameters, caplog, size):
    """As a file system may leave it after a power cut; with both damaged, the run begins from the start."""
    whole = run(tmp_path / "whole" / "last", parameters())
    path = tmp_path / "broken" / "last"
    with pytest.raises(Crash):
        run(path, parameters(), updates=12)
    for file in (path, path.with_name("previous.last")):
        file.write_bytes(file.read_bytes()[:size])
    resumed = run(path, parameters(resume=True))

    assert caplog.text.count(" is damaged ") == 2
    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": (1, 3)}, "seeds was [1, 2] and is [1, 3]"),
        ({"epochs": 5}, "training.epochs was 4 and is 5"),
        ({"learning_rate": 0.25}, "training.learning_rate was 0.005 and is 0.25"),
    ],
)
def test_a_snapshot_of_another_run_is_refused_by_what_differs(tmp_path, arm, splits, run, parameters, changes, named):
    """Before anything is trained, and without a word about what is the same."""
    with pytest.raises(Crash):
        run(tmp_path / "last", parameters(), updates=3)
    other = snapshots_at(tmp_path / "last", arm, splits, parameters(resume=True, **changes), CPU)

    for refuse in (other.check, other.load):
        with pytest.raises(UserError) as error:
            refuse()
        assert f"is of another run: {named}; give the command that was interrupted" in str(error.value)


def test_another_architecture_data_set_or_code_is_refused(tmp_path, arm, splits, run, parameters, monkeypatch):
    """All three are named."""
    with pytest.raises(Crash):
        run(tmp_path / "last", parameters(), updates=3)
    architecture = arm.architecture.model_copy(update={"head_dropout": 0.5})
    others = [
        (arm.model_copy(update={"architecture": architecture}), splits, "architecture.head_dropout was 0.2 and is 0.5"),
        (arm, replace(splits, name="fashion_mnist"), "dataset was 'mnist' and is 'fashion_mnist'"),
        (arm, replace(splits, test=splits.val), "images was "),
    ]
    for other_arm, other_splits, named in others:
        with pytest.raises(UserError, match=named.replace(".", r"\.")):
            snapshots_at(tmp_path / "last", other_arm, other_splits, parameters(resume=True), CPU).check()
    monkeypatch.setattr("collective_pipeline.__version__", "9.9")
    with pytest.raises(UserError, match=r"code version was '.*' and is '9\.9 \("):
        snapshots_at(tmp_path / "last", arm, splits, parameters(resume=True), CPU).check()


def test_another_device_is_told_and_goes_on(tmp_path, run, parameters, monkeypatch, caplog):
    """It may change the last digits, and no more."""
    with pytest.raises(Crash):
        run(tmp_path / "last", parameters(), updates=3)
    monkeypatch.setattr("collective_pipeline.training.train.describe_device", lambda device: "another card")
    run(tmp_path / "last", parameters(resume=True))

    assert "is another card now: training goes on, and may differ in its last digits" in caplog.text


def files_in(folder):
    return sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"
    )


def test_beginning_anew_sets_aside_all_of_a_run_that_was_not_finished(tmp_path, arm, splits, run, parameters, caplog):
    """No later `resume` takes it for its own, no training is lost, nor by a second slip; put back, it goes on."""
    project = tmp_path / "project"
    done, part = project / "done" / "last", project / "part" / "last"
    whole = run(tmp_path / "whole" / "last", parameters())
    run(done, parameters())
    with pytest.raises(Crash):
        run(part, parameters(), updates=12)
    part.with_suffix(".run").write_text("an id")
    before = files_in(project)

    def begin(**changes):
        settings = parameters(**changes)
        clear([snapshots_at(path, arm, splits, settings, CPU, name=path.parent.name) for path in (done, part)])

    begin(resume=True)
    assert files_in(project) == before and not caplog.text
    begin()
    (first,) = {folder.name for folder in project.glob("*/aside-*")}
    assert (
        f"(done done, part in epoch 2): it begins anew, and what was saved is set aside in folders called {first};"
        in (caplog.text)
    )
    assert [name.replace(f"{first}/", "") for name in files_in(project)] == before
    with pytest.raises(Crash):
        run(part, parameters(), updates=12)
    begin()
    assert len({folder.name for folder in project.glob("*/aside-*")}) == 2

    for folder in project.glob(f"*/{first}"):
        for file in folder.iterdir():
            file.replace(folder.parent / file.name)
    begin(resume=True)
    assert part.with_suffix(".run").read_text() == "an id"
    assert_same(ends(part, *run(part, parameters(resume=True))), ends(tmp_path / "whole" / "last", *whole))


def test_beginning_anew_removes_what_was_finished(tmp_path, arm, splits, run, parameters, caplog):
    path = tmp_path / "collective" / "last"
    run(path, parameters())
    clear([snapshots_at(path, arm, splits, parameters(), CPU)])

    assert not caplog.text and not files_in(tmp_path)


def test_no_other_command_saves_where_one_does_until_it_ends(tmp_path, arm, splits, parameters):
    """Long after what it trains there is done; a second run of the same process is no other command."""
    path = tmp_path / "last"
    for _ in range(2):
        clear([snapshots_at(path, arm, splits, parameters(), CPU)])
    gc.collect()
    other = FileLock(tmp_path / ".last.lock")
    with pytest.raises(Timeout):
        other.acquire(timeout=0)
    let_go()
    with other.acquire(timeout=0), pytest.raises(UserError, match="collective: another command trains it now"):
        clear([snapshots_at(path, arm, splits, parameters(), CPU)])


def test_a_disk_without_locks_is_told_and_used(tmp_path, arm, splits, parameters, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    clear([snapshots_at(tmp_path / "last", arm, splits, parameters(), CPU)])

    assert ".last.lock cannot be locked" in caplog.text and "let no two commands write there at once" in caplog.text


@pytest.mark.parametrize("left", [None, b"half of a state"])
def test_a_run_that_left_no_state_is_not_gone_on_with_in_mlflow(tmp_path, arm, splits, parameters, left):
    """Nothing says that its parameters were these; where there is a state, it has been compared."""
    path = tmp_path / "last.safetensors"
    saved = snapshots_at(path, arm, splits, parameters(resume=True), CPU)
    saved.run_file.write_text("an id")
    if left is not None:
        path.write_bytes(left)
    saved.clear()

    assert not saved.run_file.exists()


def test_a_full_disk_leaves_the_snapshot_before_it(tmp_path, run, parameters, monkeypatch):
    """The error comes through; what was saved stays whole, and nothing half-written is left."""
    path = tmp_path / "last"
    with pytest.raises(Crash):
        run(path, parameters(), updates=5)
    before = path.read_bytes()

    def no_room(file, tensors, about):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "write_tensors", no_room)
    with pytest.raises(OSError, match="No space left"):
        run(path, parameters(resume=True))
    assert path.read_bytes() == before and not list(tmp_path.glob(".partial*"))


@pytest.fixture
def hang_up_ends():
    """SIGHUP does what it does unless it is ignored, as it is where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_at_the_next_step(tmp_path, run, parameters, monkeypatch, hang_up_ends, stop):
    """With what the shell expects of a process that was told to stop."""
    whole = run(tmp_path / "whole" / "last", parameters())
    path = tmp_path / "broken" / "last"
    monkeypatch.setattr(snapshots, "SECONDS_BETWEEN", 1000.0)
    original = _ArmTraining.tell

    def tell(self, epoch):
        original(self, epoch)
        if epoch.number == 2 and not epoch.restored:
            signal.raise_signal(stop)

    monkeypatch.setattr(_ArmTraining, "tell", tell)
    with interrupt.listen(), pytest.raises(interrupt.Interrupted) as stopped:
        run(path, parameters())
    assert stopped.value.exit_code == 128 + stop
    assert f"stopped by {stop.name}: collective is saved after epoch 2 of 4" in str(stopped.value)
    resumed = run(path, parameters(resume=True))

    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))


def test_nothing_listens_afterwards():
    """The signals do again what they did before."""
    before = signal.getsignal(signal.SIGTERM)
    with interrupt.listen():
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested()

    assert not interrupt.requested() and signal.getsignal(signal.SIGTERM) is before


def test_a_hang_up_that_is_ignored_stays_so(hang_up_ends):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupt.listen():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not interrupt.requested()


SAVING = """
import fcntl, logging, os, signal, sys, termios, time
from pathlib import Path
from collective_pipeline.training import interrupt
interrupt.SECONDS_OF_HANG_UP = 60.0  # for a busy machine
is_terminal = sys.stdin.isatty()
if is_terminal:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
logging.basicConfig()
def is_open(output):
    try:
        return os.write(output, b".")
    except OSError:
        return False
try:
    with interrupt.listen():
        print("listening", flush=True)
        while not interrupt.requested():
            time.sleep(0.01)
        sys.stdin.read()  # until whoever hangs up has done so
        logging.warning("it saves")
        Path(sys.argv[1]).touch()
        deadline = time.monotonic() + 60
        while not is_terminal and not (is_open(1) and is_open(2)) and time.monotonic() < deadline:
            time.sleep(0.05)
        interrupt.stop("a test")
except interrupt.Interrupted as stopped:
    for output in (sys.stdout, sys.stderr):
        print(stopped, file=output, flush=True)
    sys.exit(stopped.exit_code)
"""


def start_saving(saved: Path, **streams) -> subprocess.Popen:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", SAVING, str(saved)], env=buffered, **streams)


def test_a_run_saves_though_its_terminal_is_gone(tmp_path):
    """As when a connection is lost: nothing can be written any more, and that is no error."""
    terminal, end = os.openpty()
    with start_saving(tmp_path / "saved", stdin=end, stdout=end, stderr=end, start_new_session=True) as process:
        os.close(end)
        assert os.read(terminal, 9) == b"listening"
        os.close(terminal)

    assert process.returncode == 128 + signal.SIGHUP and (tmp_path / "saved").exists()


def test_a_run_saves_though_what_reads_its_output_ends_with_the_terminal(tmp_path):
    """A moment later: `kedro run | tee log`, where both are told at once."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with start_saving(tmp_path / "saved", **pipes) as process:
        assert process.stdout.readline() == b"listening\n"
        process.send_signal(signal.SIGHUP)
        assert b"SIGHUP: the run stops at the next step" in process.stderr.readline()
        time.sleep(0.2)
        for stream in (process.stdout, process.stderr, process.stdin):
            stream.close()

    assert process.returncode == 128 + signal.SIGHUP and (tmp_path / "saved").exists()


GO_ON = "; --params resume=true goes on from the last saved state, if there is one."


def end_by(stops: str, pause: float, *, saves: bool = True, seconds: float = 60.0, gone: bool = False):
    """A process that these signals are sent to, and that ends well if it is left alone for some seconds.

    The pause between two signals is one of the clock that they are told apart by: a busy machine's threads are late.
    """
    script = f"""
import os, signal, threading, time
from types import SimpleNamespace
from collective_pipeline.training import interrupt
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if {gone}:
    nobody, end = os.pipe()
    os.dup2(end, 2)
    os.close(nobody)
now, looks = 1.0, []
def perf_counter():
    seen = now
    if threading.current_thread() is reader:
        looks.append(seen)
    return seen
with interrupt.listen(saves={saves}):
    (reader,) = {{*threading.enumerate()}} - {{threading.main_thread()}}
    interrupt.time = SimpleNamespace(perf_counter=perf_counter)
    stops = {stops.split()}
    for number, name in enumerate(stops, 1):
        os.kill(os.getpid(), signal.Signals[name])
        while len(looks) < number - stops[:number].count("SIGHUP"):
            time.sleep(0.01)
        now += {pause}
    time.sleep({seconds})
    os._exit(0 if interrupt.requested() else 1)
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("stops", "saves", "left"),
    [
        ("SIGTERM SIGTERM", True, GO_ON),
        ("SIGTERM SIGTERM", False, ", unsaved."),
        ("SIGHUP SIGTERM SIGHUP SIGTERM", True, GO_ON),
    ],
)
def test_a_second_signal_ends_the_process_at_once(stops, saves, left):
    ended = end_by(stops, 1.0, saves=saves)

    assert ended.returncode == 128 + signal.SIGTERM
    assert f"SIGTERM again: the run ends at once{left}\n" in ended.stderr  # what is told of the first may come later


def test_a_second_signal_ends_the_process_though_nobody_reads_of_it():
    assert end_by("SIGTERM SIGTERM", 1.0, gone=True).returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(("stops", "pause"), [("SIGTERM SIGTERM", 0.4), ("SIGHUP SIGHUP SIGTERM SIGHUP", 0.7)])
def test_what_is_one_stop_to_whoever_sends_it_ends_nothing_at_once(stops, pause):
    """Sent to the process and to its group; of a lost connection by kernel, shell and session, one after another."""
    assert end_by(stops, pause, seconds=0.3).returncode == 0


@pytest.mark.parametrize("stop", ["SIGTERM", "SIGHUP"])
def test_what_ends_a_forked_process_does_not_stop_its_parent(stop):
    script = f"""
import os, signal, time
from collective_pipeline.training import interrupt
signal.signal(signal.SIGHUP, signal.SIG_DFL)
is_up, tell = os.pipe()
with interrupt.listen():
    child = os.fork()
    if child == 0:
        os.write(tell, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(is_up, 1)
    os.kill(child, signal.{stop})
    _, status = os.waitpid(child, 0)
    time.sleep(0.2)
    assert os.WTERMSIG(status) == signal.{stop} and not interrupt.requested()
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False).returncode == 0


def test_a_signal_is_noticed_while_the_main_thread_waits_for_others(caplog):
    """The kernel may give it to any thread, and what runs in Python's main thread alone would be late."""
    before = set(threading.enumerate())
    is_noticed = []
    done = threading.Lock()
    done.acquire()

    def be_signalled() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        wait_until(interrupt.requested)
        is_noticed.append(interrupt.was_signalled())
        done.release()

    with interrupt.listen():
        threading.Thread(target=be_signalled).start()
        done.acquire()
        assert is_noticed == [True]
    wait_until(lambda: set(threading.enumerate()) <= before)  # whoever tells it has done so

    assert [message.partition(":")[0] for message in caplog.messages] == ["SIGTERM"]  # though two hear it


def test_an_error_stops_no_later_run():
    """Also where signals cannot be noticed, in a thread other than the main one."""

    def fail_once() -> None:
        with interrupt.listen():
            interrupt.request(ValueError("of this run"))

    thread = threading.Thread(target=fail_once)
    thread.start()
    thread.join()

    assert not interrupt.requested()


@pytest.mark.parametrize("updates", [5, 20, 30])
def test_groups_of_seeds_go_on_where_they_were(tmp_path, run, parameters, monkeypatch, updates):
    """Groups that are done are not trained again, and the others end as if nobody had stopped them."""
    monkeypatch.setattr("collective_pipeline.training.train.groups_that_fit", lambda *_, **__: [[1, 2], [3]])
    settings = {"seeds": (1, 2, 3), **EVERYTHING}
    whole = run(tmp_path / "whole" / "last", parameters(**settings))
    path = tmp_path / "broken" / "last"
    with pytest.raises(Crash):
        run(path, parameters(**settings), updates=updates)
    # More memory than before: the groups stay what they were.
    monkeypatch.setattr("collective_pipeline.training.train.groups_that_fit", lambda *_, **__: [[1, 2, 3]])
    resumed = run(path, parameters(resume=True, **settings))

    assert_same(ends(path, *resumed), ends(tmp_path / "whole" / "last", *whole))
