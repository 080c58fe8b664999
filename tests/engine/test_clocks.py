"""The clocks of a restored tree go on from where they were, on a host that has been up for another time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.engine import clocks
from phaul.engine.thread import EngineThread
from phaul.images.imageset import read_directory, write_directory
from phaul.images.pb.timens_pb2 import timens_entry
from tests.engine.test_dump_restore import dump_tree, restore_tree
from tests.support.programs import Target

pytestmark = pytest.mark.root

SECOND = 10**9


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    with EngineThread() as thread:
        yield thread


# "vdso" looks at the clocks all the time, "regs" never: it may be told any time.
@pytest.mark.parametrize(("program", "seconds"), [("vdso", 100_000), ("regs", -100)])
def test_clocks_go_on(program: str, seconds: int, engine: EngineThread, tmp_path: Path) -> None:
    with Target.start(program) as target:
        engine.call(dump_tree, target.pid, tmp_path)
        target.reap()
        images = read_directory(tmp_path)
        (name,) = (name for name in images.names() if name.startswith("timens-"))
        saved = images.one(name, timens_entry)
        for clock in (saved.monotonic, saved.boottime):
            clock.tv_sec += seconds
        write_directory(images, tmp_path)
        engine.call(restore_tree, tmp_path)
        target.moved()
        try:
            now = clocks.read(target.pid)
            for name, value in (("monotonic", saved.monotonic), ("boottime", saved.boottime)):
                passed = now[name] - (value.tv_sec * SECOND + value.tv_nsec)
                assert 0 <= passed < 60 * SECOND, name
            time.sleep(0.1)
            target.finish()
        finally:
            target.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(target.pid, 0)


def test_a_restored_tree_can_be_dumped_again(engine: EngineThread, tmp_path: Path) -> None:
    """Its time namespace is another one then, with offsets of its own."""
    with Target.start("vdso") as target:
        first = clocks.read(target.pid)
        for _ in range(3):
            engine.call(dump_tree, target.pid, tmp_path)
            with contextlib.suppress(ChildProcessError):  # the tracer, also us, may have reaped it
                os.waitpid(target.pid, 0)
            engine.call(restore_tree, tmp_path)
        target.moved()
        now = clocks.read(target.pid)
        assert all(0 < now[clock] - first[clock] < 60 * SECOND for clock in clocks.CLOCKS)
        try:
            target.finish()
        finally:
            target.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(target.pid, 0)
