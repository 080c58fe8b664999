"""phaul is killed at any moment of a dump or a restore: the program goes on unharmed, or nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phaul.engine import native
from phaul.engine.dump import Dump
from phaul.engine.imagedir import dump_to_directory, restore_from_directory
from phaul.engine.native import Parent
from phaul.engine.restore import RestoreOptions
from phaul.images.imageset import read_directory
from phaul.images.pb.pstree_pb2 import pstree_entry
from tests.engine.test_dump_restore import dump_tree
from tests.support.programs import RESTLESS, Target
from tests.support.visible import difference, visible_tree

pytestmark = [pytest.mark.root, pytest.mark.slow]

KILLS = 40
SETTLE = 5.0
PR_SET_CHILD_SUBREAPER = 36
PROGRAMS = ["threads", "tree", "sock_unix", "eventfds"]


def killed_after(seconds: float, work: Callable[[], object]) -> None:
    """Do some work in a child process that is killed in the middle of it, or has come to its end by then."""
    child = os.fork()
    if child == 0:
        try:
            work()
            time.sleep(60)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it failed before it was killed"


@pytest.fixture
def reaper() -> Iterator[Callable[[], None]]:
    """Orphans become ours: their PIDs are free as soon as the function has been called."""

    def reap() -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    native.syscall("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield reap
    native.syscall("prctl", PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def dump_only(pid: int, directory: Path) -> None:
    dump = Dump(pid)
    dump.freeze()
    dump.collect()
    dump_to_directory(dump, directory)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_dump_that_is_killed(program: str, tmp_path: Path) -> None:
    dice = random.Random(2)
    with Target.start(program) as target:
        time.sleep(0.2)
        before = visible_tree(target.pid)
        for _ in range(KILLS):
            killed_after(dice.uniform(0, 0.05), lambda: dump_only(target.pid, tmp_path))
            deadline = time.monotonic() + SETTLE
            ignore = RESTLESS.get(program, ())
            while (changes := difference(before, visible_tree(target.pid), ignore)) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert changes == []
        target.finish()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_restore_that_is_killed(program: str, reaper: Callable[[], None], tmp_path: Path) -> None:
    dice = random.Random(3)
    with Target.start(program) as target:
        time.sleep(0.2)
        child = os.fork()  # only the parent's own children get reaped by `reap`
        if child == 0:
            try:
                dump_tree(target.pid, tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        target.reap()
        pids = [entry.pid for entry in read_directory(tmp_path).messages("pstree", pstree_entry)]
        options = RestoreOptions(parent=Parent.CALLER)
        for _ in range(KILLS):
            killed_after(dice.uniform(0, 0.08), lambda: restore_from_directory(tmp_path, options))
            deadline = time.monotonic() + SETTLE
            while (left := living(pids)) and time.monotonic() < deadline:
                reaper()
                time.sleep(0.001)
            assert left == []
            assert target.copies() == []


def living(pids: list[int]) -> list[int]:
    """Those of the PIDs that are not free."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]
