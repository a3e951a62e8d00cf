"""Storages for workers to share: files, and a PostgreSQL server of the tests' own, where the machine has one."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from collective_pipeline.config import check_parameters

PLACES = [Path("/usr/local/bin"), *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
SECONDS_TO_START = SECONDS_TO_END = 60.0


@pytest.fixture(scope="session")
def postgres(tmp_path_factory) -> Iterator[str]:
    """The address of a database on loopback."""
    found = next((place for place in PLACES if (place / "initdb").exists() and (place / "postgres").exists()), None)
    if found is None:
        pytest.skip("this machine has no PostgreSQL server (Debian: apt install postgresql)")
    folder = tmp_path_factory.mktemp("postgres")
    user: dict[str, object] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        user = {"user": "postgres"}
        for parent in (folder, folder.parent, folder.parent.parent):
            parent.chmod(0o755)
        shutil.chown(folder, "postgres")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"} | user
    data = str(folder / "data")
    subprocess.run([str(found / "initdb"), "-D", data, "-U", "tests", "-A", "trust"], check=True, **quiet)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(folder)]
    server = subprocess.Popen([str(found / "postgres"), "-D", data, *options], **quiet)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        address = f"tests@127.0.0.1:{port}/postgres"
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                state = "runs" if server.poll() is None else f"ended with code {server.returncode}"
                pytest.fail(f"PostgreSQL's server {state} and does not answer at port {port}")
            time.sleep(0.1)
        yield f"postgresql://{address}"
    finally:
        server.send_signal(signal.SIGINT)  # SIGTERM would wait for all that are connected
        server.wait(SECONDS_TO_END)


def _answers(address: str) -> bool:
    """A server listens before it has started, and then refuses whoever connects."""
    engine = sqlalchemy.create_engine(f"postgresql+psycopg://{address}", poolclass=sqlalchemy.NullPool)
    try:
        with engine.connect():
            return True
    except sqlalchemy.exc.OperationalError:
        return False


@pytest.fixture(params=["journal", "sqlite", "postgres"])
def storage(request, tmp_path) -> str:
    """A new and empty place for studies."""
    if request.param == "journal":
        return str(tmp_path / "study.journal")
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    return request.getfixturevalue("postgres")


@pytest.fixture
def make_settings(tmp_path):
    """Settings of a tiny sweep, with other values where they are given."""

    def make(**sweep):
        return check_parameters(
            {
                "seeds": [1, 2],
                "device": "cpu",
                "training": {"epochs": 2, "batch_size": 32, "augmentation_strength": 0.0},
                "sweep": {
                    "model_types": ["shallow", "deep"],
                    "sizes": [3000, 5000],
                    "trials": 3,
                    "trial_epochs": 4,
                    "storage": str(tmp_path / "study.journal"),
                    "space": {
                        "training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
                        "baselines.target_params": [3000, 5000],
                    },
                }
                | sweep,
            }
        )

    return make
