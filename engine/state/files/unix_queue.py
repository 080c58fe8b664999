"""What waits in a unix socket: read without taking it, and sent again. Not a kind of file.

Data, who has sent it (SO_PASSCRED), and the descriptors that go with it (SCM_RIGHTS).
"""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from phaul.engine import native
from phaul.engine.state.files import sockopts
from phaul.errors import RestoreError

SO_PEEK_OFF: Final = 42
SCM_CREDENTIALS: Final = 2
SCM_PIDFD: Final = 4
SCM_MAX_FD: Final = 253  # include/net/scm.h
UCRED: Final = struct.Struct("iII")

_FD_SIZE: Final = array.array("i").itemsize
_CHUNK: Final = 1 << 16
_MAX_EMPTY: Final = 64
_ALL_ROOM: Final = 1 << 30
_CONTROL: Final = socket.CMSG_SPACE(UCRED.size) + socket.CMSG_SPACE(SCM_MAX_FD * _FD_SIZE)
_PEEK: Final = socket.MSG_PEEK | socket.MSG_DONTWAIT


@dataclass(frozen=True, slots=True)
class Packet:
    """One message, or a piece of a stream.

    Attributes:
        sender: PID, UID and GID, where the socket asks for them.
        fds: descriptors in flight, as new ones of ours (close-on-exec) that the reader has to close.
    """

    data: bytes
    sender: tuple[int, int, int] | None = None
    fds: tuple[int, ...] = ()


def peek_queue(sock: socket.socket, rqueue: int) -> Iterator[Packet]:
    """What waits in a socket, without taking it. Descriptors come with the first byte that they were sent with.

    Args:
        rqueue: of a stream, how much there is: looking beyond would take a pending error (ECONNRESET) away.
    """
    stream = sock.type == socket.SOCK_STREAM
    if stream and not rqueue:
        return
    before = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    # Of a stream all is asked for: a shorter read also gets the descriptors of what comes behind it.
    offset, size = 0, max(_CHUNK, rqueue + 1)
    empty: list[Packet] = []
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        while True:
            try:
                data, control, flags, _ = sock.recvmsg(size, _CONTROL, _PEEK | socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                yield from empty
                return
            packet = _packet(data, control)
            if flags & socket.MSG_TRUNC:
                _close(packet.fds)
                size *= 4
                sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
            elif data:
                yield from empty
                empty.clear()
                # What was sent before the descriptors may come with them.
                start = _last_start(sock, offset, len(data)) if stream and packet.fds else 0
                if start:
                    yield Packet(data[:start], packet.sender)
                yield Packet(data[start:], packet.sender, packet.fds)
                offset += len(data)
                if stream and offset >= rqueue:
                    return
                sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
            elif packet.fds:
                yield from empty
                empty.clear()
                yield packet
            elif stream or len(empty) == _MAX_EMPTY:
                # The end, which a reader cannot tell from empty messages before it.
                return
            else:
                empty.append(packet)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)


def _packet(data: bytes, control: Sequence[tuple[int, int, bytes]]) -> Packet:
    sender, fds = None, array.array("i")
    for _, kind, content in control:
        if kind == SCM_CREDENTIALS:
            sender = UCRED.unpack(content)
        elif kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) // _FD_SIZE * _FD_SIZE])
        elif kind == SCM_PIDFD:
            _close(array.array("i", content))
    return Packet(data, sender, tuple(fds))


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _last_start(sock: socket.socket, offset: int, size: int) -> int:
    """Where the last of the buffers begins that the kernel holds `size` bytes of a stream in; it is not told.

    Each is copied as a whole or not at all: with one byte less of room than needed the last one is left out.
    """
    page = mmap.PAGESIZE
    room = (size + page - 1) // page * page
    with mmap.mmap(-1, room + page) as area, memoryview(area) as view:
        native.syscall("mprotect", native.address_of(view) + room, page, 0)  # PROT_NONE
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
        with view[room - size + 1 :] as target:
            try:
                return sock.recv_into(target, size, _PEEK)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    return 0
                raise


def send(
    sock: socket.socket,
    data: bytes,
    sender: Sequence[int] = (),
    fds: Sequence[int] = (),
    name: bytes | str | None = None,
) -> None:
    """Send a message.

    Args:
        sender: as whom: PID, UID, GID.
        name: of the receiver, unless the socket is connected.

    Raises:
        RestoreError: there is no room for it.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    control = [*rights, *([(socket.SOL_SOCKET, SCM_CREDENTIALS, UCRED.pack(*sender))] if sender else [])]
    # What fitted at the source must fit here. The real size is set afterwards.
    sockopts.force_buffers(sock, _ALL_ROOM, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
    sent = -1
    with contextlib.suppress(BlockingIOError):
        try:
            sent = sock.sendmsg([data], control, socket.MSG_DONTWAIT, name)
        except ProcessLookupError:
            # The sender has ended: what is left of it is the message.
            sent = sock.sendmsg([data], rights, socket.MSG_DONTWAIT, name)
    if sent != len(data):
        raise RestoreError(f"unix socket: {len(data)} bytes do not fit into its queue")
