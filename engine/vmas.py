"""Mappings, both directions: /proc/PID/smaps -> vma_entry -> mmap calls in a skeleton.

Source: CRIU's vma_entry (status bits), proc(5) (VmFlags), mmap(2), madvise(2).
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterable
from typing import Final

from phaul.engine.batch import Batch, Result
from phaul.engine.proc import Mapping
from phaul.errors import CannotMove
from phaul.images.pb.vma_pb2 import vma_entry

MAP_SHARED, MAP_PRIVATE, MAP_DROPPABLE, MAP_ANONYMOUS = 0x01, 0x02, 0x08, 0x20
MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE = 0x100, 0x2000, 0x4000
MAP_FIXED_NOREPLACE = 0x100000


class Status(enum.IntFlag):
    """vma_entry.status: what a mapping is (VMA_AREA_* and VMA_* of CRIU's images)."""

    REGULAR = 1 << 0
    STACK = 1 << 1
    VSYSCALL = 1 << 2
    VDSO = 1 << 3
    HEAP = 1 << 5
    FILE_PRIVATE = 1 << 6
    FILE_SHARED = 1 << 7
    ANON_SHARED = 1 << 8
    ANON_PRIVATE = 1 << 9
    VVAR = 1 << 12
    MEMFD = 1 << 14
    GUARD = 1 << 16


KERNEL_OWNED: Final = Status.VSYSCALL | Status.VDSO | Status.VVAR
"""Mappings that every process gets from its kernel: moved into place, never made."""

_KERNEL_NAMES = {
    b"[vdso]": Status.VDSO | Status.ANON_PRIVATE | Status.REGULAR,
    b"[vvar]": Status.VVAR | Status.ANON_PRIVATE | Status.REGULAR,
    b"[vvar_vclock]": Status.VVAR | Status.ANON_PRIVATE | Status.REGULAR,
    b"[vsyscall]": Status.VSYSCALL | Status.ANON_PRIVATE,
}

_MADV_GUARD_INSTALL = 102

# VmFlags of smaps -> madvise(2) advice that sets them again.
_ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}

# VmFlags that say what a mapping cannot be moved as.
_REFUSED = {
    "ht": "huge pages (hugetlb)",
    "pf": "memory of a device (PFN map)",
    "mm": "memory of a device (mixed map)",
    "io": "memory of a device",
    "um": "registered with a userfaultfd of the program",
    "uw": "registered with a userfaultfd of the program",
    "ss": "a shadow stack",
}
_DEVICES = (
    b"/dev/",
    b"anon_inode:",
    b"socket:",
    b"/SYSV",
    b"/[aio]",
    b"/anon_hugepage",
    b"/memfd:secretmem",
    b"/secretmem",
)


def is_anonymous_shared(mapping: Mapping) -> bool:
    """MAP_SHARED|MAP_ANONYMOUS (or a shared /dev/zero): an object that only its mappings name."""
    return mapping.shared and mapping.path == b"/dev/zero (deleted)"


def is_memfd(mapping: Mapping) -> bool:
    return mapping.path.startswith(b"/memfd:")


def check(pid: int, mapping: Mapping) -> None:
    """Refuse what cannot be moved.

    Raises:
        CannotMove: naming the mapping.
    """
    name = mapping.path.decode(errors="replace") or "anonymous"
    resource = f"mapping {mapping.start:x}-{mapping.end:x} ({name})"
    if mapping.path in _KERNEL_NAMES or is_anonymous_shared(mapping):
        return
    for flag, what in _REFUSED.items():
        if flag in mapping.flags:
            raise CannotMove(pid, resource, f"{what}, cannot be moved")
    if mapping.path.startswith(_DEVICES) or mapping.path in (b"[uprobes]", b"[aio]"):
        raise CannotMove(pid, resource, "cannot be moved")


def entry_of(mapping: Mapping, object_id: Callable[[Mapping, int], int]) -> vma_entry:
    """The image entry of a mapping.

    Args:
        object_id: for file mappings and shared memory: its id, given the mapping and the O_* flags to
            open it with.
    """
    flags, fdflags, shmid = MAP_SHARED if mapping.shared else MAP_PRIVATE, None, 0
    if mapping.path in _KERNEL_NAMES:
        status = _KERNEL_NAMES[mapping.path]
        flags |= MAP_ANONYMOUS
    elif is_anonymous_shared(mapping):
        status, flags = Status.REGULAR | Status.ANON_SHARED, flags | MAP_ANONYMOUS
        shmid = object_id(mapping, os.O_RDWR)
    elif mapping.inode:
        status = Status.REGULAR | (Status.FILE_SHARED if mapping.shared else Status.FILE_PRIVATE)
        status |= Status.MEMFD if is_memfd(mapping) else Status(0)
        fdflags = os.O_RDWR if mapping.shared and "mw" in mapping.flags else os.O_RDONLY
        shmid = object_id(mapping, fdflags)
    else:
        status = Status.REGULAR | Status.ANON_PRIVATE
        flags = (MAP_DROPPABLE if "dp" in mapping.flags else flags) | MAP_ANONYMOUS
        if mapping.path == b"[heap]":
            status |= Status.HEAP
        elif mapping.path == b"[stack]":
            status |= Status.STACK
    flags |= MAP_GROWSDOWN if "gd" in mapping.flags else 0
    flags |= MAP_LOCKED if "lo" in mapping.flags else 0
    flags |= MAP_NORESERVE if "nr" in mapping.flags else 0
    prot = sum(bit for bit, char in zip((1, 2, 4), mapping.perms, strict=False) if char != "-")
    madv = sum(1 << _ADVICE[flag] for flag in mapping.flags & _ADVICE.keys())
    return vma_entry(
        start=mapping.start, end=mapping.end, pgoff=mapping.offset, shmid=shmid, prot=prot,
        flags=flags, status=int(status), fd=-1, madv=madv or None, fdflags=fdflags,
    )  # fmt: skip


def guard_entry(start: int, end: int) -> vma_entry:
    """The entry of guard pages (MADV_GUARD_INSTALL) inside of a mapping; such entries stand behind all others."""
    return vma_entry(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, status=int(Status.GUARD), fd=-1)


def map_all(call: Batch, vmas: Iterable[vma_entry], path_of: Callable[[vma_entry], str | None]) -> None:
    """Add the calls that make all mappings, empty, with their final protection.

    Args:
        path_of: a path in the skeleton's /proc or file system to open for a mapping; None for anonymous
            private memory.
    """
    opened: dict[tuple[str, int], Result] = {}
    for vma in vmas:
        if vma.status & (KERNEL_OWNED | Status.GUARD):
            continue
        path = path_of(vma)
        fd: Result | int = -1
        flags = vma.flags & ~MAP_LOCKED | MAP_FIXED_NOREPLACE
        if path is not None:
            mode = vma.fdflags & os.O_ACCMODE if vma.HasField("fdflags") else os.O_RDWR
            if (path, mode) not in opened:
                opened[path, mode] = call.openat(-100, path, mode | os.O_CLOEXEC)
            fd = opened[path, mode]
            flags &= ~MAP_ANONYMOUS
        call.mmap(vma.start, vma.end - vma.start, vma.prot, flags, fd, vma.pgoff if path is not None else 0)
        for advice in _ADVICE.values():
            if vma.madv >> advice & 1:
                call.madvise(vma.start, vma.end - vma.start, advice)
    for fd in opened.values():
        call.close(fd)


def guard_all(call: Batch, vmas: Iterable[vma_entry]) -> None:
    """Add the calls that install guard pages: after the pages around them have come."""
    for vma in vmas:
        if vma.status & Status.GUARD:
            call.madvise(vma.start, vma.end - vma.start, _MADV_GUARD_INSTALL)


def lock_all(call: Batch, vmas: Iterable[vma_entry]) -> None:
    """Add the calls that lock what was locked: after the pages have come, so that nothing is populated twice."""
    for vma in vmas:
        if vma.flags & MAP_LOCKED:
            call.mlock2(vma.start, vma.end - vma.start, 0)
