"""IPv4 and IPv6 sockets: TCP and UDP.

A TCP connection is refused unless it may be moved (--tcp-established): then phaul.engine.state.files.tcp reads and
rebuilds it; or may come back closed (--tcp-close): then it is dumped with its state and addresses, as CRIU does, and
restored as a socket that is not connected. inventory.img says so (`tcp_close`). Datagrams that wait in a UDP socket
are dropped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

from phaul.engine import netlock
from phaul.engine.netlock import Connection
from phaul.engine.sockdiag import TCP_CLOSE, TCP_ESTABLISHED, TCP_LISTEN
from phaul.engine.state.files import sockopts, tcp
from phaul.engine.state.files.base import (
    FileBuild,
    FileDump,
    FileKind,
    FileOptions,
    OpenFile,
    OpenFiles,
    allow_many_files,
)
from phaul.errors import ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.inventory_pb2 import inventory_entry
from phaul.images.pb.sk_inet_pb2 import inet_sk_entry, ip_opts_entry
from phaul.images.pb.sk_opts_pb2 import sk_shutdown
from phaul.images.pb.tcp_stream_pb2 import tcp_opts_entry, tcp_stream_entry

FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
SUPPORTED: Final = ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP))
UDP_CORK: Final = 1
IP_FREEBIND, IP_PKTINFO = 15, 8
IPV6_FREEBIND: Final = 78

# struct tcp_info: state, then 7 bytes and 4 words before unacked (of a listener: connections not yet accepted)
# and sacked (of a listener: the backlog).
_TCP_INFO = struct.Struct("B7x16x2I")
# Further on: how many segments have come in.
_TCP_SEGMENTS_IN = struct.Struct("140xI")

_TCP_NUMBERS: Final = (
    ("cork", socket.TCP_CORK),
    ("nodelay", socket.TCP_NODELAY),
    ("keepcnt", socket.TCP_KEEPCNT),
    ("keepidle", socket.TCP_KEEPIDLE),
    ("keepintvl", socket.TCP_KEEPINTVL),
)
_IP_NUMBERS: Final[dict[int, tuple[int, tuple[tuple[str, int], ...]]]] = {
    socket.AF_INET: (
        socket.IPPROTO_IP,
        (("freebind", IP_FREEBIND), ("pktinfo", IP_PKTINFO), ("tos", socket.IP_TOS), ("ttl", socket.IP_TTL)),
    ),
    socket.AF_INET6: (
        socket.IPPROTO_IPV6,
        (("freebind", IPV6_FREEBIND), ("pktinfo", socket.IPV6_RECVPKTINFO)),
    ),
}


def _words(family: int, host: str) -> list[int]:
    """An address as the image has it: 32-bit words in network byte order."""
    packed = socket.inet_pton(family, host.partition("%")[0])
    return list(struct.unpack(f"={len(packed) // 4}I", packed))


def _host(entry: inet_sk_entry, words: Any) -> str:
    if len(words) != (1 if entry.family == socket.AF_INET else 4):
        raise ImageError(f"files: socket {entry.id} has an address of {len(words)} words")
    return socket.inet_ntop(entry.family, struct.pack(f"={len(words)}I", *words))


def _show(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tcp_info(sock: socket.socket) -> tuple[int, int, int]:
    """State, connections not yet accepted, backlog."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    state, unacked, sacked = _TCP_INFO.unpack(info)
    return state, unacked, sacked


def _has_ended(sock: socket.socket) -> bool:
    """Whether a TCP socket that is not connected once was. getsockname(2) then tells a port that it has no longer."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_SEGMENTS_IN.size)
    (segments,) = _TCP_SEGMENTS_IN.unpack(info)
    return bool(segments)


def _peer(file: OpenFile) -> tuple[str, int] | None:
    sock = file.socket
    try:
        address = sock.getpeername()
    except OSError:
        if sock.proto == socket.IPPROTO_TCP and tcp.state_of(sock) == tcp.TCP_SYN_SENT:
            return _awaited_peer(file)
        return None
    return address[0], address[1]


def _awaited_peer(file: OpenFile) -> tuple[str, int] | None:
    """Whom connect(2) is waiting for; getpeername(2) does not tell."""
    family = file.socket.family
    with open(f"/proc/{file.pid}/net/tcp{'6' if family == socket.AF_INET6 else ''}") as table:
        for line in table:
            columns = line.split()
            if columns[9] == str(file.stat.st_ino):
                host, _, port = columns[2].partition(":")
                words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
                return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)), int(port, 16)
    return None


class InetSockets(FileKind):
    """AF_INET and AF_INET6."""

    name = "TCP or UDP socket"
    type = fd_types.INETSK
    field = "isk"

    def claims(self, file: OpenFile) -> bool:
        return sockopts.is_socket(file, *FAMILIES) and (file.socket.type, file.socket.proto) in SUPPORTED

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        sock = file.socket
        if sock.proto == socket.IPPROTO_UDP:
            if sock.getsockopt(socket.IPPROTO_UDP, UDP_CORK):
                raise file.refuse("UDP socket that holds back data (UDP_CORK), cannot be moved")
            return
        state, waiting, _ = _tcp_info(sock)
        if options.tcp_close or state == TCP_CLOSE:
            return
        if state == TCP_LISTEN:
            if waiting and not options.skip_in_flight:
                at = _show(*sock.getsockname()[:2])
                way_out = "(--skip-in-flight and --tcp-close would leave them behind)"
                raise file.refuse(f"{waiting} TCP connections to {at} not yet accepted, cannot be moved {way_out}")
            return
        peer = _peer(file)
        to = f" to {_show(*peer)}" if peer else ""
        what = "established TCP connection" if state == TCP_ESTABLISHED else "TCP connection that opens or ends"
        if not options.tcp_established:
            way_out = "(--tcp-established would move it, --tcp-close bring it back closed)"
            raise file.refuse(f"{what}{to}, cannot be moved {way_out}")
        if state not in tcp.STATES or not peer:
            raise file.refuse(f"{what}{to}, cannot be moved in its state {state}")
        if options.network_lock and not netlock.available():
            needs = "to hold back its packets the package nftables is needed (or --network-lock skip)"
            raise file.refuse(f"{what}{to}, cannot be moved: {needs}")

    def begin(self, files: Sequence[OpenFile], dump: FileDump) -> None:
        if not dump.options.tcp_established or dump.options.tcp_close:
            return
        connections: dict[OpenFile, Connection] = {}
        for file in files:
            sock = file.socket
            peer = _peer(file)
            if sock.proto == socket.IPPROTO_TCP and tcp.state_of(sock) in tcp.STATES and peer:
                host, port, *_ = sock.getsockname()
                connections[file] = Connection(host, port, *peer)
            file.close()
        if not connections:
            return
        allow_many_files(2 * len(connections))
        held = tcp.Held(list(connections.values()), dump.options.network_lock)
        dump.undo.callback(held.thaw)
        dump.custody.append(held)
        # Not by socket.dup: it would change O_NONBLOCK, which the program has too.
        held.socks += [socket.socket(fileno=os.dup(file.dup())) for file in connections]
        for file, found in zip(connections, tcp.read_all(held.socks), strict=True):
            if isinstance(found, str):
                raise file.refuse(f"{found}, cannot be moved")
            message, queues = found
            name = f"tcp-stream-{file.stat.st_ino & 0xFFFFFFFF:x}"
            dump.images.add(name, tcp_stream_entry.FromString(message), queues)
            file.close()

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        sock = file.socket
        host, port, *_ = sock.getsockname()
        peer = _peer(file)
        entry = inet_sk_entry(
            id=file_id,
            ino=file.stat.st_ino & 0xFFFFFFFF,
            family=sock.family,
            type=sock.type,
            proto=sock.proto,
            state=TCP_ESTABLISHED if peer else TCP_CLOSE,
            src_port=port,
            dst_port=peer[1] if peer else 0,
            flags=file.flags,
            backlog=0,
            src_addr=_words(sock.family, host),
            dst_addr=_words(sock.family, peer[0]) if peer else [0] * (1 if sock.family == socket.AF_INET else 4),
            fown=file.owner(),
            opts=sockopts.dump_options(file),
            ip_opts=ip_opts_entry(),
        )
        sockopts.fill_numbers(entry.ip_opts, sock, *_IP_NUMBERS[sock.family])
        if sock.family == socket.AF_INET6:
            entry.v6only = bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
            scope = sock.getsockname()[3]
            if scope:
                entry.ifname = socket.if_indextoname(scope)
        if sock.proto == socket.IPPROTO_TCP:
            entry.state, _, backlog = _tcp_info(sock)
            if entry.state == TCP_LISTEN:
                entry.backlog = backlog
            elif entry.state == TCP_CLOSE and _has_ended(sock):
                entry.src_port = 0
            entry.tcp_opts.CopyFrom(tcp_opts_entry())
            sockopts.fill_numbers(entry.tcp_opts, sock, socket.IPPROTO_TCP, _TCP_NUMBERS)
        if entry.state in (TCP_CLOSE, TCP_ESTABLISHED, tcp.TCP_FIN_WAIT1, tcp.TCP_FIN_WAIT2):
            self._dump_shutdown(sock, entry)
        return file_entry(type=self.type, id=file_id, isk=entry)

    @staticmethod
    def _dump_shutdown(sock: socket.socket, entry: inet_sk_entry) -> None:
        # The kernel does not tell it, but poll(2) depends on it.
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        if any(events & select.POLLRDHUP for _, events in poll.poll(0)):
            entry.shutdown = sk_shutdown.READ

    def create(self, entry: file_entry, build: FileBuild) -> int:
        isk = entry.isk
        if isk.family not in FAMILIES or (isk.type, isk.proto) not in SUPPORTED:
            raise ImageError(f"files: socket of family {isk.family}, type {isk.type}, protocol {isk.proto}")
        sock = socket.socket(isk.family, isk.type | socket.SOCK_CLOEXEC, isk.proto)
        fd = build.adopt(entry.id, sock.detach())
        with sockopts.borrowed(fd) as borrowed:
            self._restore(isk, borrowed, build)
        return fd

    def _restore(self, isk: inet_sk_entry, sock: socket.socket, build: FileBuild) -> None:
        is_tcp = isk.proto == socket.IPPROTO_TCP
        if isk.HasField("v6only"):
            sockopts.set_number(sock, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(isk.v6only))
        sockopts.apply_bind_options(sock, isk.opts)
        sockopts.apply_numbers(isk.ip_opts, sock, *_IP_NUMBERS[isk.family])
        connected = is_tcp and isk.state not in (TCP_CLOSE, TCP_LISTEN)
        closed = connected and (build.options.tcp_close or build.images.one("inventory", inventory_entry).tcp_close)
        if connected and not closed:
            build.part(_Connections).rebuild(isk, sock)
        elif isk.src_port and not connected:
            self._bind(isk, sock)
        if isk.state == TCP_LISTEN:
            try:
                sock.listen(isk.backlog)
            except OSError as error:
                raise _explained(isk, error) from error
        elif isk.dst_port and not is_tcp:
            sock.connect(_address(isk, _host(isk, isk.dst_addr), isk.dst_port))
        if is_tcp:
            sockopts.apply_numbers(isk.tcp_opts, sock, socket.IPPROTO_TCP, _TCP_NUMBERS)
        sockopts.apply_options(sock, isk.opts)
        if connected:
            # The others of this port are still to be bound.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A connection that is closed for both shows an end of file and EPIPE, not that there never was one.
        how = socket.SHUT_RDWR if closed else isk.shutdown - 1
        if how >= 0:
            with contextlib.suppress(OSError):  # ENOTCONN, but it has been done
                sock.shutdown(how)

    def _bind(self, isk: inet_sk_entry, sock: socket.socket) -> None:
        # Whatever its own setting: connections of the past must not keep the port from us.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(_address(isk, _host(isk, isk.src_addr), isk.src_port))
        except OSError as error:
            raise _explained(isk, error) from error


def _address(isk: inet_sk_entry, host: str, port: int) -> tuple[Any, ...]:
    if isk.family == socket.AF_INET:
        return host, port
    return host, port, 0, socket.if_nametoindex(isk.ifname) if isk.ifname else 0


def _explained(isk: inet_sk_entry, error: OSError) -> RestoreError:
    protocol = "TCP" if isk.proto == socket.IPPROTO_TCP else "UDP"
    where = f"{protocol} {_show(_host(isk, isk.src_addr), isk.src_port)}"
    if error.errno == errno.EADDRINUSE:
        return RestoreError(f"{where}: another process of this host has this port")
    if error.errno == errno.EADDRNOTAVAIL:
        return RestoreError(f"{where}: this host does not have this address")
    return RestoreError(f"{where}: {os.strerror(error.errno or 0)}")


class _Connections:
    """All TCP connections of one restore: locked before the first is rebuilt, in repair mode until the tree runs."""

    def __init__(self, build: FileBuild) -> None:
        if not build.options.tcp_established:
            raise RestoreError("the images hold established TCP connections: allow them by --tcp-established")
        self._images = build.images
        self._rebuilt: list[tuple[inet_sk_entry, tcp.Rebuilt]] = []
        self._socks: list[socket.socket] = []
        sockets = [build.entries[file_id].isk for file_id in build.wanted if build.entries[file_id].HasField("isk")]
        connected = [_connection(isk) for isk in sockets if isk.proto == socket.IPPROTO_TCP and isk.state in tcp.STATES]
        self._lock = netlock.NetworkLock(connected) if build.options.network_lock else None
        build.on_resume(self._resume)
        build.on_abort(self._abort)

    def rebuild(self, isk: inet_sk_entry, sock: socket.socket) -> None:
        """Make a new socket a connection of the image."""
        if isk.state not in tcp.STATES:
            raise ImageError(f"files: TCP connection {isk.id} in state {isk.state}")
        ours = socket.socket(fileno=os.dup(sock.fileno()))
        self._socks.append(ours)
        records = self._images.records(f"tcp-stream-{isk.ino:x}")
        if len(records) != 1:
            raise ImageError(f"tcp-stream-{isk.ino:x}: {len(records)} connections")
        stream, queues = records[0]
        assert isinstance(stream, tcp_stream_entry)
        rebuilt = tcp.Rebuilt(ours, _connection(isk), isk.state, stream, queues)
        try:
            rebuilt.bind(_address(isk, _host(isk, isk.src_addr), isk.src_port))
        except OSError as error:
            raise _explained(isk, error) from error
        rebuilt.connect(_address(isk, _host(isk, isk.dst_addr), isk.dst_port))
        self._rebuilt.append((isk, rebuilt))

    def _resume(self) -> None:
        if self._lock:
            self._lock.release()
        for isk, rebuilt in self._rebuilt:
            rebuilt.release(int(isk.opts.reuseaddr), int(isk.tcp_opts.nodelay))
            rebuilt.sock.close()

    def _abort(self) -> None:
        # Silently: those that may be connected are in repair mode.
        while self._socks:
            self._socks.pop().close()
        if self._lock:
            self._lock.leave()


def _connection(isk: inet_sk_entry) -> Connection:
    return Connection(_host(isk, isk.src_addr), isk.src_port, _host(isk, isk.dst_addr), isk.dst_port)
