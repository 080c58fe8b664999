"""Names of unix sockets on a file system that both hosts see."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.demo.hosts import TwoHosts
from phaul.errors import RestoreError
from tests.cli.run import PHAUL, ROOT, Done, assert_error
from tests.support.programs import Target

pytestmark = pytest.mark.root

PORT = 7000
TAKE = """
import socket, sys, time
sock = socket.socket(socket.AF_UNIX)
sock.bind(chr(0) + sys.argv[1])
print("bound", flush=True)
time.sleep(60)
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[TwoHosts]:
    """Two hosts with an agent on the second."""
    with TwoHosts() as pair:
        address = f"tcp://{pair.destination.address}:{PORT}"
        log = tmp_path / "log"
        pair.destination.popen([*PHAUL, "agent", "--listen", address, "--insecure"], stdout=log, cwd=ROOT)
        wait_for(log, "listening on")
        yield pair


def wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def migrate(pair: TwoHosts, target: Target) -> Done:
    address = f"tcp://{pair.destination.address}:{PORT}"
    return pair.source.run([*PHAUL, "migrate", str(target.pid), address], cwd=ROOT)


def abstract_name(target: Target) -> str:
    found = re.search("@(phaul-target-.*)", Path(f"/proc/{target.outer_pid}/net/unix").read_text())
    assert found
    return found[1].rstrip("@")


def test_a_failed_migration_leaves_the_name_to_the_source(pair: TwoHosts, tmp_path: Path) -> None:
    with Target.start("sock_unix", host=pair.source) as target:
        node = os.stat(target.directory / "listener.sock")
        files = sorted(os.listdir(target.directory))
        # The name that is bound after the one of the file system.
        taken = tmp_path / "taken"
        pair.destination.popen([sys.executable, "-c", TAKE, abstract_name(target)], stdout=taken)
        wait_for(taken, "bound")

        done = migrate(pair, target)

        assert_error(done, RestoreError, "another process of this host has this name")
        assert os.stat(target.directory / "listener.sock").st_ino == node.st_ino
        assert sorted(os.listdir(target.directory)) == files
        target.finish()  # it connects to its own name


def test_the_name_moves_with_the_tree(pair: TwoHosts) -> None:
    with Target.start("sock_unix", host=pair.source) as target:
        node = os.stat(target.directory / "listener.sock")
        files = sorted(os.listdir(target.directory))

        done = migrate(pair, target)

        assert done.returncode == 0, done.stderr
        target.moved(pair.destination)
        assert os.stat(target.directory / "listener.sock").st_ino != node.st_ino
        assert sorted(os.listdir(target.directory)) == files
        target.finish()
