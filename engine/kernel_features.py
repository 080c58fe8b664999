"""Probes of the kernel by the names that `criu check --feature` gives them.

Each function looks at the running kernel, leaves it as it was, and tells whether CRIU or phaul could use the feature.
What the names mean is said in criu(8) and in the man pages named at each probe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from phaul.engine import kernel, native

# clone(2), prctl(2), ioctl_userfaultfd(2), tcp(7) and the headers of the kernel.
_PR_SET_MM, _PR_SET_MM_MAP_SIZE = 35, 15
_UFFD_NONCOOPERATIVE: Final = 0x2 | 0x4 | 0x8 | 0x40  # EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP
_TCP_REPAIR: Final = 19
_SO_BUF_LOCK: Final = 72
_IPV6_FREEBIND: Final = 78
_SIOCGSKNS, _SIOCUNIXFILE = 0x894C, 0x89E0
_MFD_HUGETLB: Final = 4
_PTRACE_SECCOMP_GET_FILTER: Final = 0x420C


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _works(probe: Callable[[], object]) -> Callable[[], bool]:
    """A probe that answers by failing (OSError) or not."""

    def run() -> bool:
        return kernel.succeeds(probe)

    return run


def _fdinfo(fd: int) -> str:
    return Path(f"/proc/self/fdinfo/{fd}").read_text()


def _mnt_id() -> bool:
    with _closing(os.open("/", os.O_RDONLY)) as fd:
        return "mnt_id:" in _fdinfo(fd)


def _fdinfo_lock() -> bool:
    with tempfile.TemporaryFile() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return "lock:" in _fdinfo(file.fileno())


def _timerfd() -> bool:
    with _closing(native.syscall("timerfd_create", 1, 0)) as fd:  # CLOCK_MONOTONIC
        return "clockid:" in _fdinfo(fd)


def _userns() -> None:
    os.stat("/proc/self/ns/user")
    size = native.buffer(bytes(4))
    native.syscall("prctl", _PR_SET_MM, _PR_SET_MM_MAP_SIZE, size.address, 0, 0)


FEATURES: Final[dict[str, Callable[[], bool]]] = {
    "mnt_id": _mnt_id,
    "timerfd": _timerfd,
    "userns": _works(_userns),
    "fdinfo_lock": _fdinfo_lock,
}
