"""What a stopped thread was doing, in words."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from phaul.engine.source import SourceTree
from phaul.engine.thread import EngineThread
from tests.support.programs import Target


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    with EngineThread() as thread:
        yield thread


@pytest.mark.root
def test_the_log_tells_where_each_thread_was(engine: EngineThread, caplog: pytest.LogCaptureFixture) -> None:
    with Target.start("blocked") as target:
        time.sleep(0.2)
        tree = SourceTree(target.pid)
        with caplog.at_level(logging.DEBUG, "phaul.engine.source"):
            engine.call(tree.freeze)
        engine.call(tree.thaw)
        target.finish()
    text = caplog.text
    assert f"of PID {target.pid} in epoll_wait(epfd=" in text
    assert "in accept" in text


@pytest.mark.root
def test_a_thread_in_its_own_code(engine: EngineThread, caplog: pytest.LogCaptureFixture) -> None:
    with Target.start("regs") as target:
        tree = SourceTree(target.pid)
        with caplog.at_level(logging.DEBUG, "phaul.engine.source"):
            engine.call(tree.freeze)
        engine.call(tree.thaw)
        target.finish()
    assert f"stopped task {target.pid} of PID {target.pid} at 0x" in caplog.text
