"""Descriptors in a skeleton: their numbers, their flags, what is attached afterwards."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.engine import native
from phaul.engine.inject import STOP_SIGNALS
from phaul.engine.proc import Proc
from phaul.engine.skeleton import SkeletonProcess, SkeletonTree
from phaul.engine.state import fds
from phaul.engine.state.files.base import FileBuild, allow_many_files
from phaul.engine.vmas import Status
from phaul.errors import CannotMove, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.core_pb2 import core_entry, task_kobj_ids_entry
from phaul.images.pb.eventpoll_pb2 import eventpoll_file_entry
from phaul.images.pb.fdinfo_pb2 import fdinfo_entry
from phaul.images.pb.mm_pb2 import mm_entry
from phaul.images.pb.pstree_pb2 import pstree_entry
from phaul.images.pb.vma_pb2 import vma_entry
from tests.engine.files.holding import Holder, Options

root = pytest.mark.root
PR_SET_CHILD_SUBREAPER = 36


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[dict[int, bool]]]:
    """Received descriptors, and which numbers each is to have."""
    received = draw(st.lists(st.integers(1, 12), unique=True, max_size=8))
    numbers = draw(st.lists(st.integers(0, 14), unique=True, min_size=len(received), max_size=14))
    wanted: list[dict[int, bool]] = [{} for _ in received]
    for i, number in enumerate(numbers if received else []):
        owner = i if i < len(received) else draw(st.integers(0, len(received) - 1))
        wanted[owner][number] = draw(st.booleans())
    return received, wanted


@given(tables())
def test_moves_lead_to_the_wanted_table(table: tuple[list[int], list[dict[int, bool]]]) -> None:
    received, wanted = table
    moves, closes = fds.plan_moves(received, wanted)

    now = {number: (i, True) for i, number in enumerate(received)}
    for move in moves:
        if move.source == move.target:
            now[move.source] = now[move.source][0], move.cloexec
        else:
            now[move.target] = now[move.source][0], move.cloexec
    for number in closes:
        del now[number]

    assert 0 not in closes
    assert now == {number: (i, flag) for i, found in enumerate(wanted) for number, flag in found.items()}


@contextmanager
def skeleton(*pids: int) -> Iterator[SkeletonTree]:
    """Skeletons with nothing in them: the first is the parent of the others."""
    vmas = [
        vma_entry(
            start=mapping.start, end=mapping.end, pgoff=0, shmid=0, prot=5, flags=2, fd=-1,
            status=Status.VDSO if mapping.path == b"[vdso]" else Status.VVAR,
        )
        for mapping in Proc(os.getpid()).maps()
        if mapping.path in (b"[vdso]", b"[vvar]", b"[vvar_vclock]")
    ]  # fmt: skip
    mm = mm_entry(exe_file_id=0, vmas=vmas)
    entries = [
        pstree_entry(pid=pid, ppid=0 if pid == pids[0] else pids[0], pgid=pids[0], sid=pids[0], threads=[pid])
        for pid in pids
    ]
    tree = SkeletonTree(entries, dict.fromkeys(pids, mm), lambda file_id: "", sharing={}, stop_signal=STOP_SIGNALS[0])
    # Orphans become ours, and `abort` waits for all: the tests need no init that reaps.
    native.syscall("prctl", PR_SET_CHILD_SUBREAPER, 1)
    try:
        tree.create(parent=native.Parent.CALLER, clocks=None)
        yield tree
    finally:
        tree.abort()
        native.syscall("prctl", PR_SET_CHILD_SUBREAPER, 0)


def free_pids(count: int) -> list[int]:
    """PIDs that are free, and not about to be given away."""
    (limit,) = map(int, Path("/proc/sys/kernel/pid_max").read_text().split())
    free = [pid for pid in range(limit // 2, limit) if not Path(f"/proc/{pid}").exists()]
    return random.sample(free, count)


def prepare(holder: Holder, pids: list[int]) -> tuple[ImageSet, FileBuild]:
    """Dump a holder's files, as those of processes with these PIDs, and build them."""
    images, _ = holder.dump()
    holder.stop()
    for number, pid in enumerate(pids, start=1):
        ids = task_kobj_ids_entry(vm_id=number, files_id=number, fs_id=number, sighand_id=number)
        images.add(f"core-{pid}", core_entry(mtype=core_entry.X86_64, ids=ids))
    return images, holder.build(images)


def install_all(tree: SkeletonTree, built: FileBuild) -> None:
    for process in tree.processes:
        fds.install(process, built, tree.comm)


def taken(process: SkeletonProcess, number: int) -> int:
    """Our duplicate of one of a skeleton's descriptors."""
    return native.syscall("pidfd_getfd", process.pidfd, number, 0)


def shape(pid: int) -> dict[int, tuple[str, list[str]]]:
    """Links and fdinfo of all descriptors, without what cannot be the same."""
    variable = ("mnt_id", "ino", "eventfd-id")
    return {
        fd: (
            os.readlink(f"/proc/{pid}/fd/{fd}").split("[")[0],
            [
                line.partition("  pos:")[0]
                for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
                if not line.startswith(variable)
            ],
        )
        for fd in Proc(pid).fds()
    }


@root
def test_numbers_flags_and_sharing(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    read = os.open(path, os.O_RDONLY)
    os.lseek(read, 3, os.SEEK_SET)
    high = fcntl.fcntl(read, fcntl.F_DUPFD, 500)
    pipe = os.pipe()
    holder.start(read, high, *pipe)
    holder.start(pipe[1], high)
    before = [shape(pid) for pid in holder.pids]
    for fd in (read, high, *pipe):
        os.close(fd)
    pids = free_pids(2)
    _, built = prepare(holder, pids)
    with skeleton(*pids) as tree:
        install_all(tree, built)
        built.close()
        assert [shape(pid) for pid in pids] == before
        one, two = tree.processes
        first, second = taken(one, read), taken(two, high)
        assert os.read(first, 4) == b"3456"
        assert os.read(second, 4) == b"789"
        into, out = taken(two, pipe[1]), taken(one, pipe[0])
        os.write(into, b"across")
        assert os.read(out, 10) == b"across"
        for fd in (first, second, into, out):
            os.close(fd)


@root
def test_close_on_exec_and_a_table_without_0(holder: Holder) -> None:
    fd = os.eventfd(0)
    holder.give(fd)
    pid = free_pids(1)[0]
    images, built = prepare(holder, [pid])
    other = ImageSet()
    for name in images.names():
        for message, extra in images.records(name):
            if isinstance(message, fdinfo_entry) and message.fd in (0, 1, 2):
                continue
            if isinstance(message, fdinfo_entry):
                message.flags = fds.FD_CLOEXEC
            other.add(name, message, extra)
    built = holder.build(other)
    with skeleton(pid) as tree:
        install_all(tree, built)
        assert Proc(pid).fds() == [fd]
        assert int(Proc(pid).fdinfo(fd)["flags"][0], 8) & os.O_CLOEXEC


@root
def test_thousands_of_descriptors(holder: Holder) -> None:
    count = 3000
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_many_files(2 * count)
    try:
        opened = [os.eventfd(i) for i in range(count)]
        # Numbers with gaps, in no order.
        numbers = random.Random(1).sample(range(4000, 20_000), count)
        for fd, number in zip(opened, numbers, strict=True):
            os.dup2(fd, number)
            os.close(fd)
        holder.give(*numbers)
        pid = free_pids(1)[0]
        start = time.monotonic()
        _, built = prepare(holder, [pid])
        with skeleton(pid) as tree:
            install_all(tree, built)
            seconds = time.monotonic() - start
            assert Proc(pid).fds() == sorted([0, 1, 2, *numbers])
            for i in (0, 1, count - 1):
                assert int(Proc(pid).fdinfo(numbers[i])["eventfd-count"][0], 16) == i
        assert seconds < 5
    finally:
        for copy in holder.copies:
            copy.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@root
def test_a_limit_that_is_too_low_is_named(holder: Holder) -> None:
    fd = fcntl.fcntl(os.eventfd(0), fcntl.F_DUPFD, 900)
    holder.give(fd)
    pid = free_pids(1)[0]
    _, built = prepare(holder, [pid])
    with skeleton(pid) as tree:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (100, 1000))
        install_all(tree, built)
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (100, 1000)
        assert fd in Proc(pid).fds()
    with skeleton(pid) as tree:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (100, 100))
        with pytest.raises(RestoreError, match=f"PID {pid} needs 9.. descriptors, the limit here is 100"):
            install_all(tree, built)


def events_of(process: SkeletonProcess, fd: int) -> list[tuple[int, int]]:
    """What an epoll of a skeleton reports: (data, events)."""
    ours = select.epoll.fromfd(taken(process, fd))
    with ours:
        return sorted(ours.poll(0))


@root
def test_epoll(holder: Holder) -> None:
    inner, outer = select.epoll(), select.epoll()
    ready, idle = os.eventfd(1), os.eventfd(0)
    read, write = os.pipe()
    inner.register(ready, select.EPOLLIN | select.EPOLLET)
    inner.register(idle, select.EPOLLIN | select.EPOLLONESHOT)
    outer.register(inner.fileno(), select.EPOLLIN)
    outer.register(read, select.EPOLLIN | select.EPOLLRDHUP)
    numbers = [inner.fileno(), outer.fileno(), ready, idle, read, write]
    pid = holder.start(*numbers)
    before = shape(pid)
    for fd in (ready, idle, read, write):
        os.close(fd)
    inner_fd, outer_fd = inner.fileno(), outer.fileno()
    inner.close()
    outer.close()
    holder.preflight()
    pid = free_pids(1)[0]
    _, built = prepare(holder, [pid])
    with skeleton(pid) as tree:
        install_all(tree, built)
        built.close()
        process = tree.processes[0]
        # Python passes the number as data.
        assert sorted(shape(pid)) == sorted(before)
        for fd in before:
            assert sorted(shape(pid)[fd][1]) == sorted(before[fd][1])
        assert events_of(process, outer_fd) == [(inner_fd, select.EPOLLIN)]
        assert events_of(process, inner_fd) == [(ready, select.EPOLLIN)]
        assert events_of(process, inner_fd) == []


@root
def test_one_shot_watches_that_have_fired(holder: Holder) -> None:
    event, other = os.eventfd(1), os.eventfd(1)
    one, two = socket.socketpair()
    epoll = select.epoll()
    for fd in (event, one.fileno(), two.fileno()):
        epoll.register(fd, select.EPOLLOUT | select.EPOLLIN | select.EPOLLONESHOT)
    assert len(epoll.poll(0)) == 3
    epoll.register(other, select.EPOLLIN | select.EPOLLONESHOT)
    numbers = [epoll.fileno(), event, other, one.detach(), two.detach()]
    before = shape(holder.start(*numbers))
    epoll.close()
    for fd in numbers[1:]:
        os.close(fd)
    pid = free_pids(1)[0]
    _, built = prepare(holder, [pid])
    with skeleton(pid) as tree:
        install_all(tree, built)
        built.close()
        assert sorted(shape(pid)[numbers[0]][1]) == sorted(before[numbers[0]][1])
        assert sum(" 40000000 " in line for line in before[numbers[0]][1]) == 3
        assert events_of(tree.processes[0], numbers[0]) == [(other, select.EPOLLIN)]


@root
def test_epoll_finds_a_file_under_another_number(holder: Holder) -> None:
    watched = os.eventfd(1)
    moved = fcntl.fcntl(watched, fcntl.F_DUPFD, 60)
    epoll = select.epoll()
    epoll.register(watched, select.EPOLLIN)
    # The number now leads to another eventfd, which looks the same.
    other = os.eventfd(1)
    os.dup2(other, watched)
    number = epoll.fileno()
    holder.start(number, watched, moved)
    for fd in (watched, moved, other):
        os.close(fd)
    epoll.close()
    pid = free_pids(1)[0]
    images, built = prepare(holder, [pid])
    entries = [entry.epfd for entry in built.entries.values() if entry.HasField("epfd")]
    assert [(watch.tfd, watch.data & 0xFFFFFFFF) for watch in entries[0].tfd] == [(moved, watched)]
    assert isinstance(entries[0], eventpoll_file_entry)
    assert images.names()
    with skeleton(pid) as tree:
        install_all(tree, built)
        built.close()
        assert events_of(tree.processes[0], number) == [(watched, select.EPOLLIN)]


@root
def test_epoll_of_a_file_that_is_not_there_is_refused(holder: Holder) -> None:
    watched = os.eventfd(1)
    epoll = select.epoll()
    epoll.register(watched, select.EPOLLIN)
    number = epoll.fileno()
    pid = holder.start(number)
    with pytest.raises(CannotMove) as refused:
        holder.dump()
    assert str(refused.value).startswith(f"fd {number} of PID {pid}: epoll that watches a file which was fd {watched}")
    epoll.close()
    os.close(watched)


@root
def test_an_epoll_shared_by_processes_gets_its_watches_once(holder: Holder) -> None:
    watched = os.eventfd(1)
    epoll = select.epoll()
    epoll.register(watched, select.EPOLLIN)
    number = epoll.fileno()
    # The first process lacks the file: the second adds the watch.
    holder.start(number)
    holder.start(number, watched)
    holder.start(number, watched)
    epoll.close()
    os.close(watched)
    pids = free_pids(3)
    _, built = prepare(holder, pids)
    with skeleton(*pids) as tree:
        install_all(tree, built)
        built.close()
        for process in tree.processes:
            assert events_of(process, number) == [(watched, select.EPOLLIN)]


@root
def test_preflight_of_a_busy_program(tmp_path: Path) -> None:
    program = """import os, select, socket
epoll = select.epoll()
while True:
    opened = [os.eventfd(1), *os.pipe(), *(sock.detach() for sock in socket.socketpair())]
    for fd in opened[:2]:
        epoll.register(fd)
    os.write(1, b".")
    for fd in opened:
        os.close(fd)
"""
    output = tmp_path / "output"
    null = subprocess.DEVNULL
    with output.open("wb") as file:
        child = subprocess.Popen([sys.executable, "-c", program], stdin=null, stdout=file, stderr=null)
    with child:
        try:
            while not output.stat().st_size:
                assert child.poll() is None
            for _ in range(50):
                fds.preflight([child.pid], Options())
        finally:
            child.kill()
