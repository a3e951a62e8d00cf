"""The page of the demo: drop an image, see what a network says of it. Nothing that it shows comes from elsewhere.

Neither Kedro nor a socket is needed for the app itself.
"""

import base64
import contextlib
import errno
import io
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from starlette.requests import ClientDisconnect
from torch import Tensor

from collective_pipeline.config import UserError
from collective_pipeline.data.decoding import MODES, decode_image
from collective_pipeline.evaluation.experts import GateReader
from collective_pipeline.evaluation.predict import Predictor, choose_seeds
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.training import interrupt

logger = logging.getLogger(__name__)

MAX_MEGABYTES = 20
TOP = 5
FORMATS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
GATES = {"layer": "Open gates of each layer", "expert": "Weights of the experts"}
# The browser itself refuses whatever would leave the page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class TooLarge(UserError):
    """More bytes than an upload may have."""


class Responder:
    """From the bytes of an image file to what the page shows of it.

    Args:
        checkpoint: What was trained.
        device: Where to compute.
        seed: Of the checkpoint's; its answer alone. None: the mean of all.

    Attributes:
        seeds: Those that answer; the gates are the first one's, since an expert is not the same in another seed.

    Raises:
        UserError: If the checkpoint has no such seed, or no good weights of it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, seed: int | None = None) -> None:
        self.images = checkpoint.images
        self.seeds = choose_seeds(checkpoint, seed)
        self.predictor = Predictor(checkpoint, device, seed=seed)
        self.gates = GateReader(checkpoint, self.seeds[0], device)
        self.lock = threading.Lock()  # one network on one device: two images at once would only be in each other's way
        self.predictor(torch.zeros(1, *self.images.shape, dtype=torch.uint8))  # what cannot run fails here

    @property
    def gates_title(self) -> str:
        """What the gates are called, where there are any."""
        return f"{GATES[self.gates.kind]}, seed {self.seeds[0]}" if self.gates.kind else ""

    def __call__(self, data: bytes) -> dict[str, Any]:
        """`classes` and `gates`, each a list of `name` and `percent`, and `seen`, the image as the network reads it.

        Raises:
            UserError: If the bytes are no image.
        """
        if not data:
            raise UserError(f"This file is empty: choose a {FORMATS} file.")
        try:
            image, original = decode_image(data, self.images.shape, centre=self.images.centre)
        except ValueError as error:
            raise UserError(f"This is not an image that can be read ({error}): choose a {FORMATS} file.") from None
        with self.lock:
            probabilities = self.predictor(image[None])[0]
            gates = self.gates(image) if self.gates.kind else {}
        highest = probabilities.topk(min(TOP, len(probabilities)))
        names = [self.images.class_names[k] for k in highest.indices.tolist()]
        return {
            "classes": _as_list(dict(zip(names, (100 * highest.values).tolist(), strict=True))),
            "gates": _as_list(gates),
            "seen": _to_address(image),
            "size": list(original.size),
        }


def _as_list(percents: dict[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "percent": percent} for name, percent in percents.items()]


def _to_address(image: Tensor) -> str:
    """An image `(C, H, W)` as a PNG in a data address."""
    channels = len(image)
    pixels = image.permute(1, 2, 0).numpy() if channels > 1 else image[0].numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels, MODES[channels]).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def make_app(respond: Responder, *, about: str) -> FastAPI:
    """The page at `/`, and at `/answer` what it shows: the bytes of an image in, JSON out.

    Args:
        respond: Who answers.
        about: Of the network, for people.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    channels, height, width = respond.images.shape
    page = environment.get_template("page.html.jinja").render(
        about=about,
        gates_title=respond.gates_title,
        reads=f"{width} by {height} pixels, {'colour' if channels > 1 else 'grey'}",
        num_classes=len(respond.images.class_names),
        max_megabytes=MAX_MEGABYTES,
    )
    app = FastAPI(openapi_url=None)  # pages about the interface would load scripts from elsewhere

    @app.get("/")
    def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    @app.post("/answer")
    async def answer(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(respond, await _read(request)))
        except ClientDisconnect:
            return Response(status_code=400)
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=413 if isinstance(error, TooLarge) else 422)

    return app


async def _read(request: Request) -> bytes:
    """What was uploaded.

    Raises:
        TooLarge: As soon as that is known.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_MEGABYTES * 10**6:
            raise TooLarge(f"This file is larger than {MAX_MEGABYTES} MB: choose a smaller one.")
    return bytes(data)


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """The socket of this address.

    Raises:
        UserError: If there is no such address here, or something else listens at it.
    """
    try:
        address = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use, perhaps by another demo: end that, or choose another port with "
                f"--params demo.port={port + 1 if port < 65_535 else 0}"
            ) from error
        raise UserError(
            f"demo.host={host}, demo.port={port} cannot be listened at ({error.strerror}): give an address of this "
            "machine and a port from 1024 on"
        ) from error
    with address:
        yield address


def run(app: FastAPI, address: socket.socket) -> None:
    """Answer at this address until the run is told to stop."""
    host, port = address.getsockname()[:2]
    logger.info("Open http://%s:%d/ in a browser; Ctrl-C ends the demo.", f"[{host}]" if ":" in host else host, port)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=3)
    _Server(config).run(sockets=[address])


class _Server(uvicorn.Server):
    """One that hears of signals as everything else here does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None of its own."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second."""
        return await super().on_tick(counter) or interrupt.requested()
