"""What all tests share: the two hosts, and a header that says what this kernel can do."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.demo.hosts import TwoHosts

_NR_USERFAULTFD = 323
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), 96 bytes


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    """A fresh pair of hosts, as in `source, destination = hosts`; gone after the test."""
    with TwoHosts() as pair:
        yield pair


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs root fails without: a skip would look like a success."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail("this test needs root", pytrace=False)


def pytest_report_header() -> list[str]:
    """The capabilities that tests and code depend on."""
    probes = {
        "root": os.geteuid() == 0,
        "userfaultfd": _has_userfaultfd(),
        "pagemap-scan": _has_pagemap_scan(),
        "netns": Path("/proc/self/ns/net").exists(),
        "timens": Path("/proc/self/ns/time").exists(),
        "soft-dirty": _has_soft_dirty(),
    }
    found = ", ".join(f"{name} {'yes' if there else 'NO'}" for name, there in probes.items())
    return [f"kernel: {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs; {found}"]


def _has_userfaultfd() -> bool:
    fd: int = ctypes.CDLL(None).syscall(_NR_USERFAULTFD, os.O_CLOEXEC)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def _has_pagemap_scan() -> bool:
    argument = bytearray(struct.pack("12Q", 96, *[0] * 11))
    with open("/proc/self/pagemap", "rb") as pagemap:
        try:
            return bool(fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument) == 0)
        except OSError:
            return False


def _has_soft_dirty() -> bool:
    # A page just written is soft-dirty (bit 55, Documentation/admin-guide/mm/soft-dirty.rst).
    page = ctypes.create_string_buffer(b"written")
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(ctypes.addressof(page) // os.sysconf("SC_PAGESIZE") * 8)
        (entry,) = struct.unpack("Q", pagemap.read(8))
    return bool(entry >> 55 & 1)
