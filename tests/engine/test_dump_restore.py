"""Every target program through a dump to a directory and a restore; and a dump that leaves it running."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.engine.dump import Dump, DumpOptions, preflight
from phaul.engine.imagedir import dump_to_directory, restore_from_directory
from phaul.engine.native import Parent
from phaul.engine.restore import RestoreOptions
from phaul.engine.thread import EngineThread
from phaul.errors import CannotMove
from tests.support.programs import CASES, OPTIONS, REFUSED, RESTLESS, Target
from tests.support.visible import difference, visible_tree

pytestmark = pytest.mark.root

WORK = 0.2
ALL = [pytest.param(case, id="-".join(case)) for case in CASES]


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    with EngineThread() as thread:
        yield thread


def dump_tree(pid: int, directory: Path, options: DumpOptions | None = None, *, leave_running: bool = False) -> None:
    options = options or DumpOptions()
    preflight(pid, options)
    dump = Dump(pid, options)
    dump.freeze()
    try:
        dump.collect()
        dump_to_directory(dump, directory)
    except BaseException:
        dump.thaw()
        raise
    if leave_running:
        dump.thaw()
    else:
        dump.kill()


def restore_tree(directory: Path) -> int:
    restore = restore_from_directory(directory, RestoreOptions(parent=Parent.CALLER, tcp_established=True))
    restore.resume()
    restore.abort()  # comes too late for anything
    return restore.root_pid


@pytest.mark.parametrize("case", ALL)
def test_dump_and_restore(case: tuple[str, ...], engine: EngineThread, tmp_path: Path) -> None:
    with Target.start(*case) as target:
        time.sleep(WORK)
        before = visible_tree(target.pid)
        engine.call(dump_tree, target.pid, tmp_path, OPTIONS.get(case[0]))
        target.reap()
        assert target.copies() == []
        assert engine.call(restore_tree, tmp_path) == target.pid
        target.moved()
        try:
            time.sleep(WORK)
            after = visible_tree(target.pid)
            assert difference(before, after, RESTLESS.get(case[0], ())) == []
            target.finish()
        finally:
            target.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(target.pid, 0)


@pytest.mark.parametrize("case", ALL)
def test_dump_leaves_it_running(case: tuple[str, ...], engine: EngineThread, tmp_path: Path) -> None:
    with Target.start(*case) as target:
        before = visible_tree(target.pid)
        for _ in range(3):
            time.sleep(WORK)
            engine.call(dump_tree, target.pid, tmp_path, OPTIONS.get(case[0]), leave_running=True)
        assert difference(before, visible_tree(target.pid), RESTLESS.get(case[0], ())) == []
        target.finish()


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_refused_and_unharmed(case: tuple[str, ...], engine: EngineThread, tmp_path: Path) -> None:
    with Target.start(*case) as target:
        before = visible_tree(target.pid)
        with pytest.raises(CannotMove, match=r"fd \d+ of PID"):
            engine.call(dump_tree, target.pid, tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert difference(before, visible_tree(target.pid), RESTLESS.get(case[0], ())) == []
        target.finish()


def test_a_stopped_program_stays_stopped(engine: EngineThread, tmp_path: Path) -> None:
    with Target.start("tree") as target:
        everyone = target.copies()
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(WORK)
        before = visible_tree(target.pid)
        engine.call(dump_tree, target.pid, tmp_path, leave_running=True)
        assert difference(before, visible_tree(target.pid)) == []
        engine.call(dump_tree, target.pid, tmp_path)
        target.reap()
        engine.call(restore_tree, tmp_path)
        target.moved()
        try:
            time.sleep(WORK)
            assert {Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in everyone} == {"T"}
            for pid in everyone:
                os.kill(pid, signal.SIGCONT)
            target.finish()
        finally:
            target.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(target.pid, 0)
