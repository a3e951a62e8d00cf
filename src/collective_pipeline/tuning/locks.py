"""Locks between the workers of a study, which the system lets go of by itself when a worker dies.

So a worker is alive as long as it holds the lock of its name: no heartbeat, and nobody waits for one to be late.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import sqlalchemy
from filelock import FileLock, Timeout

from collective_pipeline.randomness import key


class Locks(Protocol):
    """Locks by name; every call of `hold` is an owner of its own, in whichever thread, process or machine."""

    def hold(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Wait for the lock, and hold it."""

    def is_held(self, name: str) -> bool:
        """Whether anybody holds it now."""


class FileLocks:
    """In a folder, for the processes of one machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        with self._lock(name):
            yield

    def is_held(self, name: str) -> bool:
        try:
            with self._lock(name).acquire(timeout=0):
                return False
        except Timeout:
            return True

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f"{name}.lock", thread_local=False)


class PostgresLocks:
    """Advisory locks of a PostgreSQL server, for any number of machines: each is held by a connection of its own."""

    def __init__(self, url: str, study: str) -> None:
        # A connection that goes back to a pool would keep its locks.
        self.engine = sqlalchemy.create_engine(
            url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT", connect_args=KEEP_ALIVE
        )
        self.study = study

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        with self.engine.connect() as connection:
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(self._key(name))))
            yield

    def is_held(self, name: str) -> bool:
        with self.engine.connect() as connection:
            taken = connection.execute(sqlalchemy.select(sqlalchemy.func.pg_try_advisory_lock(self._key(name))))
            return not taken.scalar_one()

    def _key(self, name: str) -> int:
        return key(0, f"{self.study}/{name}")


# A machine that lost its power is noticed after a minute, by the server, instead of after two hours.
KEEP_ALIVE = {
    "connect_timeout": 10,
    "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
}
