"""eventfd, signalfd, timerfd, memfd, and what nobody claims."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul.engine import native
from phaul.engine.state import fds
from phaul.engine.state.files import memfd
from phaul.engine.state.files.base import FileBuild, OpenFiles
from phaul.errors import CannotMove
from phaul.images.pb.memfd_pb2 import memfd_inode_entry
from tests.engine.files.holding import Holder

pytestmark = pytest.mark.root
Info = Callable[[int], dict[str, str]]


def info_lines(fd: int) -> list[str]:
    """What is special about a file in its fdinfo."""
    return [
        line
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        if line.split(":")[0] not in ("flags", "mnt_id", "ino", "eventfd-id", "it_value")
    ]


@pytest.mark.parametrize("counter", [0, 5, 1 << 40])
@pytest.mark.parametrize("flags", [0, os.EFD_SEMAPHORE, os.EFD_NONBLOCK])
def test_eventfd(holder: Holder, fdinfo: Info, counter: int, flags: int) -> None:
    fd = os.eventfd(0, flags)
    if counter:
        os.eventfd_write(fd, counter)
    before, lines = fdinfo(fd), info_lines(fd)
    holder.give(fd)
    copy = holder.copy()
    assert (fdinfo(copy[fd]), info_lines(copy[fd])) == (before, lines)
    if counter:
        assert os.eventfd_read(copy[fd]) == (1 if flags & os.EFD_SEMAPHORE else counter)


def test_thousands_of_eventfds_need_no_comparison(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = [os.eventfd(i) for i in range(200)]
    holder.give(*opened)
    compared = []
    real = native.syscall

    def counting(name: str, *args: int) -> int:
        compared.append(name)
        return real(name, *args)

    monkeypatch.setattr("phaul.engine.native.syscall", counting)
    files = OpenFiles(holder.pids)
    assert len(files.all) >= 200
    # 0, 1 and 2 look the same, and are.
    assert compared.count("kcmp") < 10


def test_signalfd(holder: Holder) -> None:
    mask = ctypes.c_uint64(1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGRTMAX - 1))
    fd = native.syscall("signalfd4", -1, ctypes.addressof(mask), 8, os.O_NONBLOCK)
    lines = info_lines(fd)
    holder.give(fd)
    copy = holder.copy()
    assert info_lines(copy[fd]) == lines
    assert any("8000000000000200" in line for line in lines)
    assert not os.get_blocking(copy[fd])


def timer(clock: int, flags: int, first: float, interval: float) -> int:
    """A timerfd that has been set."""
    fd = native.syscall("timerfd_create", clock, 0)
    nanoseconds = [divmod(round(value * 10**9), 10**9) for value in (interval, first)]
    value = ctypes.create_string_buffer(struct.pack("4q", *nanoseconds[0], *nanoseconds[1]))
    native.syscall("timerfd_settime", fd, flags, ctypes.addressof(value), 0)
    return fd


def remaining(fd: int) -> float:
    """Seconds until a timerfd expires."""
    (line,) = (line for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if line.startswith("it_value"))
    seconds, nanoseconds = line.split("(")[1].rstrip(")").split(",")
    return int(seconds) + int(nanoseconds) / 10**9


@pytest.mark.parametrize("clock", [time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, time.CLOCK_BOOTTIME])
@pytest.mark.parametrize("absolute", [False, True])
def test_timerfd_that_runs(holder: Holder, clock: int, absolute: bool) -> None:
    first = 1000 + (time.clock_gettime(clock) if absolute else 0)
    fd = timer(clock, int(absolute), first, 2.5)
    lines = info_lines(fd)
    holder.give(fd)
    copy = holder.copy()
    assert info_lines(copy[fd]) == lines
    assert 990 < remaining(copy[fd]) <= 1000


def test_timerfd_that_has_expired(holder: Holder) -> None:
    once, idle = timer(time.CLOCK_MONOTONIC, 0, 0.001, 0), timer(time.CLOCK_MONOTONIC, 0, 0, 0)
    select.select([once], [], [], 5)
    holder.give(once, idle)
    copy = holder.copy()
    os.set_blocking(copy[idle], False)
    assert os.read(copy[once], 8) == struct.pack("Q", 1)
    with pytest.raises(BlockingIOError):
        os.read(copy[idle], 8)


def test_memfd(holder: Holder, fdinfo: Info) -> None:
    fd = os.memfd_create("näme", os.MFD_ALLOW_SEALING)
    os.write(fd, b"x" * 5000)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    os.fchmod(fd, 0o640)
    before = {number: fdinfo(number) for number in (fd, read_only)}
    link = os.readlink(f"/proc/self/fd/{fd}")
    holder.give(fd, read_only)

    copy = holder.copy()

    assert {number: fdinfo(copy[number]) for number in (fd, read_only)} == before
    assert os.readlink(f"/proc/self/fd/{copy[fd]}") == link
    assert fcntl.fcntl(copy[fd], fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
    status = os.fstat(copy[fd])
    assert (status.st_size, status.st_mode & 0o7777) == (5000, 0o640)
    assert os.fstat(copy[read_only]).st_ino == status.st_ino


def test_memfd_content_is_written_before_the_seals(holder: Holder) -> None:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"content")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    holder.give(fd)
    images, _ = holder.dump()
    inode = images.one("memfd", memfd_inode_entry)
    begun = FileBuild(images)
    os.pwrite(memfd.open_inode(inode.inode_id, begun), b"content", 0)
    holder.copies.append(begun)
    fds.build(begun)
    ours = begun.fds[begun.tables["fdinfo-1"][fd]]
    assert os.pread(ours, 100, 0) == b"content"
    with pytest.raises(PermissionError):
        os.pwrite(ours, b"x", 0)


def test_memfd_without_seals_cannot_be_sealed(holder: Holder) -> None:
    fd = os.memfd_create("plain")
    holder.give(fd)
    copy = holder.copy()
    assert fcntl.fcntl(copy[fd], fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL


def io_uring() -> int:
    params = ctypes.create_string_buffer(120)
    return ctypes.CDLL(None).syscall(425, 4, params)  # type: ignore[no-any-return]


def fanotify() -> int:
    return ctypes.CDLL(None).fanotify_init(0, 0)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (io_uring, "io_uring, cannot be moved"),
        (fanotify, "fanotify, cannot be moved"),
        (lambda: native.syscall("userfaultfd", 0), "userfaultfd, cannot be moved"),
        (lambda: os.pidfd_open(1), "pidfd of PID 1, which does not run in the tree, cannot be moved"),
        (lambda: os.openpty()[1], "terminal /dev/pts/[0-9]+ whose master is outside the tree, cannot be moved"),
        (lambda: os.open("/proc/self/ns/net", os.O_RDONLY), "network namespace, cannot be moved"),
        (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).detach(), "netlink socket, cannot be moved"),
        (lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).detach(), "raw IP socket, cannot be moved"),
    ],
    ids=["io_uring", "fanotify", "userfaultfd", "pidfd", "pty", "netns", "netlink", "raw"],
)
def test_what_nobody_claims_is_named(holder: Holder, make: Callable[[], int], reason: str) -> None:
    fd = make()
    assert fd >= 0
    pid = holder.give(fd)
    with pytest.raises(CannotMove, match=f"^fd {fd} of PID {pid}: {reason}$"):
        holder.preflight()
