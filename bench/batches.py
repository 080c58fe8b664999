"""The cost of system calls that another process is made to run: many in one batch, and one at a time."""

from __future__ import annotations

import subprocess
import time

from phaul.engine.source import SourceThread, SourceTree


def measure(calls: int) -> tuple[float, float]:
    """Seconds for so many getppid(2), as one batch and as batches of one, in a stopped `sleep`."""
    with subprocess.Popen(["sleep", "1000"]) as target:
        tree = SourceTree(target.pid)
        try:
            tree.freeze()
            thread = tree.root.threads[0]
            _run(thread, 1)
            begin = time.perf_counter()
            _run(thread, calls)
            together = time.perf_counter() - begin
            begin = time.perf_counter()
            for _ in range(calls):
                _run(thread, 1)
            single = time.perf_counter() - begin
        finally:
            tree.thaw()
            target.kill()
    return together, single


def _run(thread: SourceThread, calls: int) -> None:
    with thread.batch() as call:
        for _ in range(calls):
            call.getppid()
