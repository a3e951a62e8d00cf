"""Real data, real processes: minutes, so `make test-slow` runs them, `make test` does not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from collective_pipeline.evaluation.gpu import USAGE_COLUMNS

ROOT = Path(__file__).parents[1]
KEDRO = Path(sys.executable).with_name("kedro")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The project with its embedded MNIST, and nothing of earlier runs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("conf", "pyproject.toml", ".telemetry"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    shutil.copytree(ROOT / "data" / "01_raw" / "mnist", folder / "data" / "01_raw" / "mnist")
    (folder / "src").mkdir()
    (folder / "conf" / "local").mkdir(exist_ok=True)
    return folder


def kedro(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([KEDRO, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_debug_epoch_on_mnist_reaches_what_is_known(clone):
    """One epoch of the debug collective reads the real digits: over 96 %, where the original's needed five for less."""
    result = kedro(clone, "run", "--env", "debug", "--params", "training.epochs=1,seeds=42")
    runs = pd.read_csv(clone / "data/08_reporting/single/runs.csv")

    assert result.returncode == 0, result.stderr
    assert runs["test_accuracy"].iloc[0] > 96
    assert not result.stderr.replace("collective", "").count("Warning")


def test_a_second_process_gives_the_same_numbers(clone):
    """Same seed, same machine: the same history, whichever process trains it."""
    params = "training.epochs=1,seeds=7,model_type=shallow"
    histories = []
    for _ in range(2):
        assert kedro(clone, "run", "--env", "debug", "--params", params).returncode == 0
        history = pd.read_parquet(clone / "data/07_model_output/shallow/history.parquet")
        histories.append(history.drop(columns=["seconds", *USAGE_COLUMNS], errors="ignore"))

    pd.testing.assert_frame_equal(*histories)


def test_viz_builds_with_a_box_for_each_arm_and_figures(clone):
    """Kedro-Viz makes its static site; the seven arms are boxes, figures have previews."""
    result = kedro(clone, "viz", "build", "--include-previews")
    assert result.returncode == 0, result.stderr
    graph = json.loads((clone / "build/api/pipelines/phase1").read_text())
    boxes = {node["name"] for node in graph["nodes"] if node["type"] == "modularPipeline"}

    assert {"collective", "shallow", "balanced", "deep", "very_deep", "deep_resnet", "very_deep_resnet"} <= boxes


def test_a_model_answers_from_another_folder_without_a_network(clone, tmp_path):
    """`mlflow models predict` on raw bytes, with the code that the model carries."""
    params = "training.epochs=1,data.val_fraction=0.9,model_type=shallow,seeds=5"
    assert kedro(clone, "run", "--env", "debug", "--params", params).returncode == 0
    # Tests before this one have left models as well.
    model = max((clone / "mlruns").rglob("MLmodel"), key=lambda path: path.stat().st_mtime).parent
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(model / "serving_input_example.json", tmp_path / "input.json")
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "PIP_NO_INDEX": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | nowhere
    command = ["models", "predict", "--env-manager", "local", "-m", "model", "-t", "json"]
    result = subprocess.run(
        [KEDRO.with_name("mlflow"), *command, "-i", "input.json", "-o", "output.json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers = json.loads((tmp_path / "output.json").read_text())["predictions"]

    assert [answer["prediction"] for answer in answers] == ["7", "2"]  # the first two digits of MNIST's test part
    assert all(sum(answer[str(k)] for k in range(10)) == pytest.approx(1, abs=1e-5) for answer in answers)
