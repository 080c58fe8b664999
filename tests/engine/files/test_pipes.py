"""Pipes and named pipes: content, ends, sizes, packets."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul.errors import CannotMove
from tests.engine.files.holding import Holder

pytestmark = pytest.mark.root
Info = Callable[[int], dict[str, str]]


def drain(fd: int) -> list[bytes]:
    """Everything in a pipe, read by read, without waiting."""
    os.set_blocking(fd, False)
    found: list[bytes] = []
    while True:
        try:
            data = os.read(fd, 1 << 20)
        except BlockingIOError:
            return found
        if not data:
            return [*found, b"EOF"]
        found.append(data)


@pytest.mark.parametrize("size", [0, 1, 4096, 70_000, 1 << 20])
def test_content_and_size(holder: Holder, size: int) -> None:
    content = random.Random(size).randbytes(size)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(write, content)
    ours = os.dup(read)
    holder.give(read, write)

    copy = holder.copy(keep=True)

    assert fcntl.fcntl(copy[read], fcntl.F_GETPIPE_SZ) == 1 << 20
    assert b"".join(drain(copy[read])) == content
    # The source still has all of it.
    assert b"".join(drain(ours)) == content
    os.close(ours)


def test_flags_and_both_ends(holder: Holder, fdinfo: Info) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(write, True)
    before = fdinfo(read), fdinfo(write)
    holder.give(read, write)
    copy = holder.copy()
    assert (fdinfo(copy[read]), fdinfo(copy[write])) == before
    os.write(copy[write], b"hello")
    assert os.read(copy[read], 10) == b"hello"


def test_packets_keep_their_boundaries(holder: Holder) -> None:
    read, write = os.pipe2(os.O_DIRECT)
    packets = [b"one", b"t" * 4096, b"three", b"4"]
    for packet in packets:
        os.write(write, packet)
    holder.give(read, write)
    copy = holder.copy()
    os.write(copy[write], b"new")
    assert drain(copy[read]) == [*packets, b"new"]


def test_a_single_packet_is_still_one(holder: Holder) -> None:
    read, write = os.pipe2(os.O_DIRECT)
    os.write(write, b"only")
    holder.give(read, write)
    copy = holder.copy()
    os.write(copy[write], b"new")
    assert drain(copy[read]) == [b"only", b"new"]


def test_two_descriptions_of_one_end(holder: Holder, fdinfo: Info) -> None:
    read, write = os.pipe()
    second = os.open(f"/proc/self/fd/{write}", os.O_WRONLY | os.O_NONBLOCK)
    both = os.open(f"/proc/self/fd/{write}", os.O_RDWR)
    holder.give(read, write, second, both)
    copy = holder.copy()
    assert len({copy[fd] for fd in (read, write, second, both)}) == 4
    for fd in (write, second, both):
        os.write(copy[fd], b"x")
    assert os.read(copy[read], 10) == b"xxx"
    assert int(fdinfo(copy[second])["flags"], 8) & os.O_NONBLOCK
    assert not int(fdinfo(copy[write])["flags"], 8) & os.O_NONBLOCK


def test_an_end_that_is_closed_stays_closed(holder: Holder) -> None:
    read, write = os.pipe()
    os.write(write, b"last words")
    os.close(write)
    other_read, other_write = os.pipe()
    os.close(other_read)
    holder.give(read, other_write)

    copy = holder.copy()
    read_id, write_id = copy.numbers[read], copy.numbers[other_write]
    mine, other = os.dup(copy.built.fds[read_id]), os.dup(copy.built.fds[write_id])
    copy.built.close()

    assert drain(mine) == [b"last words", b"EOF"]
    with pytest.raises(BrokenPipeError):
        os.write(other, b"x")
    os.close(mine)
    os.close(other)


def test_a_pipe_across_two_processes(holder: Holder) -> None:
    read, write = os.pipe()
    os.write(write, b"on the way")
    holder.give(read)
    holder.give(write)
    holder.preflight()
    copy = holder.copy()
    assert os.read(copy[read], 100) == b"on the way"


@pytest.mark.parametrize("end", [0, 1])
def test_a_pipe_to_the_outside_is_refused(holder: Holder, end: int) -> None:
    pipe = os.pipe()
    holder.give(pipe[end])
    outside = subprocess.Popen(["sleep", "1000"], pass_fds=[pipe[1 - end]])
    os.close(pipe[1 - end])
    try:
        with pytest.raises(CannotMove, match=rf"fd {pipe[end]} .*belongs to PID {outside.pid} \(sleep\), outside"):
            holder.preflight()
    finally:
        outside.kill()
        outside.wait()


def test_named_pipes(holder: Holder, tmp_path: Path, fdinfo: Info) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    both = os.open(path, os.O_RDWR)
    read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write = os.open(path, os.O_WRONLY)
    os.write(write, b"content")
    before = {fd: fdinfo(fd) for fd in (both, read, write)}
    holder.give(both, read, write)
    copy = holder.copy()
    assert {fd: fdinfo(copy[fd]) for fd in (both, read, write)} == before
    assert os.read(copy[read], 100) == b"content"
    assert os.fstat(copy[read]).st_ino == path.stat().st_ino
