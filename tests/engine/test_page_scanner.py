"""Which pages there are: by PAGEMAP_SCAN, and by reading pagemap as on kernels that have no such call."""

from __future__ import annotations

import ctypes
import mmap
import os
import random

import pytest

from phaul.engine.native import PAGE_FILE, PAGE_PRESENT, PAGE_SWAPPED, PageScanner
from phaul.engine.proc import PAGE_SIZE

PAGES = 6000


@pytest.mark.root
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_both_ways_find_what_was_written(density: float) -> None:
    """With more regions than the kernel's own buffer of 512 holds at the middle density."""
    dice = random.Random(4)
    area = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    written = {page for page in range(PAGES) if dice.random() < density}
    for page in written:
        area[page * PAGE_SIZE] = 1
    keep = ctypes.c_char.from_buffer(area)
    start = ctypes.addressof(keep)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        scanner = PageScanner(fd)
        for has_scan in (scanner.has_scan, False):
            scanner.has_scan = has_scan
            regions = scanner.scan(
                start,
                start + PAGES * PAGE_SIZE,
                inverted=PAGE_FILE,
                every=PAGE_FILE,
                any_of=PAGE_PRESENT | PAGE_SWAPPED,
            )
            found = [(at - start) // PAGE_SIZE for low, high, _ in regions for at in range(low, high, PAGE_SIZE)]
            assert found == sorted(written), has_scan
    finally:
        os.close(fd)
        del keep
        area.close()
