"""The target programs themselves: each passes when nothing happens to it, and when it is stopped
for a while; and a change that can be made from outside is noticed."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from phaul.demo.hosts import TwoHosts
from tests.support.programs import CASES, REFUSED, RESTLESS, SOURCES, Target, TargetError
from tests.support.visible import difference, visible_state, visible_tree

ALL = [pytest.param(case, id="-".join(case)) for case in (*CASES, *REFUSED)]
WORK = 0.1  # seconds that a program gets for its work
NR_PIDFD_GETFD = 438


def test_every_program_is_a_case() -> None:
    assert {case[0] for case in (*CASES, *REFUSED)} == {path.stem for path in SOURCES.glob("*.c")}


@pytest.mark.root
@pytest.mark.parametrize("case", ALL)
def test_passes_undisturbed(case: tuple[str, ...]) -> None:
    with Target.start(*case) as target:
        time.sleep(WORK)
        target.finish()
        # Children that die with their parent (PR_SET_PDEATHSIG) do so a moment later.
        deadline = time.monotonic() + 5
        while (left := target.copies()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left == []


@pytest.mark.root
@pytest.mark.parametrize("case", ALL)
def test_passes_after_a_stop(case: tuple[str, ...]) -> None:
    # signal(7): SIGSTOP and SIGCONT make epoll_wait and sigtimedwait return EINTR.
    arguments = (*case, "stopped") if case == ("blocked",) else case
    with Target.start(*arguments) as target:
        time.sleep(WORK)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in target.copies():
                os.kill(pid, number)
            time.sleep(WORK)
        target.finish()


@pytest.mark.root
def test_runs_in_a_host(hosts: TwoHosts) -> None:
    with Target.start("tree", host=hosts.source) as target:
        assert target.pid >= 1000
        assert len(target.copies()) == 8
        assert target.outer_pid in target.copies()
        target.moved(hosts.source)  # it is where it was
        with pytest.raises(TargetError, match="no process with PID"):
            target.moved(hosts.destination)
        assert str(target.pid) in visible_tree(target.outer_pid)
        target.finish()


# ---- what each program must notice ----


def steal(target: Target, fd: int) -> int:
    """A duplicate, in this process, of a target's descriptor."""
    pidfd = os.pidfd_open(target.outer_pid)
    try:
        duplicate: int = ctypes.CDLL(None, use_errno=True).syscall(NR_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    assert duplicate >= 0, os.strerror(ctypes.get_errno())
    return duplicate


def fds(target: Target, link: str) -> list[int]:
    """Numbers of the target's descriptors whose link starts so."""
    directory = Path("/proc", str(target.outer_pid), "fd")
    return sorted(int(entry.name) for entry in directory.iterdir() if os.readlink(entry).startswith(link))


def flip_a_byte(target: Target, area: str, offset: int) -> None:
    """In the largest mapping whose line in maps matches."""
    maps = Path("/proc", str(target.outer_pid), "maps").read_text().splitlines()
    areas = [line.split()[0].split("-") for line in maps if re.search(area, line)]
    _size, start = max((int(end, 16) - int(start, 16), int(start, 16)) for start, end in areas)
    with open(f"/proc/{target.outer_pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(start + offset)
        byte = memory.read(1)[0]
        memory.seek(start + offset)
        memory.write(bytes([byte ^ 1]))


def move_position(target: Target) -> None:
    fd = steal(target, 22)
    os.lseek(fd, 1, os.SEEK_CUR)
    os.close(fd)


def read_a_byte(target: Target, fd: int, size: int = 1) -> None:
    stolen = steal(target, fd)
    os.read(stolen, size)
    os.close(stolen)


def set_keepalive(target: Target, value: int) -> None:
    with socket.socket(fileno=steal(target, fds(target, "socket:")[0])) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, value)


def end_a_grandchild(target: Target) -> None:
    os.kill(max(target.copies()), signal.SIGKILL)


ALTERED: list[tuple[Sequence[str], Callable[[Target], object], str]] = [
    (["beat", "64", "0", "1"], lambda t: flip_a_byte(t, r" rw-p 0+ 00:00 0 *$", 32 << 20), "not as written"),
    (["blocked"], lambda t: os.kill(t.outer_pid, signal.SIGUSR2), "signals before the end|sigsuspend: returned"),
    (["eventfds"], lambda t: read_a_byte(t, fds(t, "anon_inode:[eventfd]")[0], 8), "watch 0"),
    (["files"], move_position, "position: 2223 .*, not 2222"),
    (["mem_kinds"], lambda t: flip_a_byte(t, r"\[heap\]", 0x8000), "heap"),
    (["mem_shared"], lambda t: read_a_byte(t, fds(t, "/memfd:")[0]), "position of the memfd: 4322"),
    (["mem_vmas"], lambda t: flip_a_byte(t, r"r-xp 00000000 00:00 0 *$", 77), "content differs"),
    (["pipes"], lambda t: read_a_byte(t, fds(t, "pipe:")[0]), "content of a plain pipe"),
    (["proc_attrs"], lambda t: resource.prlimit(t.outer_pid, resource.RLIMIT_NOFILE, (64, 64)), "limits|limit 7"),
    (["proc_attrs"], lambda t: os.setpriority(os.PRIO_PROCESS, t.outer_pid, 9), "field 18|field 19"),
    (["signals"], lambda t: os.kill(t.outer_pid, signal.SIGRTMIN + 3), "ShdPnd|si_code"),
    (["sock_listen"], lambda t: set_keepalive(t, 0), "SO_KEEPALIVE of IPv4 loopback: 0"),
    (["sock_unix"], lambda t: read_a_byte(t, fds(t, "socket:")[1]), "queued message"),
    (["tree"], end_a_grandchild, "node|child"),
    (["vdso"], lambda t: flip_a_byte(t, r"\[vdso\]", 0x1FF0), "sum of the vDSO"),
]


@pytest.mark.root
@pytest.mark.parametrize(
    ("case", "alter", "verdict"), [pytest.param(*row, id=f"{row[0][0]}-{n}") for n, row in enumerate(ALTERED)]
)
def test_notices(case: Sequence[str], alter: Callable[[Target], object], verdict: str) -> None:
    with Target.start(*case) as target:
        alter(target)
        time.sleep(WORK)
        with pytest.raises(TargetError, match=f"FAIL: .*({verdict})"):
            target.finish()


# ---- the visible state ----


@pytest.mark.root
@pytest.mark.parametrize("case", [pytest.param(case, id="-".join(case)) for case in CASES])
def test_visible_state_stays(case: tuple[str, ...]) -> None:
    with Target.start(*case) as target:
        before = visible_tree(target.outer_pid)
        time.sleep(WORK)
        after = visible_tree(target.outer_pid)
        assert difference(before, after, RESTLESS.get(target.program, ())) == []


@pytest.mark.root
def test_visible_state_shows_changes() -> None:
    with Target.start("files") as target:
        before = visible_state(target.outer_pid)
        assert before["ppid"] == os.getpid()
        move_position(target)
        resource.prlimit(target.outer_pid, resource.RLIMIT_NOFILE, (64, 64))
        os.setpriority(os.PRIO_PROCESS, target.outer_pid, 5)
        lines = difference(before, visible_state(target.outer_pid), RESTLESS["files"])
        assert lines == [
            f"threads.{target.pid}.nice: 0 became 5",
            "fds.22.pos: '2222' became '2223'",
            "limits.Max open files: " + repr(before["limits"]["Max open files"]) + " became '64 64'",  # type: ignore[index]
        ]
