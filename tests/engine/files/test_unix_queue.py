"""Descriptors in flight: passed in queues of unix sockets (SCM_RIGHTS), and open there only."""

from __future__ import annotations

import array
import fcntl
import os
import socket
from pathlib import Path

import pytest

from phaul.engine.state.files.unix_queue import Packet, peek_queue
from phaul.errors import CannotMove
from phaul.images.pb.fdinfo_pb2 import file_entry
from tests.engine.files.holding import Copy, Holder, Options

pytestmark = pytest.mark.root

KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET]
IDS = ["stream", "dgram", "seqpacket"]


def send(sock: socket.socket, data: bytes, *fds: int) -> None:
    socket.send_fds(sock, [data], list(fds))


def take(sock: socket.socket, size: int = 1000) -> tuple[bytes, list[int]]:
    """The next message: its data and descriptors."""
    data, fds, _, _ = socket.recv_fds(sock, size, 300, socket.MSG_DONTWAIT)
    return data, fds


def opened(copy: Copy, fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(copy[fd]))


def give(holder: Holder, *socks: socket.socket) -> list[int]:
    fds = [sock.detach() for sock in socks]
    holder.give(*fds)
    return fds


def same_file(a: int, b: int) -> bool:
    """Whether two descriptors share position and flags."""
    before = fcntl.fcntl(a, fcntl.F_GETFL)
    fcntl.fcntl(a, fcntl.F_SETFL, before ^ os.O_APPEND)
    same = fcntl.fcntl(b, fcntl.F_GETFL) == fcntl.fcntl(a, fcntl.F_GETFL)
    fcntl.fcntl(a, fcntl.F_SETFL, before)
    return same


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_files_that_are_open_nowhere_else(holder: Holder, tmp_path: Path, kind: int) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    (tmp_path / "file").write_bytes(b"0123456789")
    file = os.open(tmp_path / "file", os.O_RDWR)
    os.lseek(file, 4, os.SEEK_SET)
    reader, writer = os.pipe()
    os.write(writer, b"in the pipe")
    send(one, b"first", file, reader)
    send(one, b"second", writer, file)
    for fd in (file, reader, writer):
        os.close(fd)
    a, b = give(holder, one, two)
    holder.preflight()

    copy = holder.copy()

    with opened(copy, a), opened(copy, b) as second:
        copy.built.close()
        data, (file, reader) = take(second)
        assert data == b"first"
        assert os.read(file, 3) == b"456"
        assert os.read(reader, 100) == b"in the pipe"
        data, (writer, again) = take(second)
        assert data == b"second"
        assert os.read(again, 1) == b"7"
        os.write(writer, b"more")
        os.close(writer)
        assert os.read(reader, 100) == b"more"
        assert os.read(reader, 100) == b""
        for fd in (file, reader, again):
            os.close(fd)


def test_a_file_that_a_process_has_too(holder: Holder, tmp_path: Path) -> None:
    one, two = socket.socketpair()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    send(one, b"x", file)
    fds = [one.detach(), two.detach(), file]
    holder.give(*fds)
    copy = holder.copy()
    assert len(copy.images.messages("files", file_entry)) == 3 + 1  # and /dev/null
    with opened(copy, fds[1]) as second:
        _, (got,) = take(second)
        assert same_file(got, copy[file])
        os.close(got)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_socket_in_flight_with_descriptors_in_its_own_queue(holder: Holder, kind: int) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    three, four = socket.socketpair(socket.AF_UNIX, kind)
    reader, writer = os.pipe()
    os.write(writer, b"deep")
    os.close(writer)
    send(three, b"inner", reader)
    os.close(reader)
    send(one, b"outer", four.fileno())
    four.close()
    _, b, c = give(holder, one, two, three)
    holder.preflight()

    copy = holder.copy()

    with opened(copy, b) as second, opened(copy, c) as third:
        copy.built.close()
        data, (fd,) = take(second)
        assert data == b"outer"
        with socket.socket(fileno=fd) as inner:
            data, (reader,) = take(inner)
            assert data == b"inner"
            assert os.read(reader, 10) == b"deep"
            os.close(reader)
            third.send(b"still connected")
            assert inner.recv(100) == b"still connected"


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_sockets_in_the_queues_of_each_other(holder: Holder, kind: int) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    send(one, b"itself", two.fileno())
    send(two, b"its peer", two.fileno())
    a, b = give(holder, one, two)
    copy = holder.copy()
    with opened(copy, a) as first, opened(copy, b) as second:
        for sock, text in ((second, b"itself"), (first, b"its peer")):
            data, (fd,) = take(sock)
            assert data == text
            assert os.path.sameopenfile(fd, second.fileno())
            os.close(fd)


def test_descriptors_of_a_stream_come_with_their_first_byte(holder: Holder) -> None:
    one, two = socket.socketpair()
    sent = [(b"plain", 0), (b"and more", 0), (b"marked", 2), (b"m", 1), (b"tail", 0), (b"x" * 100_000, 3), (b"end", 0)]
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    for data, count in sent:
        one.send(data) if not count else send(one, data, *[0] * count)
    a, b = give(holder, one, two)
    copy = holder.copy()
    with opened(copy, a), opened(copy, b) as second:
        for data, count in sent:
            got, fds = take(second, len(data))
            while len(got) < len(data):
                more, none = take(second, len(data) - len(got))
                assert not none
                got += more
            assert (got, len(fds)) == (data, count)
            for fd in fds:
                os.close(fd)


def test_as_many_as_a_message_can_hold(holder: Holder) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    send(one, b"all", *[0] * 253)
    _, b = give(holder, one, two)
    copy = holder.copy()
    with opened(copy, b) as second:
        data, control, *_ = second.recvmsg(100, 2000)
        fds = [fd for _, kind, content in control if kind == socket.SCM_RIGHTS for fd in array.array("i", content)]
        assert (data, len(fds), len(control)) == (b"all", 253, 2)
        for fd in fds:
            os.close(fd)


def test_peeking_leaves_no_descriptors_and_takes_nothing() -> None:
    one, two = socket.socketpair()
    with one, two:
        send(one, b"x", 0)
        before = os.listdir("/proc/self/fd")
        for _ in range(2):
            (packet,) = peek_queue(two, 1)
            assert isinstance(packet, Packet)
            assert len(packet.fds) == 1
            os.close(packet.fds[0])
        assert os.listdir("/proc/self/fd") == before
        data, (fd,) = take(two)
        os.close(fd)
        assert data == b"x"


def test_a_dump_leaves_no_descriptors(holder: Holder) -> None:
    one, two = socket.socketpair()
    reader, writer = os.pipe()
    send(one, b"x", reader, writer)
    os.close(reader)
    os.close(writer)
    give(holder, one, two)
    before = os.listdir("/proc/self/fd")
    holder.dump()
    assert os.listdir("/proc/self/fd") == before


def test_a_lock_on_a_file_that_is_only_in_flight_is_refused(holder: Holder, tmp_path: Path) -> None:
    one, two = socket.socketpair()
    with open(tmp_path / "file", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        send(one, b"x", file.fileno())
    _, b = give(holder, one, two)
    holder.preflight()  # queues of a running process are not looked into
    what = f"^descriptor in the queue of fd {b} of PID {holder.pids[0]}: .*/file with a lock and open nowhere else"
    with pytest.raises(CannotMove, match=what):
        holder.dump(Options(file_locks=True))
