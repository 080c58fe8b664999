"""Huge pages for memory that is about to be written: only where all of one comes, and with nothing lost."""

from __future__ import annotations

import mmap
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.engine.memory import HUGE_PAGE, HugePages, ProcessPages
from phaul.images.pagemap import PAGE_SIZE, PageRange

pytestmark = pytest.mark.root

AREA = 8 * HUGE_PAGE
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def target() -> Iterator[tuple[int, int]]:
    """A process with an empty anonymous mapping: its PID, and where the mapping begins."""
    area = mmap.mmap(-1, AREA, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = next(
        int(line.partition("-")[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if (bounds := [int(word, 16) for word in line.split()[0].split("-")])[1] - bounds[0] >= AREA
        and line.split()[-1] == "0"
    )
    pid = os.fork()
    if not pid:
        signal.pause()
    yield pid, start
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    area.close()


def kib(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_whole_blocks_become_huge_and_holes_stay(target: tuple[int, int]) -> None:
    pid, start = target
    block = -(-start // HUGE_PAGE) * HUGE_PAGE
    # Two whole blocks and some pages on both sides of them; then pages of which no block is whole.
    ranges = [
        PageRange(block + HUGE_PAGE - 3 * PAGE_SIZE, 3 + 1024 + 5),
        PageRange(block + 5 * HUGE_PAGE, 511),
    ]
    data = os.urandom(sum(item.size for item in ranges))
    mem_fd, pidfd = os.open(f"/proc/{pid}/mem", os.O_RDWR), os.pidfd_open(pid)
    try:
        before, huge_before = kib(pid, "Rss"), kib(pid, "AnonHugePages")
        HugePages(pid, mem_fd, pidfd, [(start, start + AREA)]).prepare(ranges)
        pages = ProcessPages(pid, mem_fd)
        pages.write(ranges, memoryview(data))
        got = bytearray(len(data))
        pages.read(ranges, memoryview(got))
        assert got == data
        assert kib(pid, "Rss") - before == len(data) // 1024
        if "[never]" not in TRANSPARENT.read_text():
            assert kib(pid, "AnonHugePages") - huge_before == 2 * HUGE_PAGE // 1024
    finally:
        os.close(mem_fd)
        os.close(pidfd)


def test_what_cannot_be_made_huge_is_left_alone(target: tuple[int, int]) -> None:
    pid, start = target
    mem_fd, pidfd = os.open(f"/proc/{pid}/mem", os.O_RDWR), os.pidfd_open(pid)
    block = -(-start // HUGE_PAGE) * HUGE_PAGE
    try:
        before = kib(pid, "Rss")
        huge = HugePages(pid, mem_fd, pidfd, [(block + PAGE_SIZE, block + HUGE_PAGE)])
        huge.prepare([PageRange(block, 512)])  # reaches beyond the area
        huge.prepare([PageRange(block + PAGE_SIZE, 511)])  # less than one
        assert kib(pid, "Rss") == before
    finally:
        os.close(mem_fd)
        os.close(pidfd)
