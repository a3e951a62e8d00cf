"""The demo as people meet it: its page, from its own server, in a real browser without a window."""

import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image
from tests.evaluation.test_experts import CPU, collective, gated, mixture

from collective_pipeline.data.decoding import decode_image
from collective_pipeline.evaluation.experts import GateReader
from collective_pipeline.evaluation.predict import Predictor
from collective_pipeline.pipelines.demo import app
from collective_pipeline.pipelines.demo.app import Responder, listen, make_app
from collective_pipeline.training import interrupt

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 60  # for anything that the browser is to do: it may have to wait for its turn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"a browser is needed: no {', '.join(NAMES)} is on the PATH"),
]

# What a person sees: text that is shown, and of each bar its length and colour.
READ = """(() => {
  const visible = (id) => document.getElementById(id)?.checkVisibility() ?? false;
  const bars = (id) => [...document.querySelectorAll(`#${id} li`)].map((row) => {
    const [name, track, percent] = row.children;
    const length = track.firstChild.getBoundingClientRect().width / track.getBoundingClientRect().width;
    return [name.innerText, percent.innerText, 100 * length];
  });
  const images = [...document.images].map((image) => [image.naturalWidth, image.naturalHeight]);
  return {answer: visible("answer"), error: visible("error") ? document.getElementById("error").innerText : "",
    text: document.body.innerText, classes: bars("classes"), gates: bars("gates"), images};
})()"""


class Browser:
    """A Chromium with one page, spoken to as its developer tools do: JSON and a zero byte, over two pipes.

    Args:
        folder: Of its profile.

    Attributes:
        complaints: What its console has of scripts that fail, and of what the page's policy refuses.
    """

    def __init__(self, folder):
        reads, self.to_browser = os.pipe()
        self.from_browser, writes = os.pipe()
        # It reads from 3 and writes to 4: a program in between puts the pipes there.
        move = f"import os, sys; os.dup2({reads}, 3); os.dup2({writes}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
        options += ("--window-size=1000,1000", f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank")
        self.process = subprocess.Popen(
            [sys.executable, "-c", move, CHROMIUM, *options], pass_fds=(reads, writes), stderr=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        self.unread = b""
        self.sent = 0
        self.complaints = []
        self.session = {}

    def attach(self):
        """To its page."""
        pages = [each for each in self.tell("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.tell("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.tell("Runtime.enable")
        self.tell("Log.enable")

    def tell(self, method, **params):
        """Give a command; returns its result."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params} | self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.sent:
            if answer.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded"}:
                self.complaints.append(answer["params"])
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self):
        while b"\0" not in self.unread:
            assert select.select([self.from_browser], [], [], SECONDS)[0], "the browser does not answer"
            told = os.read(self.from_browser, 2**16)
            assert told, "the browser has ended"
            self.unread += told
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def ask(self, expression):
        """The value of JavaScript in the page."""
        result = self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression):
        """Until that is true in the page."""
        end = time.monotonic() + SECONDS
        while not self.ask(expression):
            assert time.monotonic() < end, f"{expression} did not become true: {self.ask('document.body.innerText')}"
            time.sleep(0.02)

    def open(self, address):
        self.tell("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && document.getElementById('drop') !== null")

    def drop(self, file):
        """A file from the desktop, on the middle of the page's place for it; returns what is then seen."""
        place = "document.getElementById('drop').getBoundingClientRect()"
        x, y = self.ask(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place})")
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        self.ask("for (const id of ['answer', 'error']) document.getElementById(id).hidden = true")
        for kind in ("dragEnter", "dragOver"):
            self.tell("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
        assert self.ask("document.getElementById('drop').classList.contains('over')")
        self.tell("Input.dispatchDragEvent", type="drop", x=x, y=y, data=data)
        self.wait_for(f"(({{answer, error}}) => answer || error)({READ})")
        self.wait_for("[...document.images].every((image) => image.complete)")
        return self.ask(READ)

    def close(self):
        try:
            self.tell("Browser.close")
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.to_browser)
            os.close(self.from_browser)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    try:
        browser.attach()
        yield browser
    finally:
        browser.close()


@pytest.fixture
def opened(browser):
    """Serves a checkpoint as the demo does, and opens its page."""
    browser.complaints.clear()
    with interrupt.listen(), listen("127.0.0.1", 0) as address:
        threads = []

        def serve(checkpoint):
            served = make_app(Responder(checkpoint, CPU), about="a network")
            threads.append(threading.Thread(target=app.run, args=(served, address)))
            threads[0].start()
            browser.open(f"http://127.0.0.1:{address.getsockname()[1]}/")
            return browser

        yield serve
        browser.tell("Page.navigate", url="about:blank")
        interrupt.request(interrupt.Interrupted("enough"))
        threads[0].join(SECONDS)


@pytest.fixture
def photo(tmp_path):
    """A file of more pixels than the networks read."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 60), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def seen_as(percents):
    """As a person reads it: the name, the percent to one decimal, and a bar of that length."""
    return [[name, f"{percent:.1f}\u00a0%", pytest.approx(percent, abs=0.2)] for name, percent in percents.items()]


@pytest.mark.parametrize(
    ("make", "title"),
    [(mixture, "Weights of the experts, seed 5"), (gated, "Open gates of each layer, seed 5"), (collective, "")],
)
def test_who_drops_an_image_sees_the_most_probable_classes_and_the_gates(opened, photo, make, title):
    """As the network itself says them."""
    checkpoint = make()
    image, _ = decode_image(photo.read_bytes(), checkpoint.images.shape, centre=checkpoint.images.centre)
    probabilities = Predictor(checkpoint, CPU)(image[None])[0].sort(descending=True)
    reader = GateReader(checkpoint, checkpoint.seeds[0], CPU)
    browser = opened(checkpoint)
    before = browser.ask(READ)
    seen = browser.drop(photo)

    assert not before["answer"] and not before["error"] and "Choose an image, drop it here" in before["text"]
    assert seen["answer"] and not seen["error"]
    assert seen["classes"] == seen_as(
        {"abc"[k]: 100 * p for p, k in zip(*map(torch.Tensor.tolist, probabilities), strict=True)}
    )
    assert seen["gates"] == seen_as(reader(image) if reader.kind else {}) and bool(title) == bool(seen["gates"])
    assert "Most probable" in seen["text"] and title in seen["text"] and "60 \u00d7 40 pixels" in seen["text"]
    assert seen["images"] == [[60, 40], [8, 8]]  # both are shown, which the page's policy might have refused
    assert browser.complaints == []


def test_who_drops_something_else_sees_one_sentence_and_may_go_on(opened, photo, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    browser = opened(collective())
    refused = browser.drop(tmp_path / "notes.txt")
    seen = browser.drop(photo)

    assert not refused["answer"] and refused["error"].startswith("This is not an image that can be read (")
    assert seen["answer"] and not seen["error"] and len(seen["classes"]) == 3
