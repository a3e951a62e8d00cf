"""`kedro run --pipeline imagenet` as a user types it, on a hundred image files of different sizes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from kedro.io import DataCatalog
from PIL import Image
from tests.conftest import ROOT
from tests.test_run import as_params, kedro, runs_of

from collective_pipeline.config import UserError
from collective_pipeline.data.image_index import index_images
from collective_pipeline.models.checkpoint import load_checkpoint
from collective_pipeline.pipelines.data.nodes import read_settings
from collective_pipeline.pipelines.imagenet import nodes

REPORTING = "data/08_reporting/imagenet"
CLASSES = ("red", "green", "blue")


def write_tree(root: Path) -> Path:
    """A class is a colour in noise; every file has a size of its own."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 40), ("val", 5)):
        for channel, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 120, (60 + i, 70 + 2 * i, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / part / name / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def params(tmp_path_factory) -> dict:
    return {
        "imagenet.folder": str(write_tree(tmp_path_factory.mktemp("tree"))),
        "imagenet.val_fraction": 0.1,
        "imagenet.augmentation.colour_probability": 0.3,
        "imagenet.augmentation.move_probability": 0.5,
        "imagenet.augmentation.cutout_probability": 0.5,
        "imagenet.training.mixup_alpha": 0.2,
        "imagenet.training.cutmix_alpha": 1.0,
        "imagenet.drop_path": 0.1,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, new_project, params):
    """A run of the debug environment; the folder and what was printed."""
    project = new_project(tmp_path_factory.mktemp("imagenet"))
    result = kedro(project, "run", "--pipeline", "imagenet", "--env", "debug", "--params", as_params(params))
    assert result.exit_code == 0, result.output
    return project, result


def checkpoint_of(project: Path) -> Path:
    return next(project.glob("data/06_models/imagenet_network/best.safetensors/*/best.safetensors"))


def test_what_was_found_is_told_before_training(trained):
    project, _ = trained
    found = pd.read_csv(project / REPORTING / "images.csv").set_index("part")

    assert found["images"].to_dict() == {"train": 120, "val": 15} and set(found["classes"]) == {3}
    assert set(found["labels"]) == {"names of folders"}
    assert (project / "data/05_model_input/imagenet/index.parquet").exists()


def test_the_network_is_trained_stage_by_stage_and_tested(trained):
    project, result = trained
    history = pd.read_parquet(project / "data/07_model_output/imagenet_network/history.parquet")
    runs = pd.read_csv(project / REPORTING / "runs.csv")

    assert list(history["phase"]) == ["48px", "64px"]
    assert list(runs["best_epoch"]) == [2]  # epochs of smaller images are not chosen
    page = (project / REPORTING / "report.html").read_text()
    assert "64 px" in (project / REPORTING / "training_curves.json").read_text()
    assert "Test accuracy against size" not in page and not (project / REPORTING / "accuracy.json").exists()
    assert "resnet18 with" in result.stdout and "train: names of folders; val: names of folders" in page
    assert "none met by this run" in page
    assert json.loads((project / REPORTING / "results.json").read_text())["resnet18"]["total_epochs"] == 2
    arms = runs_of(project)
    assert set(arms["status"]) == {"FINISHED"} and "resnet18" in set(arms["tags.model_type"])


def test_the_checkpoint_takes_its_preprocessing_along(trained, params):
    """The middle of an image of any size, as in validation."""
    project, _ = trained
    checkpoint = load_checkpoint(checkpoint_of(project))
    images = Path(params["imagenet.folder"]) / "val" / "red"
    given = as_params({"images": images, "checkpoint": checkpoint_of(project)})
    result = kedro(project, "run", "--pipeline", "predict", "--params", given)

    assert checkpoint.images.shape == (3, 64, 64) and checkpoint.images.centre == 0.875
    assert checkpoint.images.class_names == tuple(sorted(CLASSES))
    assert result.exit_code == 0, result.output
    predictions = pd.read_csv(project / "data/07_model_output/predict/predictions.csv")
    assert len(predictions) == 5 and set(predictions["prediction"]) <= set(CLASSES)


def test_a_packed_copy_gives_the_same_images_where_they_are_small(trained, tmp_path_factory, new_project, params):
    """At a side that none of them exceeds, files are kept as they are: the same training, from one file."""
    project = new_project(tmp_path_factory.mktemp("packed"))
    given = as_params({**params, "imagenet.pack_side": 200})
    result = kedro(project, "run", "--pipeline", "imagenet", "--env", "debug", "--params", given)

    assert result.exit_code == 0, result.output
    columns = ["test_accuracy", "test_loss", "val_accuracy"]
    packed, plain = (pd.read_csv(one / REPORTING / "runs.csv")[columns] for one in (project, trained[0]))
    pd.testing.assert_frame_equal(packed, plain)


def test_packed_copies_of_each_size_lie_side_by_side_and_serve_subsets(tmp_path, params, monkeypatch):
    """Whose images are those of the files; the catalog opens each of them."""
    monkeypatch.chdir(tmp_path)
    folder = Path("data/05_model_input/imagenet/packed")

    def images(side, subset_size):
        given = {"folder": params["imagenet.folder"], "pack_side": side, "subset_size": subset_size}
        settings, _ = read_settings({"imagenet": given | {"val_fraction": 0.1}}, "imagenet")
        splits = nodes.open_images(settings, nodes.index_files(settings, None)[0], folder)
        parts = (splits.train, splits.val, splits.test)
        return [batch for part in parts for batch, _ in part.chunks(8)], [part.labels for part in parts]

    of_both = [images(side, None) for side in (200, 64)]
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    of_subset, of_files = images(200, 60), images(None, 60)

    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    assert len(torch.cat(of_subset[1])) == 66 < len(torch.cat(of_both[0][1]))
    for mine, of_file in zip(*map(chain.from_iterable, (of_subset, of_files)), strict=True):
        assert torch.equal(mine, of_file)
    entries = yaml.safe_load((ROOT / "conf/base/catalog.yml").read_text())
    tree = Path(params["imagenet.folder"]).name
    catalog = DataCatalog.from_config({name: entries[name] for name in entries if name.startswith("imagenet.packed.{")})
    assert [len(catalog.load(f"imagenet.packed.{tree}.{side}.train")) for side in (64, 200)] == [120, 120]


def test_the_report_says_what_an_update_and_its_rate_were(trained):
    """Of each stage, with the GPUs that training was begun on, whatever the parameters say of one."""
    stages = ({"epochs": 8, "image_size": 160}, {"epochs": 1, "image_size": 192, "batch_size": 256})
    training = {"epochs": 9, "stages": stages, "batch_size": 512, "accumulation_steps": 2, "learning_rate": 0.5}
    settings, _ = read_settings({"imagenet": {"training": training, "rate_scaling": "sqrt"}}, "imagenet")

    assert nodes.describe_updates(settings, SimpleNamespace(identity={"num_gpus": 4})) == {
        "Plan": {
            "epochs 1 to 8": "160 px, 4,096 images an update (512 x 4 GPUs x 2 accumulated)",
            "epoch 9": "192 px, 2,048 images an update (256 x 4 GPUs x 2 accumulated)",
            "learning rate": "1 at most (0.5, scaled for 4 GPUs: sqrt)",
        }
    }
    assert "48 px, 32 images an update" in (trained[0] / REPORTING / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"imagenet.folder": "nowhere"}, "nowhere is not there: give the folder of the images"),
        ({"imagenet.model": "vgg11"}, "choose from resnet18"),
        ({"imagenet.training.epochs": 3}, "stages have 2 epochs together and epochs=3: change both, in a param"),
        ({"epochs": 3}, "did you mean 'imagenet.training.epochs'? where there are stages, `epochs` is their sum"),
        ({"imagenet.training.batch_size": 128}, "choose a smaller imagenet.training.batch_size"),
        ({"imagenet.subset_size": 10}, "subset_size leaves 1 of the val images"),
        ({"imagenet.training.cutout": 4}, "use imagenet.augmentation"),
        ({"num_gpus": 0}, "num_gpus=0: give a number from 1 to 64, or auto"),
        ({"num_gpus": 13}, "there are 12 in the smaller of validation and test: choose at most 12"),
        ({"training.epochs": 3}, "use `imagenet.training.epochs`"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(trained, params, given, told):
    """And leaves no run in MLflow."""
    given = as_params({**params, **given})
    runs = set(runs_of(trained[0])["run_id"])
    result = kedro(trained[0], "run", "--pipeline", "imagenet", "--env", "debug", "--params", given)

    assert result.exit_code == 1
    assert told in result.output and "Traceback" not in result.output
    assert runs and set(runs_of(trained[0])["run_id"]) == runs


def test_a_file_that_is_no_image_is_named_also_in_the_report_and_stops_the_run_beyond_the_limit(
    tmp_path, tmp_path_factory, new_project, params
):
    tree = write_tree(tmp_path / "tree")
    (tree / "train" / "red" / "0.jpg").write_bytes(b"no image")
    (tree / "train" / "red" / "1.jpg").write_bytes((tree / "train" / "red" / "1.jpg").read_bytes()[:300])
    project = new_project(tmp_path_factory.mktemp("bad"))
    given = {**params, "imagenet.folder": str(tree)}
    refused = kedro(project, "run", "--pipeline", "imagenet", "--env", "debug", "--params", as_params(given))
    borne = as_params({**given, "imagenet.max_bad": 0.05})
    result = kedro(project, "run", "--pipeline", "imagenet", "--env", "debug", "--params", borne)

    assert refused.exit_code == 1 and "Traceback" not in refused.output
    assert "0.jpg" in refused.output or "1.jpg" in refused.output
    assert result.exit_code == 0, result.output
    told = (
        (project / REPORTING / "report.html")
        .read_text()
        .partition("2 met by this run or left out of its packed copy: ")[2]
    )
    assert "red/0.jpg: " in told and "red/1.jpg: " in told


def test_who_stops_it_before_it_trains_is_told_the_same_command(tmp_path, new_project, params, monkeypatch):
    def be_stopped(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return index_images(*arguments, **options)

    monkeypatch.setattr(nodes, "index_images", be_stopped)
    monkeypatch.setattr("sys.argv", ["kedro", "run", "--pipeline", "imagenet"])
    command = ("run", "--pipeline", "imagenet", "--env", "debug", "--params", as_params(params))
    result = kedro(new_project(tmp_path), *command)

    assert result.exit_code == 128 + signal.SIGTERM
    assert "did not begin\nTo go on: kedro run --pipeline imagenet\n" in result.output


def processes_in(folder: Path) -> list[psutil.Process]:
    """Whatever works in this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it may be of another user, or gone
            if Path(process.cwd()) == folder.resolve():
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # of MLflow's store, opened here for the first time
def test_two_machines_under_torchrun_train_in_one_run(tmp_path, new_project, params):
    """The README's command twice, a process each, which meet on loopback; the folders are the same."""
    project = new_project(tmp_path / "project")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", "-m", "collective_pipeline",
        "--pipeline", "imagenet", "--env", "debug", "--params", as_params(params | {"device": "cpu"}),
    ]  # fmt: skip
    environment = os.environ | {"DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    told = [tmp_path / name for name in ("one", "other")]
    machines = []
    try:
        for file in told:
            with file.open("w") as output:
                machines.append(
                    subprocess.Popen(
                        command, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
                    )
                )
        codes = [machine.wait(500) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # torchrun ends what it has started
        for machine in machines:
            with contextlib.suppress(subprocess.TimeoutExpired):
                machine.wait(60)
            machine.kill()

    outputs = [file.read_text() for file in told]
    assert codes == [0, 0], "\n".join(outputs)
    assert processes_in(project) == []
    assert sorted(output.count("Report: ") for output in outputs) == [0, 1]
    assert len(pd.read_csv(project / REPORTING / "runs.csv")) == 1 and checkpoint_of(project).is_file()
    assert "x 2 GPUs" in (project / REPORTING / "report.html").read_text()
    runs = runs_of(project)
    assert len(runs) == 2 and set(runs["status"]) == {"FINISHED"}  # the command's, and the network's in it


def test_several_processes_on_the_cpu_are_told(trained, params, caplog):
    """Whoever asks for GPUs may not know that there are none."""
    given = as_params({**params, "num_gpus": 13, "device": "cpu"})
    kedro(trained[0], "run", "--pipeline", "imagenet", "--env", "debug", "--params", given)

    assert "No GPU is used: 13 processes train on the CPU." in caplog.messages


def test_a_packed_copy_needs_room(tmp_path, monkeypatch):
    """Told before the first of it is written, in which what is there already needs none."""
    index = index_images(write_tree(tmp_path / "tree"))
    monkeypatch.setattr(nodes.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"may take 0\.\d GB: free some"):
        nodes.check_room(index, tmp_path / "packed", 200)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "all").write_bytes(bytes(int(index.table["num_bytes"].sum())))
    nodes.check_room(index, tmp_path / "packed", 200)
