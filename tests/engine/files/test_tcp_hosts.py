"""A server is saved and restored, or phaul is killed over it; its client on another host notices nothing."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from phaul.demo.hosts import HostProcess, TwoHosts
from tests.cli.run import PHAUL, ROOT

pytestmark = pytest.mark.root

PORT = 6000
SECONDS = 20.0
SERVER = f"""
import socket
listener = socket.create_server(("", {PORT}))
connection, _ = listener.accept()
while data := connection.recv(65536):
    connection.sendall(data)
"""


class Client:
    """Sends random bytes to an echo server without end, and checks that all come back in order.

    Attributes:
        failure: what has gone wrong, or "".
        checked: bytes that have come back.
        longest: seconds without a byte, the worst so far.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._ends = sock, threading.Event()
        sock.settimeout(SECONDS)
        self.failure, self.checked, self.longest = "", 0, 0.0
        self._threads = [threading.Thread(target=self._guarded, args=(part,)) for part in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _guarded(self, part: object) -> None:
        try:
            assert callable(part)
            part()
        except OSError as error:
            self.failure = self.failure or repr(error)

    def _send(self) -> None:
        random = Random(1)
        while not self._ends.is_set():
            self._sock.sendall(random.randbytes(20_000))
            time.sleep(0.001)
        self._sock.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        random, last = Random(1), time.monotonic()
        expected = b""
        while data := self._sock.recv(65536):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now
            while len(expected) < len(data):
                expected += random.randbytes(20_000)
            if data != expected[: len(data)]:
                self.failure = f"other bytes after {self.checked}"
                return
            expected = expected[len(data) :]
            self.checked += len(data)
        if not self._ends.is_set():
            self.failure = "the server has closed the connection"

    def goes_on(self) -> None:
        """Wait until more has come back than can have been on its way."""
        goal, deadline = self.checked + (8 << 20), time.monotonic() + SECONDS
        while self.checked < goal:
            assert not self.failure
            assert time.monotonic() < deadline, f"nothing new after {self.checked} bytes"
            time.sleep(0.01)

    def finish(self) -> None:
        """End the conversation; all that was sent must have come back."""
        self._ends.set()
        for thread in self._threads:
            thread.join(SECONDS)
        self._sock.close()
        assert not self.failure


@pytest.fixture
def server(hosts: TwoHosts) -> HostProcess:
    return hosts.source.popen([sys.executable, "-I", "-S", "-c", SERVER])


@pytest.fixture
def client(hosts: TwoHosts, server: HostProcess) -> Iterator[Client]:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            client = Client(hosts.destination.connect(hosts.source.address, PORT))
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    client.goes_on()
    yield client
    with contextlib.suppress(AssertionError):
        client.finish()


def dump(pid: int, images: Path, *more: str) -> list[str]:
    images.mkdir(exist_ok=True)
    return [*PHAUL, "dump", "--tcp-established", "-t", str(pid), "-D", str(images), *more]


def locks(hosts: TwoHosts) -> int:
    """How many sets of phaul on the server's host drop packets."""
    return hosts.source.run(["nft", "list", "ruleset"], check=True).stdout.count("elements = ")


@pytest.mark.slow
def test_it_comes_back_from_images(hosts: TwoHosts, server: HostProcess, client: Client, tmp_path: Path) -> None:
    for number in range(3):
        images = tmp_path / str(number)
        done = hosts.source.run(dump(server.pid, images), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert server.pid not in hosts.source.pids()
        assert locks(hosts) == 1
        time.sleep(0.5)  # the client sends again and again
        restore = [*PHAUL, "restore", "-d", "--tcp-established", "-D", str(images)]
        done = hosts.source.run(restore, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        client.goes_on()
        assert locks(hosts) == 0
    client.finish()


def test_it_goes_on_after_a_dump(hosts: TwoHosts, server: HostProcess, client: Client, tmp_path: Path) -> None:
    for _ in range(3):
        done = hosts.source.run(dump(server.pid, tmp_path / "images", "-R"), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        client.goes_on()
        assert locks(hosts) == 0
    client.finish()


def test_phaul_is_killed_while_all_is_stopped(
    hosts: TwoHosts, server: HostProcess, client: Client, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\ntouch "$0.reached"\nsleep 1000\n')
    script.chmod(0o755)
    process = hosts.source.popen(dump(server.pid, tmp_path / "images", "--action-script", str(script)), cwd=ROOT)
    deadline = time.monotonic() + SECONDS
    while not script.with_name("script.reached").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert locks(hosts) == 1
    before = client.checked
    time.sleep(0.3)
    assert client.checked == before
    process.kill()
    client.goes_on()
    assert locks(hosts) == 0
    client.finish()


@pytest.mark.slow
def test_phaul_is_killed_at_any_time(hosts: TwoHosts, server: HostProcess, client: Client, tmp_path: Path) -> None:
    began = time.monotonic()
    assert hosts.source.run(dump(server.pid, tmp_path / "0", "-R"), cwd=ROOT).returncode == 0
    whole = time.monotonic() - began
    for number in range(12):
        process = hosts.source.popen(dump(server.pid, tmp_path / str(number), "-R"), cwd=ROOT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(whole * (0.5 + number / 24))
        process.kill()
        process.wait(SECONDS)
        client.goes_on()
    assert locks(hosts) == 0
    client.finish()
