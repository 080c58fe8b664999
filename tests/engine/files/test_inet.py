"""TCP and UDP sockets: listeners, bound and unbound ones, options, and what is refused."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Callable

import pytest

from phaul.engine.state.files import sockopts
from phaul.errors import CannotMove, ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import file_entry
from phaul.images.pb.inventory_pb2 import inventory_entry
from tests.engine.files.holding import Copy, Holder, Options

pytestmark = pytest.mark.root
Info = Callable[[int], dict[str, str]]

OPTIONS = {
    "reuseaddr": (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    "reuseport": (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    "oobinline": (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
    "sndbuf": (socket.SOL_SOCKET, socket.SO_SNDBUF, 30_000),
    "rcvbuf": (socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000),
    "priority": (socket.SOL_SOCKET, socket.SO_PRIORITY, 3),
    "mark": (socket.SOL_SOCKET, socket.SO_MARK, 77),
    "rcvlowat": (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 5),
    "dontroute": (socket.SOL_SOCKET, socket.SO_DONTROUTE, 1),
    "broadcast": (socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
    "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    "cork": (socket.IPPROTO_TCP, socket.TCP_CORK, 1),
    "keepidle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 123),
    "keepintvl": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 45),
    "keepcnt": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
    "tos": (socket.IPPROTO_IP, socket.IP_TOS, 0x10),
    "ttl": (socket.IPPROTO_IP, socket.IP_TTL, 33),
    "freebind": (socket.IPPROTO_IP, 15, 1),
}
STRUCTS = {
    "linger": (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7)),
    "rcvtimeo": (socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 500_000)),
    "sndtimeo": (socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("qq", 0, 250_000)),
    "device": (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0"),
}


def opened(copy: Copy, fd: int) -> socket.socket:
    """Our copy of a socket, as an object of its own."""
    return socket.socket(fileno=os.dup(copy[fd]))


def give(holder: Holder, sock: socket.socket) -> int:
    fd = sock.detach()
    holder.give(fd)
    return fd


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_listener(holder: Holder, fdinfo: Info, family: int, host: str) -> None:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setblocking(False)
    listener.bind((host, 0))
    listener.listen(17)
    address, flags = listener.getsockname(), fdinfo(listener.fileno())
    fd = give(holder, listener)
    holder.preflight()

    copy = holder.copy()

    assert fdinfo(copy[fd]) == flags
    with opened(copy, fd) as here, socket.create_connection(address[:2]) as client:
        assert here.getsockname() == address
        assert here.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
        info = here.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        assert struct.unpack_from("I", info, 28)[0] == 17
        connection, _ = here.accept()
        with connection:
            client.sendall(b"hello")
            assert connection.recv(10) == b"hello"


@pytest.mark.parametrize("only", [0, 1])
def test_v6only(holder: Holder, only: int) -> None:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    sock.bind(("::", 0))
    port = sock.getsockname()[1]
    sock.listen(1)
    fd = give(holder, sock)
    copy = holder.copy()
    with opened(copy, fd) as here:
        assert here.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == only
        assert here.getsockname()[1] == port
        with socket.socket() as four:
            if only:
                with pytest.raises(ConnectionRefusedError):
                    four.connect(("127.0.0.1", port))
            else:
                four.connect(("127.0.0.1", port))


@pytest.mark.parametrize("state", ["new", "bound", "listening"])
def test_all_options_of_a_tcp_socket(holder: Holder, state: str) -> None:
    sock = socket.socket()
    for level, option, value in OPTIONS.values():
        sock.setsockopt(level, option, value)
    for level, option, content in STRUCTS.values():
        sock.setsockopt(level, option, content)
    if state != "new":
        sock.bind(("127.0.0.1", 0))
    if state == "listening":
        sock.listen(3)
    name = sock.getsockname()
    numbers = {key: sock.getsockopt(level, option) for key, (level, option, _) in OPTIONS.items()}
    structs = {key: sock.getsockopt(level, option, 16) for key, (level, option, _) in STRUCTS.items()}
    lock = sock.getsockopt(socket.SOL_SOCKET, sockopts.SO_BUF_LOCK)
    fd = give(holder, sock)

    copy = holder.copy()

    with opened(copy, fd) as here:
        assert {key: here.getsockopt(level, option) for key, (level, option, _) in OPTIONS.items()} == numbers
        assert {key: here.getsockopt(level, option, 16) for key, (level, option, _) in STRUCTS.items()} == structs
        assert here.getsockopt(socket.SOL_SOCKET, sockopts.SO_BUF_LOCK) == lock == 3
        assert here.getsockname() == name


def test_the_filter(holder: Holder) -> None:
    # BPF_LD|BPF_H|BPF_ABS, then BPF_RET|BPF_K: the UDP header and 3 bytes of every datagram.
    program = array.array("B", struct.pack("=HBBI", 0x28, 0, 0, 0) + struct.pack("=HBBI", 0x06, 0, 0, 8 + 3))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_ATTACH_FILTER, struct.pack("HxxxxxxQ", 2, program.buffer_info()[0]))
    address = sock.getsockname()
    fd = give(holder, sock)
    copy = holder.copy()
    with opened(copy, fd) as here, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        here.settimeout(5)
        sender.sendto(b"123456", address)
        assert here.recv(100) == b"123"


def test_udp(holder: Holder) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.connect(server.getsockname())
        name = client.getsockname()
        fd = give(holder, client)
        copy = holder.copy()
        with opened(copy, fd) as here:
            assert (here.getsockname(), here.getpeername()) == (name, server.getsockname())
            here.send(b"to the same")
            assert server.recvfrom(100) == (b"to the same", name)


def test_several_listeners_on_one_port(holder: Holder) -> None:
    socks = [socket.socket() for _ in range(3)]
    port = 0
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", port))
        port = sock.getsockname()[1]
        sock.listen()
    fds = [sock.detach() for sock in socks]
    holder.give(*fds)
    copy = holder.copy()
    for fd in fds:
        with opened(copy, fd) as here:
            assert here.getsockname()[1] == port
            assert here.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 1


def connection() -> tuple[socket.socket, socket.socket, socket.socket]:
    """A listener, a client and the accepted end."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    return listener, client, listener.accept()[0]


def test_an_established_connection_is_refused(holder: Holder) -> None:
    listener, client, accepted = connection()
    host, port = client.getpeername()
    fd = give(holder, client)
    with listener, accepted, pytest.raises(CannotMove) as refused:
        holder.preflight()
    assert str(refused.value) == (
        f"fd {fd} of PID {holder.pids[0]}: established TCP connection to {host}:{port}, cannot be moved "
        "(--tcp-established would move it, --tcp-close bring it back closed)"
    )


def test_tcp_close_brings_a_connection_back_closed(holder: Holder) -> None:
    listener, client, accepted = connection()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setblocking(False)
    fd = give(holder, client)
    holder.preflight(Options(tcp_close=True))
    with listener, accepted:
        images, _ = holder.dump(Options(tcp_close=True))
        # The source goes on, untouched.
        accepted.sendall(b"still there")
    with pytest.raises(ImageError, match="inventory is missing"):
        holder.build(images)
    images.add("inventory", inventory_entry(img_version=2, tcp_close=True))
    built = holder.build(images)
    with socket.socket(fileno=os.dup(built.fds[built.tables["fdinfo-1"][fd]])) as here:
        assert here.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert not os.get_blocking(here.fileno())
        assert here.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            here.send(b"x")


def test_a_connection_that_was_reset_holds_no_port(holder: Holder) -> None:
    listener, client, accepted = connection()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    fd = give(holder, accepted)
    holder.preflight()
    with listener:
        copy = holder.copy()  # the listener has the port
    with opened(copy, fd) as here:
        assert here.recv(1) == b""


def test_connections_not_yet_accepted_are_refused(holder: Holder) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    with socket.create_connection(address), socket.create_connection(address):
        fd = give(holder, listener)
        with pytest.raises(CannotMove, match=r"2 TCP connections to 127.0.0.1:.* not yet accepted"):
            holder.preflight()
        copy = holder.copy(Options(tcp_close=True))
    with opened(copy, fd) as here, socket.create_connection(address) as client:
        accepted, name = here.accept()
        accepted.close()
        assert name == client.getsockname()


def test_a_port_that_is_taken_is_named(holder: Holder) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    give(holder, listener)
    images, _ = holder.dump()
    with pytest.raises(RestoreError, match=f"TCP {host}:{port}: another process of this host has this port"):
        holder.build(images)


def test_an_address_that_is_not_here_is_named(holder: Holder) -> None:
    give(holder, socket.create_server(("127.0.0.1", 0)))
    images, _ = holder.dump()
    for message in images.messages("files", file_entry):
        if message.HasField("isk"):
            message.isk.src_addr[0] = struct.unpack("=I", socket.inet_aton("198.51.100.1"))[0]
    with pytest.raises(RestoreError, match=r"TCP 198.51.100.1:\d+: this host does not have this address"):
        holder.build(images)
