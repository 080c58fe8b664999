"""Programs that nobody wrote for phaul through dump and restore: redis-server with its client, a threaded Python."""

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
from tests.support.programs import COUNTING

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


def wait_for_lines(output: Path, number: int) -> None:
    deadline = time.monotonic() + 20
    while output.read_text().count("\n") < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_threaded_python_goes_on(tmp_path: Path) -> None:
    output, images = tmp_path / "output", tmp_path / "images"
    images.mkdir()
    with output.open("w") as stdout:
        null = subprocess.DEVNULL
        command = ["/usr/bin/python3", "-c", COUNTING]
        process = subprocess.Popen(command, stdin=null, stdout=stdout, stderr=null, start_new_session=True)
    try:
        wait_for_lines(output, 100)
        with EngineThread() as engine:
            for _ in range(3):
                engine.call(dump_tree, process.pid, images)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, 0)
                before = output.read_text().count("\n")
                engine.call(restore_tree, images)
                wait_for_lines(output, before + 100)
        numbers = [int(line) for line in output.read_text().rpartition("\n")[0].split()]
        assert numbers == list(range(len(numbers)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
        process.returncode = 0
