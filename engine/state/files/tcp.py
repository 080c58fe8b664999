"""The state of a TCP connection: sequence numbers, windows, queues, ends that are shut. Not a kind of file.

All by repair mode (TCP_REPAIR, net/ipv4/tcp.c), in which a socket tells its numbers, takes others, fills its queues
and closes without a word to the peer. The peer must not be heard meanwhile: phaul.engine.netlock.

A program whose socket is in repair mode gets errors, and our death does not end that mode. So at the source a child
of ours reads the sockets, which lives on for the few microseconds that each takes when we die. For the
end of the source tree we hold duplicates of its sockets: they outlive the tree, go into repair mode then, and
are closed silently.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import signal
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from phaul.engine.netlock import PASS_MARK, Connection, NetworkLock
from phaul.engine.sockdiag import TCP_ESTABLISHED
from phaul.engine.state.files import sockopts
from phaul.engine.state.files.base import Custody
from phaul.errors import DumpError, ImageError, RestoreError
from phaul.images.pb.tcp_stream_pb2 import tcp_stream_entry

# linux/tcp.h, linux/sockios.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 24, 29
REPAIR_ON, REPAIR_OFF, REPAIR_OFF_SILENT = 1, 0, -1
NO_QUEUE, RECV_QUEUE, SEND_QUEUE = 0, 1, 2
OPTION_MSS, OPTION_WSCALE, OPTION_SACK, OPTION_TIMESTAMP = 2, 3, 4, 8
INFO_TIMESTAMPS, INFO_SACK, INFO_WSCALE = 1, 2, 4
SIOCINQ, SIOCOUTQ, SIOCOUTQNSD = 0x541B, 0x5411, 0x894B

# net/tcp_states.h
TCP_SYN_SENT, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING = 2, 4, 5, 8, 9, 11
# Our FIN is in the send queue, before or after the peer's has come; the peer's has come.
FIN_FIRST: Final = (TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSING)
FIN_SENT: Final = (*FIN_FIRST, TCP_LAST_ACK)
FIN_RECEIVED: Final = (TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING)
STATES: Final = (TCP_ESTABLISHED, TCP_SYN_SENT, TCP_CLOSE_WAIT, *FIN_SENT)
"""States of connections that can be moved."""

_INFO = struct.Struct("6B")  # tcp_info: state, 4 others, options; then wscales: snd in the low bits
_WINDOW = struct.Struct("5I")  # tcp_repair_window
_OPTION = struct.Struct("2I")  # tcp_repair_opt
_U32 = struct.Struct("I")
_TCP_HEADER = struct.Struct("!HHIIBBHHH")
_FIN, _ACK = 0x01, 0x10
_CHUNK: Final = 1 << 16
_MSS_MIN, _MSS_MAX = 88, 32767  # of setsockopt(TCP_MAXSEG)
_ARRIVAL: Final = 2.0  # seconds for a segment to come through the loopback device


def _set(sock: socket.socket, option: int, value: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _size(sock: socket.socket, request: int) -> int:
    return int(_U32.unpack(fcntl.ioctl(sock, request, bytes(_U32.size)))[0])


def _word(value: int) -> int:
    return value & 0xFFFFFFFF


# Dump.


class _NotReadable(Exception):
    """Why a connection cannot be moved."""


def _queue(sock: socket.socket, queue: int, length: int) -> tuple[int, bytes]:
    """Sequence number at the end of a queue, and its bytes; in repair mode."""
    _set(sock, TCP_REPAIR_QUEUE, queue)
    (seq,) = _U32.unpack(sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, _U32.size))
    # One more than there is: a short answer is one that was cut.
    data = sock.recv(length + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT) if length else b""
    if len(data) != length:
        raise _NotReadable(
            f"TCP connection of whose {length} bytes in a queue only {len(data)} can be read (urgent data?)"
        )
    return seq, data


def _read_repaired(sock: socket.socket) -> tuple[tcp_stream_entry, bytes]:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size + 1)
    state, *_, options = _INFO.unpack_from(info)
    if state not in STATES:
        raise _NotReadable(f"TCP connection in state {state}")
    received, unacked, unsent = (_size(sock, request) for request in (SIOCINQ, SIOCOUTQ, SIOCOUTQNSD))
    if state in FIN_SENT:  # a FIN counts as a byte, but is none
        unacked, unsent = max(unacked - 1, 0), max(unsent - 1, 0)
    inq_seq, inq = _queue(sock, RECV_QUEUE, received)
    outq_seq, outq = _queue(sock, SEND_QUEUE, unacked)
    window = _WINDOW.unpack(sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, _WINDOW.size))
    entry = tcp_stream_entry(
        inq_len=received,
        inq_seq=inq_seq,
        outq_len=unacked,
        outq_seq=outq_seq,
        unsq_len=unsent,
        opt_mask=options,
        snd_wscale=0,
        mss_clamp=sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG),
    )
    if options & INFO_WSCALE:
        entry.snd_wscale, entry.rcv_wscale = info[_INFO.size] & 15, info[_INFO.size] >> 4
    if options & INFO_TIMESTAMPS:
        entry.timestamp = _U32.unpack(sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, _U32.size))[0]
    entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup = window
    return entry, inq + outq


def _read(sock: socket.socket) -> tuple[bytes, bytes] | str:
    """The encoded entry and both queues; or why not. The socket is left as it was found."""
    reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    try:
        _set(sock, TCP_REPAIR, REPAIR_ON)
        try:
            entry, queues = _read_repaired(sock)
        finally:
            _set(sock, TCP_REPAIR, REPAIR_OFF_SILENT)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)  # the mode has changed it
    except _NotReadable as error:
        return str(error)
    except OSError as error:
        return f"TCP connection, cannot be read: {error.strerror}"
    return entry.SerializeToString(), queues


def read_all(socks: Sequence[socket.socket]) -> list[tuple[bytes, bytes] | str]:
    """Encoded tcp_stream_entry and queues (to be read first, then to be sent) of each; or the reason why not.

    The programs must be stopped and the connections locked.
    """
    result, told = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        child = os.fork()
        if child == 0:
            try:
                os.close(result)  # else nobody would tell the child that we have died
                os.setsid()
                with open(told, "wb") as pipe:
                    pickle.dump([_read(sock) for sock in socks], pipe)
            finally:
                os._exit(0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(told)
    with open(result, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        raise DumpError("the state of TCP connections cannot be read")
    found: list[tuple[bytes, bytes] | str] = pickle.loads(data)
    return found


class Held(Custody):
    """The connections of a stopped tree: locked, and held by duplicates of their sockets, until its fate is known."""

    def __init__(self, connections: Sequence[Connection], lock: bool) -> None:
        self.socks: list[socket.socket] = []
        self._lock = NetworkLock(connections) if lock else None

    def hold(self) -> None:
        if self._lock:
            self._lock.outlive()

    def thaw(self) -> None:
        self._close()
        if self._lock:
            self._lock.release()

    def kill(self) -> None:
        for sock in self.socks:
            with contextlib.suppress(OSError):
                _set(sock, TCP_REPAIR, REPAIR_ON)
        self.leave()

    def leave(self) -> None:
        self._close()
        if self._lock:
            self._lock.leave()

    def _close(self) -> None:
        while self.socks:
            self.socks.pop().close()


# Restore.


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment without data that seems to come from the peer, for one of our own sockets."""

    connection: Connection
    flags: int
    seq: int
    ack: int
    window: int

    def send(self) -> None:
        """Raw, over the loopback device, past the lock."""
        local, peer = self.connection.addresses()
        ends = peer.packed + local.packed
        ports = self.connection.peer_port, self.connection.local_port
        fields = [*ports, _word(self.seq), _word(self.ack), 5 << 4, self.flags, self.window, 0, 0]
        length = _TCP_HEADER.size
        pseudo = ends + struct.pack("!II", length, socket.IPPROTO_TCP)
        fields[7] = _checksum(pseudo + _TCP_HEADER.pack(*fields))
        if local.version == 4:
            family, header = (
                socket.AF_INET,
                struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, socket.IPPROTO_TCP, 0),
            )
        else:
            family, header = socket.AF_INET6, struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64)
        packet = header + ends + _TCP_HEADER.pack(*fields)
        with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PASS_MARK)
            raw.sendto(packet, (str(local), 0))


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _fill(sock: socket.socket, data: bytes) -> None:
    view, chunk = memoryview(data), _CHUNK
    while view:
        try:
            view = view[sock.send(view[:chunk]) :]
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN) or chunk < 1024:
                raise
            chunk //= 2  # the kernel wants a linear piece of memory for each


class Rebuilt:
    """One connection that is being rebuilt, in repair mode until `release`.

    Args:
        state: of STATES.
        inq, outq: what is to be read, what the peer has not acknowledged.
    """

    def __init__(
        self, sock: socket.socket, connection: Connection, state: int, stream: tcp_stream_entry, queues: bytes
    ) -> None:
        if not stream.HasField("unsq_len") or stream.unsq_len > stream.outq_len:
            raise ImageError("tcp-stream: the length of the unsent data is missing or impossible")
        self.sock, self.connection, self.state, self.stream = sock, connection, state, stream
        self.inq, self.outq = queues[: stream.inq_len], queues[stream.inq_len :]
        # Where the queues begin and end, FINs left out.
        self.inq_end = stream.inq_seq - (state in FIN_RECEIVED)
        self.outq_end = stream.outq_seq - (state in FIN_SENT)
        self.outq_begin = self.outq_end - stream.outq_len

    def bind(self, address: tuple[Any, ...]) -> None:
        """Enter repair mode, which may bind to an address and port whoever else has them."""
        _set(self.sock, TCP_REPAIR, REPAIR_ON)
        self.sock.bind(address)

    def connect(self, peer: tuple[Any, ...]) -> None:
        """Connect without a packet, and put all state back."""
        sock, stream = self.sock, self.stream
        sock.setblocking(False)
        self._set_seq(RECV_QUEUE, self.inq_end - stream.inq_len)
        self._set_seq(SEND_QUEUE, self.outq_begin - (self.state == TCP_SYN_SENT))
        if self.state == TCP_SYN_SENT:
            _set(sock, TCP_REPAIR, REPAIR_OFF_SILENT)
            with contextlib.suppress(BlockingIOError):
                sock.connect(peer)
            _set(sock, TCP_REPAIR, REPAIR_ON)
            self._set_timestamp()
            return
        # What the queues held there they must hold here; the sizes of the image come afterwards.
        send, receive = (
            max(sock.getsockopt(socket.SOL_SOCKET, option), 4 * len(data) + _CHUNK)
            for option, data in ((socket.SO_SNDBUF, self.outq), (socket.SO_RCVBUF, self.inq))
        )
        sockopts.force_buffers(sock, send, receive)
        # TCP_REPAIR_OPTIONS sets the MSS, but the kernel would go on with segments for a peer that has told none.
        _set(sock, socket.TCP_MAXSEG, max(_MSS_MIN, min(stream.mss_clamp, _MSS_MAX)))
        sock.connect(peer)
        _set(sock, socket.TCP_MAXSEG, 0)
        self._set_options()
        self._set_timestamp()
        self._fill_queues()
        self._set_ends()
        _set(sock, TCP_REPAIR_QUEUE, NO_QUEUE)

    def _set_seq(self, queue: int, seq: int) -> None:
        _set(self.sock, TCP_REPAIR_QUEUE, queue)
        self.sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, _U32.pack(_word(seq)))

    def _set_options(self) -> None:
        stream = self.stream
        options = [(OPTION_MSS, stream.mss_clamp)]
        if stream.opt_mask & INFO_SACK:
            options.append((OPTION_SACK, 0))
        if stream.opt_mask & INFO_WSCALE:
            options.append((OPTION_WSCALE, stream.snd_wscale | stream.rcv_wscale << 16))
        if stream.opt_mask & INFO_TIMESTAMPS:
            options.append((OPTION_TIMESTAMP, 0))
        self.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, b"".join(_OPTION.pack(*item) for item in options))

    def _set_timestamp(self) -> None:
        if self.stream.opt_mask & INFO_TIMESTAMPS:
            self.sock.setsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, _U32.pack(self.stream.timestamp))

    def _fill_queues(self) -> None:
        sock = self.sock
        _set(sock, TCP_REPAIR_QUEUE, RECV_QUEUE)
        _fill(sock, self.inq)
        sent = len(self.outq) - self.stream.unsq_len
        _set(sock, TCP_REPAIR_QUEUE, SEND_QUEUE)
        _fill(sock, self.outq[:sent])
        if self.stream.unsq_len:
            # The window is still 0: it stays unsent.
            _set(sock, TCP_REPAIR, REPAIR_OFF_SILENT)
            _fill(sock, self.outq[sent:])
            _set(sock, TCP_REPAIR, REPAIR_ON)

    def _set_ends(self) -> None:
        stream = self.stream
        if self.state in FIN_FIRST:
            self._shut()
        if stream.HasField("snd_wnd"):
            wup = stream.rcv_wup if _word(self.inq_end - stream.rcv_wup) < 1 << 31 else _word(self.inq_end)
            window = (stream.snd_wl1, stream.snd_wnd, stream.max_window, stream.rcv_wnd, wup)
            self.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, _WINDOW.pack(*window))
        _set(self.sock, TCP_REPAIR_QUEUE, NO_QUEUE)
        if self.state in FIN_RECEIVED:
            self._receive(_FIN | _ACK, self.inq_end, self.outq_begin)
        if self.state == TCP_LAST_ACK:
            self._shut()
        if self.state == TCP_FIN_WAIT2:
            self._receive(_ACK, self.inq_end, stream.outq_seq)
        deadline = time.monotonic() + _ARRIVAL
        while (found := state_of(self.sock)) != self.state:
            if time.monotonic() > deadline:
                raise RestoreError(f"TCP connection came to state {found}, not {self.state}")
            time.sleep(0.001)

    def _shut(self) -> None:
        """Our FIN: sent, though the peer does not get it; or, behind unsent data, to be sent."""
        _set(self.sock, TCP_REPAIR_QUEUE, NO_QUEUE if self.stream.unsq_len else SEND_QUEUE)
        self.sock.shutdown(socket.SHUT_WR)

    def _receive(self, flags: int, seq: int, ack: int) -> None:
        window = min(self.stream.snd_wnd >> self.stream.snd_wscale, 0xFFFF)
        Segment(self.connection, flags, seq, ack, window).send()

    def release(self, reuse: int, nodelay: int) -> None:
        """The connection lives: the peer is told where we are, and unsent data goes."""
        _set(self.sock, TCP_REPAIR, REPAIR_OFF)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        _set(self.sock, socket.TCP_NODELAY, 1)  # to set it also sends what waits
        _set(self.sock, socket.TCP_NODELAY, nodelay)


def state_of(sock: socket.socket) -> int:
    """TCP_* (net/tcp_states.h)."""
    state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state
