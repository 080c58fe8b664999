"""Every target program through a dump to a directory and a restore; and a dump that leaves it running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.engine.dump import Dump, DumpOptions, preflight
from phaul.engine.imagedir import dump_to_directory, restore_from_directory
from phaul.engine.inject import STOP_SIGNALS
from phaul.engine.native import Parent
from phaul.engine.proc import Proc
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


PENDING = """
import os, signal, sys, time
numbers = {numbers!r}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
for number in numbers:
    os.kill(os.getpid(), number)
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("numbers", [STOP_SIGNALS[:1], STOP_SIGNALS], ids=["one", "all"])
def test_the_signals_that_end_batches_may_be_pending(
    numbers: tuple[int, ...], engine: EngineThread, tmp_path: Path
) -> None:
    output, images = tmp_path / "output", tmp_path / "images"
    images.mkdir()
    with output.open("w") as stdout:
        null = subprocess.DEVNULL
        command = ["/usr/bin/python3", "-c", PENDING.format(numbers=numbers)]
        process = subprocess.Popen(command, stdin=null, stdout=stdout, stderr=null, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not output.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = visible_tree(process.pid)
        engine.call(dump_tree, process.pid, images)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
        engine.call(restore_tree, images)
        assert difference(before, visible_tree(process.pid)) == []
        assert Proc(process.pid).signal_set("ShdPnd") == sum(1 << number - 1 for number in numbers)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
        process.returncode = 0
