"""The demo: which checkpoint is served, what the page is told of an image, and how it ends."""

import asyncio
import base64
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image
from tests.evaluation.test_experts import CPU, IMAGES, collective, gated, mixture, shown, trained, without_any

from collective_pipeline.config import PHASE1, ResNetArchitecture, UserError
from collective_pipeline.data.decoding import decode_image
from collective_pipeline.evaluation.predict import Predictor
from collective_pipeline.models.checkpoint import read_header, save_checkpoint
from collective_pipeline.models.image_arms import make_image_arm
from collective_pipeline.pipelines.demo import app
from collective_pipeline.pipelines.demo.app import Responder, listen, make_app
from collective_pipeline.pipelines.demo.nodes import choose_checkpoint
from collective_pipeline.training import interrupt

NETWORKS = [gated, mixture, collective, without_any]


def file_of(image, kind="PNG"):
    """The bytes of a file with this image `(H, W)`."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, kind)
    return buffer.getvalue()


def call(served, method, path, body=b"", chunk=2**20):
    """What the app answers, without a socket. Starlette's own client would need one more package."""
    parts = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]
    sent = []

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "headers": [], "scheme": "http", "root_path": ""}
    asyncio.run(served(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return SimpleNamespace(status=sent[0]["status"], headers=headers, text=text)


def ask(checkpoint, data, **options):
    served = make_app(Responder(checkpoint, CPU, **options), about="a network")
    response = call(served, "POST", "/answer", data)
    return response.status, json.loads(response.text)


@pytest.mark.parametrize("make", NETWORKS)
def test_the_most_probable_classes_are_those_of_the_predictor(make):
    checkpoint, image = make(), IMAGES.images[3]
    expected = 100 * Predictor(checkpoint, CPU)(image[None])[0]
    status, said = ask(checkpoint, file_of(image[0]))

    assert status == 200 and said["size"] == [8, 8]
    assert [row["percent"] for row in said["classes"]] == pytest.approx(expected.sort(descending=True).values.tolist())
    assert {row["name"]: row["percent"] for row in said["classes"]} == pytest.approx(
        dict(zip("abc", expected.tolist(), strict=True))
    )


def test_an_expert_has_the_weight_that_its_gate_gives_it():
    """Of one seed: an expert is not the same in another."""
    checkpoint = mixture()
    with torch.no_grad():
        gates_SBN = checkpoint.build()(shown(IMAGES))[1]["gates"]
    _, said = ask(checkpoint, file_of(IMAGES.images[3, 0]))

    assert {row["name"]: row["percent"] for row in said["gates"]} == pytest.approx(
        {f"expert {n + 1}": 100 * gates_SBN[0, 3, n].item() for n in range(2)}, abs=1e-3
    )
    assert sum(row["percent"] for row in said["gates"]) == pytest.approx(100)


def test_a_layer_has_the_percent_of_its_gates_that_are_open():
    checkpoint = gated()
    with torch.no_grad():
        layers = (checkpoint.build()(shown(IMAGES))[1]["gates"][1, 3] > 0).double().split([3, 3])
    _, said = ask(checkpoint, file_of(IMAGES.images[3, 0]), seed=7)

    assert said["gates"] == [
        {"name": f"layer {n}", "percent": pytest.approx(100 * layer.mean().item())} for n, layer in enumerate(layers, 1)
    ]


def test_what_has_no_gates_shows_none():
    for make in (collective, without_any):
        assert ask(make(), file_of(IMAGES.images[0, 0]))[1]["gates"] == []


def test_preprocessing_is_the_network_s_own():
    """The page shows what was read: of this size and these channels, and of the part that the network was shown."""
    photo = torch.zeros(40, 80, dtype=torch.uint8)
    photo[:, 20:60] = 200
    checkpoint = collective()
    for centre, darkest in ((None, 0), (1.0, 200), (0.5, 200)):
        spec = checkpoint.images.model_copy(update={"centre": centre})
        _, said = ask(replace(checkpoint, images=spec), file_of(photo))
        seen = Image.open(io.BytesIO(base64.b64decode(said["seen"].partition(",")[2])))
        assert seen.size == (8, 8) and seen.mode == "L" and seen.getextrema() == (darkest, 200)
        assert said["size"] == [80, 40]


def test_the_middle_is_that_of_a_turned_image():
    """A camera's file says that it is to be turned; the square is cut afterwards."""
    tall = Image.new("L", (10, 30))
    tall.paste(255, (0, 10, 10, 20))
    exif = tall.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    tall.save(buffer, "PNG", exif=exif)

    assert decode_image(buffer.getvalue(), (1, 4, 4), centre=1.0)[0].unique().tolist() == [255]


@pytest.mark.parametrize(
    ("data", "status", "sentence"),
    [
        (b"", 422, "This file is empty: choose a PNG"),
        (b"no image", 422, "This is not an image that can be read (cannot identify image file): choose a PNG"),
        (file_of(IMAGES.images[0, 0])[:-30], 422, "This is not an image that can be read ("),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", 422, "This is not an image that can be read ("),
        (bytes(20 * 10**6 + 1), 413, "This file is larger than 20 MB: choose a smaller one."),
    ],
    ids=["empty", "text", "truncated", "a program", "too large"],
)
def test_a_bad_upload_is_one_sentence(data, status, sentence):
    """PostScript is a program, which another program would run."""
    told, said = ask(collective(), data)

    assert told == status and list(said) == ["error"]
    assert said["error"].startswith(sentence) and "\n" not in said["error"]


def test_the_page_says_what_answers_and_fetches_nothing_from_elsewhere():
    served = make_app(Responder(mixture(), CPU), about="a <network> for mnist")
    page = call(served, "GET", "/")

    assert (
        page.status == 200 and "a &lt;network&gt; for mnist. It knows 3 classes, and reads 8 by 8 pixels" in page.text
    )
    assert "Weights of the experts, seed 5" in page.text
    assert not re.search(r"https?:|//\w+\.|@import|<link[^>]+stylesheet|<script[^>]+src", page.text)
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "Weights" not in call(make_app(Responder(collective(), CPU), about="x"), "GET", "/").text
    assert {call(served, "GET", path).status for path in ("/docs", "/redoc", "/openapi.json")} == {404}


@pytest.fixture
def folders(tmp_path):
    """Saves checkpoints as runs do, each with the results of its arm; returns settings and the two folders."""

    def save(name, checkpoint, accuracy=None, *, version="2026-01-01T00.00.00.000Z", best_epochs=None):
        path = tmp_path / "models" / name / "best.safetensors" / version / "best.safetensors"
        path.parent.mkdir(parents=True)
        save_checkpoint(checkpoint, path)
        if accuracy is not None:
            (tmp_path / "outputs" / name).mkdir(parents=True, exist_ok=True)
            rows = {"seed": checkpoint.seeds, "best_epoch": best_epochs or checkpoint.best_epochs}
            rows |= {"params": checkpoint.arm.params, "val_accuracy": accuracy}
            pd.DataFrame(rows).to_csv(tmp_path / "outputs" / name / "results.csv")
        return path

    return SimpleNamespace(
        save=save, choose=lambda: choose_checkpoint(PHASE1, tmp_path / "models", tmp_path / "outputs")
    )


def test_the_best_network_on_images_is_served(folders):
    """Whatever a network on features has reached; and not by the table of another training."""
    folders.save("collective", collective(), 99.0)
    folders.save("deepmoe_dense", without_any(), 97.0, best_epochs=(2, 3))
    best = folders.save("merged_moe_mixture", mixture(), 91.5)
    folders.save("deepmoe_gated", gated(), 90.0)
    served = folders.choose()

    assert served.path == best and served.accuracy == 91.5
    assert served.checkpoint.weights.keys() == mixture().weights.keys()


def test_a_network_that_knows_more_classes_is_served_before_a_more_accurate_one(folders):
    """Accuracies on other data say nothing of each other: of what is dropped on the page, it can name more."""

    def of(num_classes):
        network = ResNetArchitecture(image_shape=(1, 8, 8), blocks=(1,), width=3)
        checkpoint = trained(make_image_arm("resnet18", network, num_classes=num_classes))
        names = tuple(f"class {k}" for k in range(num_classes))
        return replace(checkpoint, images=checkpoint.images.model_copy(update={"class_names": names}))

    folders.save("deepmoe_dense", of(10), 93.0)
    folders.save("imagenet_network", of(50), 54.0)
    best = folders.save("tiny_imagenet_plain", of(50), 56.0)
    folders.save("collective", collective(), 99.0)

    assert folders.choose().path == best


def test_of_an_arm_the_newest_is_served_and_without_images_what_there_is(folders, caplog):
    folders.save("collective", collective(), 99.0, version="2026-01-01T00.00.00.000Z")
    newest = folders.save("collective", collective(), 98.0, version="2026-02-01T00.00.00.000Z")
    broken = folders.save("deepmoe_gated", gated(), 90.0)
    broken.write_bytes(broken.read_bytes()[:100])

    assert folders.choose().path == newest
    assert "Left out: " in caplog.text and str(broken) in caplog.text


def test_nothing_to_serve_is_told_with_what_to_do(folders, tmp_path):
    with pytest.raises(UserError, match=r"there is no trained network in .*: train one first, kedro run"):
        folders.choose()
    with pytest.raises(UserError, match=r"checkpoint=nowhere is no file: name a checkpoint"):
        choose_checkpoint(PHASE1.model_copy(update={"checkpoint": "nowhere"}), tmp_path, tmp_path)


def test_a_header_is_all_but_the_weights(tmp_path):
    checkpoint = mixture()
    save_checkpoint(checkpoint, tmp_path / "best.safetensors")

    assert read_header(tmp_path / "best.safetensors") == replace(checkpoint, weights={})


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("127.0.0.1", r"port (\d+) of 127.0.0.1 is in use, perhaps by another demo: .* --params demo.port="),
        ("203.0.113.1", r"demo.host=203.0.113.1, demo.port=\d+ cannot be listened at \("),
        ("no.such.host.invalid", r"demo.host=no.such.host.invalid, demo.port=\d+ cannot be listened at \("),
    ],
)
def test_a_place_that_cannot_be_listened_at_is_one_sentence(host, sentence):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=sentence),
        listen(host, taken.getsockname()[1]),
    ):
        pass


def test_a_run_that_is_told_to_stop_ends_the_page(caplog, monkeypatch):
    """In whichever thread its node runs."""
    monkeypatch.setenv("no_proxy", "*")
    caplog.set_level(logging.INFO, app.__name__)
    served = make_app(Responder(collective(), CPU), about="a network")
    with interrupt.listen(), listen("127.0.0.1", 0) as address:
        thread = threading.Thread(target=app.run, args=(served, address))
        thread.start()
        where = f"http://127.0.0.1:{address.getsockname()[1]}/"
        with urllib.request.urlopen(where, timeout=120) as page:
            assert page.status == 200
        with urllib.request.urlopen(f"{where}answer", data=file_of(IMAGES.images[0, 0]), timeout=120) as answer:
            assert len(json.load(answer)["classes"]) == 3
        interrupt.request(interrupt.Interrupted("enough"))
        thread.join(120)

    assert not thread.is_alive() and f"Open {where} in a browser" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_command_serves_until_it_is_stopped(new_project, tmp_path, monkeypatch, stop):
    monkeypatch.setenv("no_proxy", "*")
    project = new_project(tmp_path / "project")
    save_checkpoint(gated(), tmp_path / "best.safetensors")
    params = f"checkpoint={tmp_path / 'best.safetensors'},demo.port=0"
    command = [sys.executable, "-m", "kedro", "run", "--pipeline", "demo", "--params", params]
    with subprocess.Popen(
        command, cwd=project, stderr=subprocess.PIPE, text=True, env=os.environ | {"DO_NOT_TRACK": "1"}
    ) as process:
        told = []
        for line in process.stderr:
            told.append(line)
            if found := re.search(r"Open (\S+) in a browser", line):
                with urllib.request.urlopen(f"{found[1]}answer", data=file_of(IMAGES.images[0, 0])) as answer:
                    assert [row["name"] for row in json.load(answer)["gates"]] == ["layer 1", "layer 2"]
                process.send_signal(stop)

    assert process.returncode == 0, "".join(told)
    assert f"{stop.name}: the run ends as soon as it can." in told[-2]
    assert "The demo has ended." in told[-1] and "Traceback" not in "".join(told)
