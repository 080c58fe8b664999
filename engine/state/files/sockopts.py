"""Options that all sockets have (SOL_SOCKET), both directions. Not a kind of file."""

from __future__ import annotations

import array
import contextlib
import errno
import socket
import stat
import struct
from collections.abc import Iterator
from typing import Any, Final

from phaul.engine import native
from phaul.engine.state.files.base import OpenFile
from phaul.errors import RestoreError
from phaul.images.pb.sk_opts_pb2 import sk_opts_entry

# asm-generic/socket.h; the socket module does not have them.
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
SO_BSDCOMPAT_NO_CHECK: Final = 11
SO_PASSSEC: Final = 34
SO_BUF_LOCK: Final = 72
SO_ATTACH_FILTER: Final = 26  # to read it back: SO_GET_FILTER, the same number

_TIMEVAL = struct.Struct("qq")
_LINGER = struct.Struct("ii")
_FPROG = struct.Struct("HxxxxxxQ")
_FILTER = struct.Struct("=HBBI")  # sock_filter: code, jt, jf, k
_FILTER_IN_IMAGE = struct.Struct(">HBBI")  # one u64 each, the code in the high bits

# Options that are one number. Those that must be set before bind(2) come first.
NUMBERS: Final = (
    ("reuseaddr", socket.SO_REUSEADDR),
    ("so_reuseport", socket.SO_REUSEPORT),
    ("so_priority", socket.SO_PRIORITY),
    ("so_rcvlowat", socket.SO_RCVLOWAT),
    ("so_mark", socket.SO_MARK),
    ("so_passcred", socket.SO_PASSCRED),
    ("so_passsec", SO_PASSSEC),
    ("so_dontroute", socket.SO_DONTROUTE),
    ("so_no_check", SO_BSDCOMPAT_NO_CHECK),
    ("so_broadcast", socket.SO_BROADCAST),
    ("so_keepalive", socket.SO_KEEPALIVE),
    ("so_oobinline", socket.SO_OOBINLINE),
)
_NOT_THERE = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL)


def is_socket(file: OpenFile, *families: int) -> bool:
    """Whether a file is a socket of one of these families."""
    return stat.S_ISSOCK(file.stat.st_mode) and file.link.startswith("socket:") and file.socket.family in families


@contextlib.contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket object on a descriptor that somebody else closes."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def get_number(sock: socket.socket, level: int, option: int) -> int | None:
    """An option that is one number; None if the socket does not have it."""
    try:
        return sock.getsockopt(level, option)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise


def set_number(sock: socket.socket, level: int, option: int, value: int) -> None:
    """Set an option unless it has the value already (some need a privilege to be set at all)."""
    if get_number(sock, level, option) != value:
        sock.setsockopt(level, option, value)


def fill_numbers(message: Any, sock: socket.socket, level: int, options: tuple[tuple[str, int], ...]) -> None:
    """Read options into the fields of a message."""
    for name, option in options:
        value = get_number(sock, level, option)
        if value is not None:
            setattr(message, name, value)


def apply_numbers(message: Any, sock: socket.socket, level: int, options: tuple[tuple[str, int], ...]) -> None:
    """Set the options that a message holds."""
    for name, option in options:
        if message.HasField(name):
            set_number(sock, level, option, int(getattr(message, name)))


def _filter(file: OpenFile) -> list[int]:
    # By hand: the length counts instructions, the buffer gets eight bytes for each.
    length = array.array("I", [0])
    arguments = (file.dup(), socket.SOL_SOCKET, SO_ATTACH_FILTER)
    try:
        native.syscall("getsockopt", *arguments, 0, length.buffer_info()[0])
        code = array.array("Q", bytes(_FILTER.size * length[0]))
        native.syscall("getsockopt", *arguments, code.buffer_info()[0], length.buffer_info()[0])
    except PermissionError as error:
        raise file.refuse("socket with a filter that only the kernel knows, cannot be moved") from error
    return [int.from_bytes(_FILTER_IN_IMAGE.pack(*instruction), "big") for instruction in _FILTER.iter_unpack(code)]


def dump_options(file: OpenFile) -> sk_opts_entry:
    """Read what sk_opts_entry can hold from a socket.

    Raises:
        CannotMove: it has a filter that cannot be read.
    """
    sock = file.socket
    receive, send = (
        _TIMEVAL.unpack(sock.getsockopt(socket.SOL_SOCKET, option, _TIMEVAL.size))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
    )
    options = sk_opts_entry(
        so_sndbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        so_rcvbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
        so_snd_tmo_sec=send[0],
        so_snd_tmo_usec=send[1],
        so_rcv_tmo_sec=receive[0],
        so_rcv_tmo_usec=receive[1],
        so_filter=_filter(file),
    )
    fill_numbers(options, sock, socket.SOL_SOCKET, (*NUMBERS, ("so_buf_lock", SO_BUF_LOCK)))
    linger, seconds = _LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.size))
    if linger:
        options.so_linger = seconds
    device = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
    if device:
        options.so_bound_dev = device.decode()
    return options


def force_buffers(sock: socket.socket, send: int, receive: int) -> None:
    """Set buffer sizes as getsockopt(2) tells them, also beyond the limits of the host where we may."""
    for force, plain, size in (
        (SO_SNDBUFFORCE, socket.SO_SNDBUF, send),
        (SO_RCVBUFFORCE, socket.SO_RCVBUF, receive),
    ):
        if sock.getsockopt(socket.SOL_SOCKET, plain) == size:
            continue
        # The kernel doubles what it is given.
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, size // 2)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size // 2)


def apply_bind_options(sock: socket.socket, options: sk_opts_entry) -> None:
    """Set what has to be set before bind(2)."""
    if options.so_bound_dev:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, options.so_bound_dev.encode() + b"\0")
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise RestoreError(f"socket bound to network device {options.so_bound_dev}: not here") from error
            raise
    apply_numbers(options, sock, socket.SOL_SOCKET, NUMBERS[:2])


def apply_options(sock: socket.socket, options: sk_opts_entry) -> None:
    """Set all options of an image."""
    force_buffers(sock, options.so_sndbuf, options.so_rcvbuf)
    if options.HasField("so_buf_lock"):
        with contextlib.suppress(OSError):  # since Linux 5.14
            set_number(sock, socket.SOL_SOCKET, SO_BUF_LOCK, options.so_buf_lock)
    apply_numbers(options, sock, socket.SOL_SOCKET, NUMBERS)
    for option, seconds, microseconds in (
        (socket.SO_RCVTIMEO, options.so_rcv_tmo_sec, options.so_rcv_tmo_usec),
        (socket.SO_SNDTIMEO, options.so_snd_tmo_sec, options.so_snd_tmo_usec),
    ):
        if seconds or microseconds:
            sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, microseconds))
    if options.HasField("so_linger"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(1, options.so_linger))
    if options.so_filter:
        code = array.array("B")
        for word in options.so_filter:
            code.frombytes(_FILTER.pack(*_FILTER_IN_IMAGE.unpack(word.to_bytes(8, "big"))))
        program = _FPROG.pack(len(options.so_filter), code.buffer_info()[0])
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
