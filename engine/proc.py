"""Typed access to /proc/PID (proc(5)). Reads only; names and paths stay bytes, as the kernel has them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from phaul.errors import NoSuchProcess

PAGE_SIZE = 4096
TASK_SIZE = 0x7FFF_FFFF_F000

_MAP_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)")


@dataclass(slots=True)
class Mapping:
    """One line of /proc/PID/maps; with `smaps` also its VmFlags."""

    start: int
    end: int
    perms: str
    offset: int
    dev: tuple[int, int]
    inode: int
    path: bytes
    flags: frozenset[str] = field(default_factory=frozenset)

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def device(self) -> int:
        """The device number as stat(2) gives it."""
        return os.makedev(*self.dev)

    @property
    def deleted(self) -> bool:
        return self.path.endswith(b" (deleted)")


def _mapping(line: bytes) -> Mapping:
    found = _MAP_LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"unknown line in maps: {line!r}")
    start, end, perms, offset, major, minor, inode, path = found.groups()
    # \n is the only character that the kernel escapes here.
    return Mapping(
        int(start, 16),
        int(end, 16),
        perms.decode(),
        int(offset, 16),
        (int(major, 16), int(minor, 16)),
        int(inode),
        path.replace(b"\\012", b"\n"),
    )


class Proc:
    """One process, or with `tid` one of its threads, seen through /proc.

    Every method raises NoSuchProcess when it has gone. What is read is read at the time of the call; only
    `stat` and `status` are kept (use a new object for newer ones).
    """

    def __init__(self, pid: int, tid: int | None = None) -> None:
        self.pid, self.tid = pid, tid if tid is not None else pid
        self.root = Path(f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}")

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise NoSuchProcess(f"PID {self.tid}: no such process") from error

    def link(self, name: str) -> bytes:
        try:
            return os.readlink(os.fsencode(self.root / name))
        except (FileNotFoundError, ProcessLookupError) as error:
            raise NoSuchProcess(f"PID {self.tid}: no such process, or {name} is not there") from error

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a file under /proc/PID, close-on-exec."""
        return os.open(self.root / name, flags | os.O_CLOEXEC)

    @cached_property
    def status(self) -> dict[str, str]:
        """/proc/PID/status: field -> text."""
        lines = self.read("status").decode(errors="surrogateescape").splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    @cached_property
    def stat(self) -> list[str]:
        """/proc/PID/stat: fields by their number in proc(5), from 1 on ([0] is empty)."""
        text = self.read("stat").decode(errors="surrogateescape")
        head, _, tail = text.rpartition(") ")
        pid, _, comm = head.partition(" (")
        return ["", pid, comm, *tail.split()]

    @property
    def comm(self) -> bytes:
        return self.read("comm").rstrip(b"\n")

    def signal_set(self, name: str) -> int:
        """SigPnd, ShdPnd, SigBlk, SigIgn or SigCgt as a bit mask (bit 0: signal 1)."""
        return int(self.status[name], 16)

    def is_kernel_thread(self) -> bool:
        return int(self.stat[9]) & 0x200000 != 0  # PF_KTHREAD (linux/sched.h)

    def tids(self) -> list[int]:
        try:
            found = [int(name) for name in os.listdir(self.root / "task")]
        except (FileNotFoundError, ProcessLookupError) as error:
            raise NoSuchProcess(f"PID {self.pid}: no such process") from error
        return sorted(found, key=lambda tid: (tid != self.pid, tid))

    def children(self) -> list[int]:
        """Children of all threads (CONFIG_PROC_CHILDREN). Exact only while the tree is stopped."""
        found: list[int] = []
        for tid in self.tids():
            try:
                found += map(int, Proc(self.pid, tid).read("children").split())
            except NoSuchProcess:
                continue  # that thread ended meanwhile
        return sorted(found)

    def maps(self) -> list[Mapping]:
        return [_mapping(line) for line in self.read("maps").splitlines()]

    def smaps(self) -> list[Mapping]:
        """As `maps`, with VmFlags. Walks the page tables: about 3 ms a GiB."""
        found: list[Mapping] = []
        for line in self.read("smaps").splitlines():
            if line.startswith(b"VmFlags:"):
                found[-1].flags = frozenset(line[8:].decode().split())
            elif _MAP_LINE.match(line):
                found.append(_mapping(line))
        return found

    def fds(self) -> list[int]:
        try:
            return sorted(map(int, os.listdir(self.root / "fd")))
        except (FileNotFoundError, ProcessLookupError) as error:
            raise NoSuchProcess(f"PID {self.pid}: no such process") from error

    def fdinfo(self, fd: int) -> dict[str, list[str]]:
        """/proc/PID/fdinfo/FD: key -> all values with that key, in order."""
        found: dict[str, list[str]] = {}
        for line in self.read(f"fdinfo/{fd}").decode(errors="surrogateescape").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key, []).append(value.strip())
        return found

    def limits(self) -> Iterator[tuple[str, int, int]]:
        """(name, soft, hard); infinity as 2**64-1. World-readable, unlike prlimit(2) of another uid's task."""
        for line in self.read("limits").decode().splitlines()[1:]:
            soft, hard = line[26:].split()[:2]
            values = [(1 << 64) - 1 if text == "unlimited" else int(text) for text in (soft, hard)]
            yield line[:26].strip(), values[0], values[1]

    def auxv(self) -> bytes:
        """The auxiliary vector, as the kernel keeps it (pairs of u64)."""
        return self.read("auxv")


def find_gap(taken: list[tuple[int, int]], size: int, floor: int = 0x10000, margin: int = 1 << 20) -> int:
    """The lowest address from which `size` bytes are free, with a margin to all taken ranges."""
    start = floor
    for low, high in sorted(taken):
        if low - margin >= start + size:
            return start
        start = max(start, high + margin)
    if start + size > TASK_SIZE - margin:
        raise ValueError("the address space is full")
    return start
