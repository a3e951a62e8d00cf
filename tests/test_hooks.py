import errno
import math
import os
import signal

import click
import pandas as pd
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from tests.conftest import wait_until

from collective_pipeline.config import UserError
from collective_pipeline.hooks import PlainErrors, StopCleanly, TellAnswer, command_to_go_on, format_comparison
from collective_pipeline.io.paths import PathDataset
from collective_pipeline.pipeline_registry import register_pipelines
from collective_pipeline.training import interrupt


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("run", "kedro run --params resume=true"),
        ("run --params seeds=1", "kedro run --params seeds=1,resume=true"),
        ("run --params seeds=1,resume=true", "kedro run --params seeds=1,resume=true"),
        ("run --params=seeds=1 --env debug", "kedro run --params=seeds=1,resume=true --env debug"),
    ],
)
def test_who_was_stopped_is_told_the_whole_command_to_go_on(typed, told):
    assert command_to_go_on(typed.split(), resumes=True) == told
    assert command_to_go_on(typed.split(), resumes=False) == f"kedro {typed}"


@pytest.mark.parametrize("name", register_pipelines())
@pytest.mark.parametrize(
    "error",
    [interrupt.Interrupted("enough"), OSError(errno.ENOSPC, "No space left on device"), UserError("mend that")],
    ids=["told", "full_disk", "refused"],
)
def test_who_was_stopped_goes_on_from_what_this_run_has_saved_alone(name, error, tmp_path, monkeypatch):
    """Not from what an earlier one left, which it may not have come to replace, nor from what is beside a state."""
    monkeypatch.setattr("sys.argv", ["kedro", "run"])
    pipeline, hooks = register_pipelines()[name], PlainErrors()
    names = [state for state in pipeline.inputs() if state.endswith((".last", ".states"))]
    states = {state: tmp_path / state / "last.safetensors" for state in names}
    places = {state: file.parent if state == "sub_models.last" else file for state, file in states.items()}
    catalog = DataCatalog({state: PathDataset(filepath=str(place)) for state, place in places.items()})
    for file in states.values():
        file.parent.mkdir()
        file.write_bytes(b"of an earlier run")
        os.utime(file, (0, 0))

    def is_told_to_resume() -> bool:
        with click.Context(click.Command("run")), pytest.raises(click.ClickException) as stopped:
            hooks.on_pipeline_error(error, pipeline, catalog)
        return "--params resume=true" in stopped.value.message

    hooks.before_pipeline_run(pipeline, catalog)
    for file in states.values():
        file.with_suffix(".run").touch()
        file.with_name(f".partial.{file.name}").touch()
    assert not is_told_to_resume()
    for file in states.values():
        file.write_bytes(b"of this one")
        assert is_told_to_resume() == (name != "sweep")  # which goes on by itself
        os.utime(file, (0, 0))


@pytest.mark.parametrize("pipeline", register_pipelines())
def test_who_stops_a_run_is_told_of_a_saved_state_only_where_there_will_be_one(pipeline, caplog):
    stopping = StopCleanly()
    stopping.before_pipeline_run(register_pipelines()[pipeline])
    signal.raise_signal(signal.SIGTERM)
    was_requested = interrupt.requested()
    wait_until(lambda: caplog.messages)
    stopping.after_pipeline_run()

    (line,) = caplog.messages
    assert was_requested and line.startswith("SIGTERM: the run ")
    assert ("saves its state" in line) == (pipeline not in {"demo", "predict", "lr_finder"})


@pytest.mark.parametrize("reference", ["collective", "shallow"])
def test_the_printed_table_names_the_arm_that_the_others_are_compared_to(reference):
    """Also where another arm is exactly as good with every seed."""
    arms = pd.DataFrame({"model_type": ["deep", "collective", "shallow"], "params": [1000] * 3})
    zero = ["test_accuracy_mean", "test_accuracy_ci_low", "test_accuracy_ci_high", "difference_to_reference"]
    comparison = arms.assign(**dict.fromkeys([*zero, "difference_ci_low", "difference_ci_high", "train_seconds"], 0.0))
    comparison["p_value_holm"] = [None if name == reference else 1.0 for name in comparison["model_type"]]
    heads, *rows = format_comparison(comparison, reference=reference, top5={}).split("\n")

    assert f"minus {reference} " in heads
    assert ["-" in row.split() for row in rows] == [name == reference for name in comparison["model_type"]]
    assert "top-5" not in heads
    top5 = {"shallow": 91.256, "deep": 90.0, "collective": math.nan}
    heads, *rows = format_comparison(comparison, reference=reference, top5=top5).split("\n")
    place = heads.index("top-5 %") + len("top-5 %")
    assert [row[:place].split()[-1] for row in rows] == ["90.00", "-", "91.26"]


@pytest.mark.parametrize(
    ("resume", "since_start", "told"),
    [
        (False, 80.0, "80 s in all, 60 s of them training\n"),
        (True, 80.0, "80 s in all\n"),
        (True, 50.0, "50 s in all\n"),
    ],
)
def test_what_earlier_commands_trained_is_no_part_of_the_time_of_this_one(
    tmp_path, monkeypatch, capsys, resume, since_start, told
):
    """Whose seconds are in those of the runs."""
    runs = pd.DataFrame({"model_type": ["deep", "shallow"], "target_params": 1000, "train_seconds": [20.0, 40.0]})
    names = ("runs", "summary", "report")
    box = Pipeline([Node(lambda parameters: None, "parameters", [f"single.{name}" for name in names])])
    values = {"parameters": {"resume": resume}, "single.runs": runs, "single.summary": {"answer": "It is so."}}
    catalog = DataCatalog({name: MemoryDataset(value) for name, value in values.items()})
    catalog["single.report"] = PathDataset(filepath=str(tmp_path / "report.html"))
    monkeypatch.setattr("time.time", lambda: 1000.0 + since_start)
    monkeypatch.setattr("psutil.Process.create_time", lambda process: 1000.0)
    TellAnswer().after_pipeline_run(box, catalog)

    assert told in capsys.readouterr().out
