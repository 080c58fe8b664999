"""A program from outside: Debian's redis-server through dump and restore, checked by its own client."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.engine.thread import EngineThread
from tests.engine.test_dump_restore import dump_tree, restore_tree

pytestmark = [pytest.mark.root, pytest.mark.slow]

KEYS = 50_000


def client(socket: Path, *command: str) -> str:
    done = subprocess.run(["redis-cli", "-s", str(socket), *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """PID and socket of a server with data."""
    socket = tmp_path / "redis.sock"
    arguments = "--port 0 --save  --appendonly no --enable-debug-command yes --unixsocket".split(" ")
    null = subprocess.DEVNULL
    server = subprocess.Popen(
        ["redis-server", *arguments, str(socket)],
        cwd=tmp_path, stdin=null, stdout=null, stderr=null, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client(socket, "DEBUG", "POPULATE", str(KEYS)) == "OK"
        yield server.pid, socket
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(server.pid, 0)
        server.returncode = 0


def test_redis_goes_on(redis: tuple[int, Path], tmp_path: Path) -> None:
    pid, socket = redis
    digest = client(socket, "DEBUG", "DIGEST")
    images = tmp_path / "images"
    images.mkdir()
    with EngineThread() as engine:
        engine.call(dump_tree, pid, images)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        engine.call(restore_tree, images)
        assert client(socket, "DEBUG", "DIGEST") == digest
        assert client(socket, "DBSIZE") == str(KEYS)
        assert client(socket, "SET", "after", "the move") == "OK"
        assert client(socket, "GET", "after") == "the move"
        assert f"process_id:{pid}" in client(socket, "INFO", "server")
