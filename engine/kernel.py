"""What this kernel and CPU can do: probed, never deduced from a version."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from phaul.engine import clocks, native
from phaul.engine.skeleton import local_vdso

_UFFDIO_API: Final = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_UFFD_API: Final = 0xAA
_UFFD_FEATURE_WP_ASYNC: Final = 1 << 15
_PR_TIMER_CREATE_RESTORE_IDS: Final = 77
_PR_TIMER_CREATE_RESTORE_IDS_GET: Final = 2


def _succeeds(probe: Callable[[], object]) -> bool:
    try:
        probe()
    except OSError:
        return False
    return True


def _pidfd_getfd() -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        os.close(native.syscall("pidfd_getfd", pidfd, pidfd, 0))
    finally:
        os.close(pidfd)


def set_tid() -> bool:
    """clone3 with a PID that is taken: EEXIST comes only after all checks of the argument and of our rights."""
    wanted = native.buffer(struct.pack("<i", 1))
    args = native.buffer(struct.pack("<11Q", 0, 0, 0, 0, 0, 0, 0, 0, wanted.address, 1, 0))
    try:
        native.syscall("clone3", args.address, args.size)
    except OSError as error:
        return error.errno == errno.EEXIST
    raise AssertionError("PID 1 was free")


def userfaultfd_features() -> int:
    """Features that a userfaultfd of ours can have; 0 without userfaultfd."""
    try:
        fd = native.syscall("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        answer = fcntl.ioctl(fd, _UFFDIO_API, struct.pack("<3Q", _UFFD_API, 0, 0))
        return int(struct.unpack("<3Q", answer)[1])
    except OSError:
        return 0
    finally:
        os.close(fd)


def timer_restore_ids() -> None:
    native.syscall("prctl", _PR_TIMER_CREATE_RESTORE_IDS, _PR_TIMER_CREATE_RESTORE_IDS_GET, 0, 0, 0)


def pagemap_scan() -> bool:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return native.PageScanner(fd).has_scan
    finally:
        os.close(fd)


def features() -> dict[str, bool]:
    """Kernel features that phaul uses, by name."""
    uffd = userfaultfd_features()
    ours = os.getpid()
    return {
        "clone3_set_tid": set_tid(),
        "kcmp": _succeeds(lambda: native.syscall("kcmp", ours, ours, native.KCMP_VM, 0, 0)),
        "map_files": _succeeds(lambda: os.listdir("/proc/self/map_files")),
        "pagemap_scan": pagemap_scan(),
        "pidfd_getfd": _succeeds(_pidfd_getfd),
        "proc_children": Path("/proc/thread-self/children").exists(),
        "timens": clocks.supported(),
        "timer_restore_ids": _succeeds(timer_restore_ids),
        "uffd_wp_async": bool(uffd & _UFFD_FEATURE_WP_ASYNC),
        "userfaultfd": bool(uffd),
    }


def cpu_features() -> list[str]:
    """What user programs can find out about the CPU: its flags in /proc/cpuinfo, and enabled XSAVE components."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            enabled = native.xsave_supported()
            return sorted({*value.split(), *(f"xsave{i}" for i in range(64) if enabled >> i & 1)})
    return []


def vdso_id() -> bytes:
    """A digest of the vDSO: equal on kernels whose vDSOs can stand for each other."""
    return hashlib.sha256(local_vdso()).digest()
