"""Page contents: which pages of a process and of shared memory must travel, and moving them in bulk.

A *target* is the name of a page map, "pagemap-PID" or "pagemap-shmem-ID"; for the latter, addresses are
offsets in the object. No Python runs per page: a scan returns ranges, a range is one iovec.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from phaul.engine import native
from phaul.engine.native import PAGE_FILE, PAGE_GUARD, PAGE_PFNZERO, PAGE_PRESENT, PAGE_SWAPPED
from phaul.engine.proc import PAGE_SIZE, TASK_SIZE, Mapping, Proc
from phaul.engine.vmas import KERNEL_OWNED, Status, is_anonymous_shared, is_memfd
from phaul.errors import ImageError
from phaul.images.pagemap import PageRange
from phaul.images.pb.vma_pb2 import vma_entry

IN_MEMORY = PAGE_PRESENT | PAGE_SWAPPED


def shmem_id(device: int, inode: int) -> int:
    """The id of a shared memory object in the images (32 bits, as CRIU's memfd_inode_entry has it).

    All such objects are files of one tmpfs of the kernel, so the inode number alone tells them apart.
    """
    del device
    return inode & 0xFFFFFFFF


def _join(regions: Iterable[tuple[int, int]]) -> list[PageRange]:
    """Ascending regions as page ranges, neighbours made one."""
    joined: list[list[int]] = []
    for start, end in regions:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return [PageRange(start, (end - start) // PAGE_SIZE) for start, end in joined]


def private_pages(
    pid: int, maps: Sequence[Mapping], vmas: Sequence[vma_entry]
) -> tuple[list[PageRange], list[PageRange]]:
    """Pages that only this process has: neither zero nor what its files hold. The process should be stopped.

    The vDSO's pages are among them, so that a restore can tell another kernel's.

    Returns:
        Pages with a content, and guard pages (MADV_GUARD_INSTALL), which have none.
    """
    fd = Proc(pid).open("pagemap")
    try:
        scanner = native.PageScanner(fd)
        found: list[tuple[int, int]] = []
        guards: list[tuple[int, int]] = []
        for mapping, vma in zip(maps, vmas, strict=True):
            if vma.status & Status.VDSO:
                found.append((mapping.start, mapping.end))
            if vma.status & KERNEL_OWNED or mapping.shared or mapping.start >= TASK_SIZE:
                continue
            without = PAGE_PFNZERO | (PAGE_FILE if vma.status & Status.FILE_PRIVATE else 0)
            regions = scanner.scan(
                mapping.start,
                mapping.end,
                inverted=without & scanner.known,
                every=without & scanner.known,
                any_of=IN_MEMORY,
                ret=PAGE_GUARD & scanner.known,
            )
            for start, end, categories in regions:
                # A guard page is a marker where a swapped page's place would be.
                (guards if categories & PAGE_GUARD else found).append((start, end))
        return _join(found), _join(guards)
    finally:
        os.close(fd)


class SharedObject:
    """Shared anonymous memory or a memfd: one object, whoever maps or opens it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size

    def close(self) -> None:
        os.close(self.fd)

    @property
    def pages(self) -> list[PageRange]:
        """What has been written of it (tmpfs tells holes by SEEK_DATA)."""
        found, position = [], 0
        while position < self.size:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole follows
                break
            position = os.lseek(self.fd, start, os.SEEK_HOLE)
            found.append((start & -PAGE_SIZE, (position + PAGE_SIZE - 1) & -PAGE_SIZE))
        return _join(found)

    def read(self, ranges: Sequence[PageRange], buffer: memoryview) -> None:
        done = 0
        for item in ranges:
            view = buffer[done : done + item.size]
            done += item.size
            offset = item.vaddr
            while view:
                n = os.preadv(self.fd, [view], offset)
                if n == 0:  # the file ends within its last page
                    view[:] = bytes(len(view))
                    break
                view, offset = view[n:], offset + n

    def write(self, ranges: Sequence[PageRange], data: memoryview) -> None:
        done = 0
        for item in ranges:
            view = data[done : done + item.size]
            done += item.size
            view = view[: max(0, self.size - item.vaddr)]  # the last page may be longer than the file
            offset = item.vaddr
            while view:
                n = os.pwritev(self.fd, [view], offset)
                view, offset = view[n:], offset + n


def shared_objects(processes: Iterable[tuple[int, Sequence[Mapping]]]) -> dict[int, SharedObject]:
    """All shared anonymous memory and memfds that processes map or have open, by id.

    Opened through /proc/PID/map_files (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN) or /proc/PID/fd.
    """
    found: dict[int, SharedObject] = {}

    def add(device: int, inode: int, path: str) -> None:
        if (number := shmem_id(device, inode)) not in found:
            found[number] = SharedObject(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    for pid, maps in processes:
        for mapping in maps:
            if is_anonymous_shared(mapping) or is_memfd(mapping):
                add(mapping.device, mapping.inode, f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
        for fd in Proc(pid).fds():
            path = f"/proc/{pid}/fd/{fd}"
            if os.readlink(path).startswith("/memfd:"):
                status = os.stat(path)
                add(status.st_dev, status.st_ino, path)
    return found


class ProcessPages:
    """Reads or writes the private pages of one process. `ranges` of any protection."""

    def __init__(self, pid: int, mem_fd: int) -> None:
        self.pid, self._mem_fd = pid, mem_fd

    def read(self, ranges: Sequence[PageRange], buffer: memoryview) -> None:
        native.vm_read(self.pid, self._mem_fd, [(item.vaddr, item.size) for item in ranges], buffer)

    def write(self, ranges: Sequence[PageRange], data: memoryview) -> None:
        native.vm_write(self.pid, self._mem_fd, [(item.vaddr, item.size) for item in ranges], data)


class Bounds:
    """Where pages may be written, to check what a peer or an image says."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        joined = _join(sorted(ranges))
        self._starts = [item.vaddr for item in joined]
        self._ends = [item.end for item in joined]

    def check(self, target: str, ranges: Iterable[PageRange]) -> None:
        """Raises ImageError if a range lies outside."""
        for item in ranges:
            i = bisect_right(self._starts, item.vaddr) - 1
            if i < 0 or item.end > self._ends[i]:
                raise ImageError(f"{target}: pages at {item.vaddr:#x} are outside of every mapping")
