"""The notebook: kept without outputs, and running from top to bottom on what a debug run leaves."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "phase1_analysis.ipynb"
TINY = "training.epochs=2,training.batch_size=64,seeds=1 2,comparison.resamples=200"
FIGURE = "application/vnd.plotly.v1+json"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def project(tmp_path_factory, new_project) -> Path:
    return new_project(tmp_path_factory.mktemp("project"))


def execute(notebook, project: Path):
    """Every cell in turn, in a kernel of its own that starts in the project's folder for notebooks."""
    (project / "notebooks").mkdir(exist_ok=True)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(project / "notebooks")}})
    return client.execute(env=os.environ | {"PYTHONPATH": str(ROOT / "src")})


def test_it_is_valid_small_and_without_outputs(notebook):
    """What is committed is text and code alone: a diff shows what was changed, and no figure is of an old run."""
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 100_000
    for cell in code:
        ast.parse(cell.source)


@pytest.mark.slow
def test_without_a_run_it_names_the_command(notebook, project):
    """Whoever opens it first is told what to type."""
    with pytest.raises(CellExecutionError, match="type `kedro run --pipeline phase1 --env debug` there"):
        execute(notebook, project)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_on_a_debug_run(notebook, project):
    """Every section shows its table or figure, of the run's own arms, and no cell says anything on standard error."""
    command = ["run", "--pipeline", "phase1", "--env", "debug", "--params", TINY]
    subprocess.run(
        [sys.executable, "-m", "kedro", *command],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        check=True,
        capture_output=True,
    )
    before = {path: path.stat().st_mtime_ns for path in (project / "data").rglob("*")}
    outputs = {cell.id: cell.outputs for cell in execute(notebook, project).cells if cell.cell_type == "code"}
    figures = {
        name: output.data[FIGURE]
        for name, shown in outputs.items()
        for output in shown
        if FIGURE in output.get("data", {})
    }

    assert not [output.text for shown in outputs.values() for output in shown if output.output_type == "stream"]
    assert figures.keys() == {name for name in outputs if name.endswith("-figure")} and len(figures) == 11
    assert "With 2 seeds it cannot be told" in outputs["answer"][0].data["text/markdown"]
    assert "very_deep_resnet" in outputs["comparison"][0].data["text/html"]
    assert len(figures["cka-figure"]["data"][0]["x"]) == len(figures["agreement-figure"]["data"][0]["y"]) == 8
    assert {trace["name"] for trace in figures["time-figure"]["data"]} == set(arms_of(figures["accuracy-figure"]))
    assert {path: path.stat().st_mtime_ns for path in (project / "data").rglob("*")} == before


def arms_of(figure) -> list[str]:
    """The arms that a figure of accuracies shows."""
    return [trace["y"][0].removeprefix("<b>").removesuffix("</b>") for trace in figure["data"]]
