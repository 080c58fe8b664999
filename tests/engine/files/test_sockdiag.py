"""sock_diag against what we know of our own sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from phaul.engine.sockdiag import TCP_CLOSE, TCP_ESTABLISHED, TCP_LISTEN, UnixSocket, unix_sockets


def look(sock: socket.socket) -> UnixSocket:
    return unix_sockets()[os.fstat(sock.fileno()).st_ino]


def test_a_pair() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, two:
        one.send(b"12345")
        one.shutdown(socket.SHUT_WR)
        first, second = look(one), look(two)
        assert (first.peer, second.peer) == (second.inode, first.inode)
        assert (first.type, first.state, first.name) == (socket.SOCK_SEQPACKET, TCP_ESTABLISHED, b"")
        assert (first.rqueue, second.rqueue) == (0, 5)
        assert first.wqueue > 5
        assert (first.shutdown, second.shutdown) == (2, 1)


def test_a_listener(tmp_path: Path) -> None:
    path = tmp_path / "name"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        assert look(server).state == TCP_CLOSE
        server.bind(str(path))
        server.listen(5)
        client.connect(str(path))
        found = look(server)
        assert (found.state, found.name, found.vfs_inode) == (TCP_LISTEN, os.fsencode(path), path.stat().st_ino)
        assert (found.rqueue, found.wqueue, found.icons) == (1, 5, (look(client).inode,))
        assert look(client).peer == 0


def test_an_abstract_name_may_hold_anything() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        name = b"\0phaul\0test %d\0" % os.getpid()
        sock.bind(name)
        assert look(sock).name == name
