"""Injected batches: results, errors, and that a tracer may die at any moment of one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.engine.batch import BatchError
from phaul.engine.inject import STOP_SIGNALS
from phaul.engine.source import SourceTree
from phaul.engine.thread import EngineThread
from tests.support.programs import Target
from tests.support.visible import difference, visible_tree

pytestmark = pytest.mark.root

KILLS = 200
SETTLE = 5.0


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    with EngineThread() as thread:
        yield thread


def with_batch(pid: int) -> dict[str, object]:
    tree = SourceTree(pid)
    tree.freeze()
    found: dict[str, object] = {}
    try:
        call = tree.root.threads[0].batch()
        opened = call.openat(-100, b"/proc/self/comm", os.O_RDONLY)
        text = call.space(64)
        length = call.read(opened, text, 64)
        call.close(opened)
        missing = call.openat(-100, b"/no/such/file", os.O_RDONLY, may_fail=True)
        own = call.getpid()
        many = [call.gettid() for _ in range(5000)]
        call.run()
        found = {
            "pid": own.value, "comm": text.bytes()[: length.value], "missing": missing.value,
            "many": {result.value for result in many}, "opened": opened.value,
        }  # fmt: skip
        call = tree.root.threads[0].batch()
        first = call.getpid()
        call.openat(-100, b"/no/such/file", os.O_RDONLY)
        last = call.getpid()
        with pytest.raises(BatchError, match=r"openat\(-100, b'/no/such/file', 0\) in task \d+: No such file"):
            call.run()
        assert first.value == pid
        with pytest.raises(RuntimeError):
            _ = last.value
    finally:
        tree.thaw()
    return found


def test_results_are_arguments_of_later_calls(engine: EngineThread) -> None:
    with Target.start("regs") as target:
        before = visible_tree(target.pid)
        found = engine.call(with_batch, target.pid)
        assert found["pid"] == target.pid
        assert found["comm"] == Path(f"/proc/{target.pid}/comm").read_bytes()
        assert found["missing"] == -2
        assert found["many"] == {target.pid}
        assert not Path(f"/proc/{target.pid}/fd/{found['opened']}").exists()
        assert difference(before, visible_tree(target.pid)) == []
        target.finish()


CATCHES_ALL = """
import os, signal, sys, time
for number in {signals}:
    signal.signal(number, lambda *_: os.write(1, b"caught"))
os.write(1, b"ready")
time.sleep(2)
os.write(1, b"slept")
"""


def test_a_program_that_catches_every_stop_signal(engine: EngineThread) -> None:
    """As Go's runtime does: the end of the list is then found by its system call."""
    read_end, write_end = os.pipe()
    code = CATCHES_ALL.format(signals=STOP_SIGNALS)
    pid = os.posix_spawn(
        "/usr/bin/python3", ["python3", "-c", code], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, write_end, 1)]
    )
    os.close(write_end)
    with open(read_end, "rb") as output:
        assert output.read(5) == b"ready"
        time.sleep(0.1)
        assert engine.call(with_batch, pid)["pid"] == pid
        assert output.read() == b"slept"
    assert os.waitpid(pid, 0)[1] == 0


def inject_for_ever(pid: int) -> None:
    while True:
        tree = SourceTree(pid)
        tree.freeze()
        for thread in tree.threads:
            call = thread.batch()
            for number in range(1, 32):
                if number not in (signal.SIGKILL, signal.SIGSTOP):
                    call.rt_sigaction(number, 0, call.space(32), 8)
            call.run()
        tree.thaw()


def kill_in_the_middle(pid: int, delay: float) -> None:
    child = os.fork()
    if child == 0:
        try:
            inject_for_ever(pid)
        finally:
            os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "the tracer failed before it was killed"


@pytest.mark.slow
@pytest.mark.parametrize("case", [("regs",), ("blocked", "stopped"), ("threads",)], ids="-".join)
def test_the_tracer_may_die_at_any_moment(case: tuple[str, ...]) -> None:
    dice = random.Random(1)
    with Target.start(*case) as target:
        time.sleep(0.2)
        before = visible_tree(target.pid)
        for _ in range(KILLS):
            kill_in_the_middle(target.pid, dice.uniform(0.001, 0.02))
            deadline = time.monotonic() + SETTLE
            while (changes := difference(before, visible_tree(target.pid))) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert changes == []
        target.finish()
