"""Whole buffers over a blocking socket, with a deadline for *no progress*.

The deadline is the kernel's (SO_SNDTIMEO, SO_RCVTIMEO; socket(7)), so the socket stays in
blocking mode: one system call moves megabytes with the GIL released, where Python's own socket
timeouts would poll before each partial transfer.
"""

from __future__ import annotations

import socket
import struct
import time

from phaul.errors import PeerError

_TIMEVAL = struct.Struct("@ll")


def set_stall_timeout(sock: socket.socket, seconds: float) -> None:
    """Make the socket blocking; a call that moves no byte for `seconds` then fails."""
    sock.setblocking(True)
    whole = int(seconds)
    timeval = _TIMEVAL.pack(whole, int((seconds - whole) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def send_all(sock: socket.socket, data: memoryview | bytes) -> None:
    """Send all of `data`.

    Raises:
        PeerError: the connection broke, or nothing moved for the stall timeout.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            raise PeerError("the other side takes no more data") from None
        except OSError as error:
            raise PeerError(f"connection lost while sending: {error.strerror}") from error


def recv_exactly(sock: socket.socket, view: memoryview, idle_timeout: float = 0.0) -> None:
    """Fill `view`.

    Args:
        sock: prepared by `set_stall_timeout`.
        view: where the bytes go.
        idle_timeout: seconds that may pass before the *first* byte, when longer than the
            stall timeout: the other side may have nothing to say for a while.

    Raises:
        PeerError: the connection ended or broke, or nothing came for the timeout.
    """
    got = 0
    idle_until = time.monotonic() + idle_timeout
    while got < len(view):
        try:
            count = sock.recv_into(view[got:], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            if got or time.monotonic() >= idle_until:
                raise PeerError("the other side has gone silent") from None
            continue
        except OSError as error:
            raise PeerError(f"connection lost while receiving: {error.strerror}") from error
        if not count:
            raise PeerError("the other side closed the connection too early")
        got += count
