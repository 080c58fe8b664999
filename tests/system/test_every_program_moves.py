"""Every target program through `phaul migrate`, compared from outside before and after; refusals harm nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from phaul.demo.hosts import TwoHosts
from phaul.engine.dump import DumpOptions
from phaul.errors import CannotMove, RestoreError
from tests.cli.run import PHAUL, ROOT, Done, assert_error
from tests.support.programs import CASES, OPTIONS, REFUSED, RESTLESS, Target
from tests.support.visible import difference, visible_tree

pytestmark = pytest.mark.root

PORT = 7000
WORK = 0.2
# The hosts have one file system, on which a lock can be held but once, and one kernel: whoever opens a file with a
# lease breaks it.
LOCKS, LEASES = ("file_locks",), ("file_leases",)
ALL = [pytest.param(case, id="-".join(case)) for case in CASES if case not in (LOCKS, LEASES)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts with an agent on the second, for all tests: what one leaves behind would disturb the next."""
    with TwoHosts() as pair:
        log = tmp_path_factory.mktemp("agent") / "log"
        address = f"tcp://{pair.destination.address}:{PORT}"
        pair.destination.popen([*PHAUL, "agent", "--listen", address, "--insecure"], stdout=log, cwd=ROOT)
        deadline = time.monotonic() + 20
        while "listening on" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield pair


def migrate(pair: TwoHosts, target: Target) -> Done:
    address = f"tcp://{pair.destination.address}:{PORT}"
    wanted = OPTIONS.get(target.program, DumpOptions())
    flags = [
        f"--{field.name.replace('_', '-')}" for field in fields(wanted) if getattr(wanted, field.name) != field.default
    ]
    return pair.source.run([*PHAUL, "migrate", str(target.pid), address, "--json", *flags], cwd=ROOT)


def settled(pair: TwoHosts, of: Target) -> list[int]:
    """PIDs in the destination that are left of a target."""
    return [pid for pid in pair.destination.pids() if str(of.directory).encode() in cmdline(pair, pid)]


def cmdline(pair: TwoHosts, pid: int) -> bytes:
    try:
        return (pair.destination.proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("case", ALL)
def test_it_moves(case: tuple[str, ...], pair: TwoHosts) -> None:
    with Target.start(*case, host=pair.source) as target:
        time.sleep(WORK)
        before = visible_tree(target.outer_pid)
        done = migrate(pair, target)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["pids"][0] == target.pid
        target.moved(pair.destination)
        assert target.pid not in pair.source.pids()
        time.sleep(WORK)
        assert difference(before, visible_tree(target.outer_pid), RESTLESS.get(case[0], ())) == []
        target.finish()


def test_locks_on_a_file_that_the_source_still_has_harm_nothing(pair: TwoHosts) -> None:
    with Target.start(*LOCKS, host=pair.source) as target:
        before = visible_tree(target.outer_pid)
        assert_error(migrate(pair, target), RestoreError, "cannot be set: Resource temporarily unavailable")
        assert settled(pair, target) == []
        assert difference(before, visible_tree(target.outer_pid)) == []
        target.finish()


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_it_is_refused_and_unharmed(case: tuple[str, ...], pair: TwoHosts) -> None:
    with Target.start(*case, host=pair.source) as target:
        before = visible_tree(target.outer_pid)
        done = migrate(pair, target)
        assert_error(done, CannotMove, "fd ")
        assert settled(pair, target) == []
        assert difference(before, visible_tree(target.outer_pid), RESTLESS.get(case[0], ())) == []
        target.finish()


LISTEN = """
import socket, sys, time
kept = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
print("listening", flush=True)
time.sleep(60)
"""


def test_a_restore_that_fails_after_the_freeze_harms_nothing(pair: TwoHosts, tmp_path: Path) -> None:
    """Somebody at the destination has the port: found when the sockets are made, and the tree is stopped already."""
    with Target.start("sock_listen", host=pair.source) as target:
        listed = pair.source.run(["ss", "-4ltnH"], check=True).stdout.split("\n")
        ports = [line.split()[3].rpartition(":")[2] for line in listed if line]
        assert ports
        log = tmp_path / "log"
        other = pair.destination.popen([sys.executable, "-c", LISTEN, *ports], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not log.exists() or "listening" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = visible_tree(target.outer_pid)
        for _ in range(3):
            done = migrate(pair, target)
            assert_error(done, RestoreError, "another process of this host has this port")
            assert settled(pair, target) == []
            assert target.pid not in pair.destination.pids()
        assert difference(before, visible_tree(target.outer_pid)) == []
        other.kill()
        other.wait(10)
        done = migrate(pair, target)
        assert done.returncode == 0, done.stderr
        target.moved(pair.destination)
        target.finish()
