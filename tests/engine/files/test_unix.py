"""Unix sockets: queues in both directions, names, connections, and what is refused."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul.engine.sockdiag import unix_sockets
from phaul.engine.state.files.unix_queue import peek_queue
from phaul.errors import CannotMove, RestoreError
from tests.engine.files.holding import Copy, Holder, Options

pytestmark = pytest.mark.root
Info = Callable[[int], dict[str, str]]

KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET]
IDS = ["stream", "dgram", "seqpacket"]
UCRED = struct.Struct("iII")


def unix(kind: int = socket.SOCK_STREAM) -> socket.socket:
    return socket.socket(socket.AF_UNIX, kind)


def opened(copy: Copy, fd: int) -> socket.socket:
    """Our copy of a socket, as an object of its own, with a timeout."""
    sock = socket.socket(fileno=os.dup(copy[fd]))
    sock.settimeout(5)
    return sock


def give(holder: Holder, *socks: socket.socket) -> list[int]:
    fds = [sock.detach() for sock in socks]
    holder.give(*fds)
    return fds


def receive(sock: socket.socket) -> list[bytes]:
    """All messages that wait."""
    sock.settimeout(None)
    found = []
    while True:
        try:
            found.append(sock.recv(1 << 20, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return found


def messages(seed: int) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(size) for size in (1, 3000, 17, 9000, 250)]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_pairs_with_data_in_both_directions(holder: Holder, fdinfo: Info, kind: int) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    one.setblocking(False)
    for message in messages(1):
        one.send(message)
    for message in messages(2):
        two.send(message)
    before = [fdinfo(sock.fileno()) for sock in (one, two)]
    ours = one.dup(), two.dup()
    a, b = give(holder, one, two)
    holder.preflight()

    copy = holder.copy(keep=True)

    assert [fdinfo(copy[fd]) for fd in (a, b)] == before
    with opened(copy, a) as first, opened(copy, b) as second:
        join = b"".join if kind == socket.SOCK_STREAM else list
        assert join(receive(second)) == join(messages(1))
        assert join(receive(first)) == join(messages(2))
        first.send(b"onwards")
        assert second.recv(10) == b"onwards"
        # The source has lost nothing, and does not peek at an offset.
        for sock, seed in ((ours[1], 1), (ours[0], 2)):
            assert sock.getsockopt(socket.SOL_SOCKET, 42) == -1
            assert join(receive(sock)) == join(messages(seed))
            sock.close()


def test_a_message_larger_than_the_first_buffer(holder: Holder) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)
    sent = [b"small", random.Random(3).randbytes(1 << 20), b"", b"end", b""]
    for message in sent:
        one.send(message)
    a, b = give(holder, one, two)
    copy = holder.copy()
    with opened(copy, b) as second, opened(copy, a) as first:
        assert receive(second) == sent
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 8 << 20


def test_a_queue_that_fills_the_buffer(holder: Holder) -> None:
    one, two = socket.socketpair()
    one.setblocking(False)
    sent = 0
    try:
        while True:
            sent += one.send(bytes([sent % 251]) * 100)
    except BlockingIOError:
        pass
    content = two.recv(1 << 20, socket.MSG_PEEK)
    assert len(content) == sent > 10_000
    a, b = give(holder, one, two)
    copy = holder.copy()
    with opened(copy, a), opened(copy, b) as second:
        assert b"".join(receive(second)) == content


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_shutdown(holder: Holder, kind: int, how: int) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    one.send(b"before")
    two.send(b"answer")
    one.shutdown(how)
    inodes = {sock: os.fstat(sock.fileno()).st_ino for sock in (one, two)}
    expected = [unix_sockets()[inodes[sock]].shutdown for sock in (one, two)]
    assert expected[0] == how + 1
    a, b = give(holder, one, two)
    copy = holder.copy()
    now = [unix_sockets()[os.fstat(copy[fd]).st_ino].shutdown for fd in (a, b)]
    assert now == expected
    with opened(copy, b) as second:
        assert second.recv(10) == b"before"
        if how != socket.SHUT_RD:
            assert second.recv(10) == b""


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_the_other_end_was_closed(holder: Holder, kind: int) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    two.send(b"last words")
    two.close()
    (fd,) = give(holder, one)
    holder.preflight()
    copy = holder.copy()
    here = opened(copy, fd)
    copy.built.close()
    with here:
        assert here.recv(100) == b"last words"
        if kind == socket.SOCK_DGRAM:
            with pytest.raises(ConnectionRefusedError):
                here.send(b"x")
        else:
            assert here.recv(100) == b""
            with pytest.raises(BrokenPipeError):
                here.send(b"x")


def test_credentials_of_the_sender(holder: Holder) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    one.sendmsg([b"from root"])
    one.sendmsg([b"from nobody"], [(socket.SOL_SOCKET, 2, UCRED.pack(os.getppid(), 65534, 65534))])
    _, b = give(holder, one, two)
    copy = holder.copy()
    with opened(copy, b) as second:
        assert second.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
        for text, sender in ((b"from root", (os.getpid(), 0, 0)), (b"from nobody", (os.getppid(), 65534, 65534))):
            data, [(_, _, control)], *_ = second.recvmsg(100, 100)
            assert (data, UCRED.unpack(control)) == (text, sender)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_named_sockets(holder: Holder, tmp_path: Path, fdinfo: Info, kind: int, abstract: bool) -> None:
    path = str(tmp_path / "name")
    name = "\0" + path if abstract else path
    server = unix(kind)
    server.bind(name)
    if not abstract:
        os.chmod(path, 0o640)
        os.chown(path, 1, 2)
    if kind != socket.SOCK_DGRAM:
        server.listen(7)
    before = fdinfo(server.fileno())
    (fd,) = give(holder, server)
    holder.preflight()
    copy = holder.copy()
    copy.built.resume()
    assert fdinfo(copy[fd]) == before
    with opened(copy, fd) as here, unix(kind) as client:
        assert os.fsencode(here.getsockname()) == os.fsencode(name)
        client.connect(name)
        client.send(b"hello")
        if kind == socket.SOCK_DGRAM:
            assert here.recv(10) == b"hello"
        else:
            found = unix_sockets()[os.fstat(here.fileno()).st_ino]
            assert (found.wqueue, found.state) == (7, 10)
            end, _ = here.accept()
            with end:
                assert end.recv(10) == b"hello"
    if not abstract:
        status = os.stat(path)
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, 1, 2)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
@pytest.mark.parametrize("listening", [False, True], ids=["listener-gone", "listener-there"])
def test_accepted_connections(holder: Holder, tmp_path: Path, kind: int, abstract: bool, listening: bool) -> None:
    path = str(tmp_path / "name")
    name = "\0" + path if abstract else path
    server, clients = unix(kind), [unix(kind), unix(kind)]
    server.bind(name)
    server.listen(5)
    ends = []
    for number, client in enumerate(clients):
        client.connect(name)
        client.send(b"question %d" % number)
        ends.append(server.accept()[0])
        ends[-1].send(b"answer %d" % number)
    if not listening:
        server.close()
        if not abstract:
            os.unlink(path)
    given = give(holder, *clients, *ends, *([server] if listening else []))
    holder.preflight()

    copy = holder.copy()
    copy.built.resume()

    socks = [opened(copy, fd) for fd in given]
    for number in range(2):
        assert os.fsencode(socks[number].getpeername()) == os.fsencode(name)
        assert os.fsencode(socks[2 + number].getsockname()) == os.fsencode(name)
        assert socks[number].recv(100) == b"answer %d" % number
        assert socks[2 + number].recv(100) == b"question %d" % number
    if listening:
        with unix(kind) as client:
            client.connect(name)
            socks[-1].accept()[0].close()
    elif not abstract:
        assert not os.path.exists(path)
    for sock in socks:
        sock.close()


def test_connections_not_yet_accepted(holder: Holder, tmp_path: Path) -> None:
    name = str(tmp_path / "name")
    server, client = unix(), unix()
    server.bind(name)
    server.listen(5)
    client.connect(name)
    a, b = give(holder, server, client)
    holder.preflight()
    copy = holder.copy()
    with opened(copy, a) as here, opened(copy, b) as there:
        end, _ = here.accept()
        with end:
            end.send(b"welcome")
            assert there.recv(10) == b"welcome"
            there.send(b"thanks")
            assert end.recv(10) == b"thanks"


def test_relative_names(holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server, client = unix(socket.SOCK_DGRAM), unix(socket.SOCK_DGRAM)
    server.bind("relative")
    client.connect("relative")
    client.send(b"waiting")
    monkeypatch.undo()
    cwd = os.getcwd()
    a, b = give(holder, server, client)
    copy = holder.copy()
    copy.built.resume()
    assert os.getcwd() == cwd
    with opened(copy, a) as here, opened(copy, b) as there:
        assert here.getsockname() == "relative"
        assert (tmp_path / "relative").is_socket()
        there.send(b"new")
        assert receive(here) == [b"waiting", b"new"]


def test_datagrams_from_many_senders(holder: Holder, tmp_path: Path) -> None:
    server = unix(socket.SOCK_DGRAM)
    server.bind(str(tmp_path / "log"))
    clients = [unix(socket.SOCK_DGRAM) for _ in range(4)]
    for number, client in enumerate(clients):
        client.connect(str(tmp_path / "log"))
        client.send(b"line %d" % number)
    fd, *rest = give(holder, server, *clients)
    copy = holder.copy()
    copy.built.resume()
    with opened(copy, fd) as here:
        assert receive(here) == [b"line %d" % number for number in range(4)]
        with opened(copy, rest[2]) as client:
            client.send(b"more")
        assert here.recv(10) == b"more"


def test_a_deleted_path_stays_deleted(holder: Holder, tmp_path: Path) -> None:
    path = str(tmp_path / "name")
    old, new = unix(), unix()
    old.bind(path)
    old.listen()
    os.unlink(path)
    new.bind(path)
    new.listen()
    given = give(holder, new, old)
    copy = holder.copy()
    copy.built.resume()
    with opened(copy, given[0]) as here, opened(copy, given[1]) as gone, unix() as client:
        assert here.getsockname() == gone.getsockname() == path
        client.connect(path)
        here.accept()[0].close()
    assert os.listdir(tmp_path) == ["name"]


def test_clients_of_a_name_that_was_removed(holder: Holder, tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("log", "server")]
    log, client, server, waiting = unix(socket.SOCK_DGRAM), unix(socket.SOCK_DGRAM), unix(), unix()
    log.bind(names[0])
    client.connect(names[0])
    client.send(b"before")
    server.bind(names[1])
    server.listen()
    waiting.connect(names[1])
    for name in names:
        os.unlink(name)
    given = give(holder, log, client, server, waiting)
    holder.preflight()
    copy = holder.copy()
    copy.built.resume()
    log, client, server, waiting = [opened(copy, fd) for fd in given]
    client.send(b"after")
    assert receive(log) == [b"before", b"after"]
    end, _ = server.accept()
    waiting.send(b"hello")
    assert end.recv(10) == b"hello"
    assert os.listdir(tmp_path) == []
    for sock in (log, client, server, waiting, end):
        sock.close()


def test_a_name_relative_to_what_nobody_knows_is_refused(
    holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    server = unix()
    server.bind("../name")
    monkeypatch.undo()
    give(holder, server)
    with pytest.raises(CannotMove, match=r"unix socket \.\./name, whose name is relative to an unknown directory"):
        holder.dump()


def test_a_name_above_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    bind = "import socket, time; sock = socket.socket(socket.AF_UNIX); sock.bind('../name'); time.sleep(60)"
    holder = Holder()
    holder.processes.append(subprocess.Popen([sys.executable, "-c", bind], cwd=tmp_path / "work"))
    try:
        while not (tmp_path / "name").exists():
            time.sleep(0.01)
        images, _ = holder.dump()
    finally:
        holder.stop()
    old = (tmp_path / "name").stat().st_ino
    with contextlib.closing(holder.build(images)) as built:
        built.resume()
        assert (tmp_path / "name").stat().st_ino != old
        (usk,) = [file.usk for file in built.entries.values() if file.HasField("usk")]
        with socket.socket(fileno=os.dup(built.fds[usk.id])) as here:
            assert here.getsockname() == "../name"
    assert sorted(os.listdir(tmp_path)) == ["name", "work"]


def test_across_two_processes(holder: Holder) -> None:
    one, two = socket.socketpair()
    one.send(b"on the way")
    (a,) = give(holder, one)
    (b,) = give(holder, two)
    holder.preflight()
    copy = holder.copy()
    here = copy.built.fds[copy.built.tables["fdinfo-2"][b]]
    assert os.read(here, 100) == b"on the way"
    os.write(copy[a], b"more")
    assert os.read(here, 100) == b"more"


def test_a_peer_outside_is_refused(holder: Holder) -> None:
    one, two = socket.socketpair()
    (fd,) = give(holder, one)
    with two:
        pid = holder.pids[0]
        with pytest.raises(CannotMove, match=f"^fd {fd} of PID {pid}: unix socket connected to a process, outside"):
            holder.preflight()


def test_a_server_outside_is_named(holder: Holder, tmp_path: Path) -> None:
    with unix(socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "log"))
        client = unix(socket.SOCK_DGRAM)
        client.connect(str(tmp_path / "log"))
        give(holder, client)
        with pytest.raises(CannotMove, match=f"unix socket connected to {tmp_path}/log.*; with --ext-unix-sk"):
            holder.preflight()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_clients_of_a_server_outside(holder: Holder, tmp_path: Path, abstract: bool) -> None:
    allowed = Options(ext_unix_sk=True)
    name = "\0" * abstract + str(tmp_path / "log")
    with unix(socket.SOCK_DGRAM) as server:
        server.bind(name)
        clients = [unix(socket.SOCK_DGRAM) for _ in range(2)]
        for client in clients:
            client.connect(name)
            client.send(b"before")
        given = give(holder, *clients)
        holder.preflight(allowed)
        copy = holder.copy(allowed)
        for fd in given:
            with opened(copy, fd) as here:
                assert os.fsencode(here.getpeername()) == os.fsencode(name)
                here.send(b"again")
        assert receive(server) == [b"before"] * 2 + [b"again"] * 2
        images = copy.images
    if not abstract:
        os.unlink(name)
    with pytest.raises(RestoreError, match="/log: cannot be connected to"):
        holder.build(images)


def test_a_connection_from_outside_that_waits_is_refused(holder: Holder, tmp_path: Path) -> None:
    server = unix()
    server.bind(str(tmp_path / "name"))
    server.listen()
    with unix() as client:
        client.connect(str(tmp_path / "name"))
        give(holder, server)
        with pytest.raises(CannotMove, match="not yet accepted and comes from outside the tree"):
            holder.preflight()


def test_a_pending_error_is_not_taken_away(holder: Holder) -> None:
    one, two = socket.socketpair()
    one.send(b"never read")
    two.send(b"last words")
    two.close()
    ours = one.dup()
    (fd,) = give(holder, one)
    copy = holder.copy(keep=True)
    with ours, opened(copy, fd) as here:
        for sock in (ours, here):
            assert sock.recv(10) == b"last words"
        with pytest.raises(ConnectionResetError):
            ours.recv(10)


def test_a_pending_error_of_a_datagram_socket_is_refused(holder: Holder) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.send(b"never read")
    two.close()
    (fd,) = give(holder, one)
    with pytest.raises(CannotMove, match=f"fd {fd} .*unix socket with an error that is still to be told"):
        holder.preflight()


def test_a_name_that_is_taken_is_named(holder: Holder, tmp_path: Path) -> None:
    path = str(tmp_path / "name")
    server = unix()
    server.bind(path)
    server.listen()
    give(holder, server)
    images, _ = holder.dump()
    with pytest.raises(RestoreError, match=f"unix socket {path}: another process of this host has this name"):
        holder.build(images)


def test_peeking_leaves_an_offset_as_it_was() -> None:
    one, two = socket.socketpair()
    with one, two:
        one.send(b"0123456789")
        two.setsockopt(socket.SOL_SOCKET, 42, 4)
        assert [packet.data for packet in peek_queue(two, 10)] == [b"0123456789"]
        assert two.getsockopt(socket.SOL_SOCKET, 42) == 4


def test_a_name_is_seen_only_when_the_tree_runs(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "name"
    server = unix()
    server.bind(str(path))
    server.listen()
    (fd,) = give(holder, server)
    images, _ = holder.dump()
    holder.stop()
    # As the destination sees the source's socket on a file system of both: a node that no socket here has.
    old = path.stat().st_ino

    failed = holder.build(images)
    failed.close()
    failed.abort()
    assert path.stat().st_ino == old
    assert os.listdir(tmp_path) == ["name"]

    built = holder.build(images)
    assert path.stat().st_ino == old
    with socket.socket(fileno=os.dup(built.fds[built.tables["fdinfo-1"][fd]])) as here:
        built.close()
        built.resume()
        assert path.stat().st_ino != old
        assert os.listdir(tmp_path) == ["name"]
        with unix() as client:
            client.connect(str(path))
            here.accept()[0].close()
