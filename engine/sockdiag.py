"""What sock_diag(7) tells of the unix sockets of our network namespace: peers, queues, names."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
NLM_F_REQUEST, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x10, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3

# linux/unix_diag.h: what to show, and the attributes that show it.
UDIAG_SHOW: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x10  # name, vfs, peer, icons, rqlen
UNIX_DIAG_NAME, UNIX_DIAG_VFS, UNIX_DIAG_PEER, UNIX_DIAG_ICONS, UNIX_DIAG_RQLEN = range(5)
UNIX_DIAG_SHUTDOWN: Final = 6

# States of a socket, which unix(7) shares with TCP (net/tcp_states.h).
TCP_ESTABLISHED, TCP_CLOSE, TCP_LISTEN = 1, 7, 10

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_REQUEST = struct.Struct("=BBHIII2I")  # unix_diag_req
_MESSAGE = struct.Struct("=BBBBI2I")  # unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")
_ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """One unix socket.

    Attributes:
        inode: st_ino.
        type: SOCK_*.
        state: TCP_ESTABLISHED (connected), TCP_LISTEN or TCP_CLOSE.
        name: as bound, paths without their NUL; abstract names begin with NUL.
        vfs_inode: of the socket's node in the file system, or 0.
        peer: inode of the other end, or 0.
        icons: of a listener: inodes of the clients not yet accepted, oldest first; 0 for one that is closed.
        rqueue: bytes to read (of a datagram socket: of the next datagram); connections to accept.
        wqueue: bytes (with overhead) that the other end has not read; the backlog of a listener.
        shutdown: bit 0 for reading, bit 1 for writing.
    """

    inode: int
    type: int
    state: int
    name: bytes = b""
    vfs_inode: int = 0
    peer: int = 0
    icons: tuple[int, ...] = ()
    rqueue: int = 0
    wqueue: int = 0
    shutdown: int = 0


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        yield kind, data[offset + _ATTRIBUTE.size : offset + length]
        offset += max(length + 3 & ~3, _ATTRIBUTE.size)


def _parse(payload: bytes) -> UnixSocket:
    _, kind, state, _, inode, *_ = _MESSAGE.unpack_from(payload)
    found = dict(_attributes(payload[_MESSAGE.size :]))
    rqueue, wqueue = struct.unpack("=2I", found.get(UNIX_DIAG_RQLEN, bytes(8)))
    icons = found.get(UNIX_DIAG_ICONS, b"")
    name = found.get(UNIX_DIAG_NAME, b"")
    return UnixSocket(
        inode,
        kind,
        state,
        name if name.startswith(b"\0") else name.rstrip(b"\0"),
        struct.unpack("=2I", found.get(UNIX_DIAG_VFS, bytes(8)))[0],
        struct.unpack("=I", found.get(UNIX_DIAG_PEER, bytes(4)))[0],
        struct.unpack(f"={len(icons) // 4}I", icons),
        rqueue,
        wqueue,
        found.get(UNIX_DIAG_SHUTDOWN, b"\0")[0],
    )


def _messages(netlink: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and payload of every message of a dump; ends with NLMSG_DONE."""
    while True:
        data = netlink.recv(1 << 16)
        offset = 0
        while offset < len(data):
            length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
            yield kind, flags, data[offset + _HEADER.size : offset + length]
            if kind == NLMSG_DONE:
                return
            offset += length + 3 & ~3


def unix_sockets() -> dict[int, UnixSocket]:
    """All unix sockets of our network namespace that have an inode, by its number.

    Raises:
        OSError: the kernel has no sock_diag for unix sockets (CONFIG_UNIX_DIAG).
    """
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, UDIAG_SHOW, 0, 0)
    length = _HEADER.size + len(request)
    header = _HEADER.pack(length, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as netlink:
        for _ in range(_ATTEMPTS):
            netlink.send(header + request)
            found: dict[int, UnixSocket] = {}
            interrupted = 0
            for kind, flags, payload in _messages(netlink):
                interrupted |= flags & NLM_F_DUMP_INTR
                if kind == NLMSG_ERROR:
                    error = -struct.unpack_from("=i", payload)[0]
                    raise OSError(error, f"sock_diag: {os.strerror(error)}")
                if kind == SOCK_DIAG_BY_FAMILY:
                    entry = _parse(payload)
                    found[entry.inode] = entry
            if not interrupted:
                break
        return found
