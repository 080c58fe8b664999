"""TCP connections through dump and build: one end is moved, the other is ours and notices nothing."""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from random import Random

import pytest

from phaul.engine.netlock import Connection, NetworkLock
from phaul.engine.sockdiag import TCP_ESTABLISHED
from phaul.engine.state import fds
from phaul.engine.state.files import tcp
from phaul.engine.state.files.base import FileBuild
from phaul.errors import CannotMove, ImageError, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.fdinfo_pb2 import file_entry
from phaul.images.pb.inventory_pb2 import inventory_entry
from phaul.images.pb.tcp_stream_pb2 import tcp_stream_entry
from tests.engine.files.holding import Holder, Options

pytestmark = pytest.mark.root

ESTABLISHED = Options(tcp_established=True)
FAMILIES = {
    "v4": (socket.AF_INET, "127.0.0.1"),
    "v6": (socket.AF_INET6, "::1"),
    "mapped": (socket.AF_INET6, "::ffff:127.0.0.1"),
}
BIG = 3 << 20
PORTS: set[str] = set()
"""Of the near ends of all connections of a test."""


def connection(family: str = "v4") -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection over loopback; no listener is left."""
    kind, host = FAMILIES[family]
    with socket.socket(kind) as listener:
        listener.bind((host, 0))
        listener.listen()
        near = socket.socket(kind)
        near.connect(listener.getsockname()[:2])
        far, _ = listener.accept()
    PORTS.add(str(far.getpeername()[1]))
    near.settimeout(10)
    return near, far


def locked() -> list[str]:
    """Addresses of this test's connections whose packets are dropped, each direction once for each table."""
    shown = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"[\w.:]+ \. \d+ \. [\w.:]+ \. \d+", shown)
    return [addresses for addresses in found if PORTS.intersection(addresses.split(" . "))]


@pytest.fixture(autouse=True)
def no_lock_is_left() -> Iterator[None]:
    PORTS.clear()
    yield
    assert not locked()


class Moved:
    """The connection that a holder has, moved: `sock` is what it is afterwards."""

    def __init__(self, holder: Holder, far: socket.socket) -> None:
        fd = far.detach()
        holder.give(fd)
        holder.preflight(ESTABLISHED)
        self.images, dump = holder.dump(ESTABLISHED)
        self.images.add("inventory", inventory_entry(img_version=2))
        for custody in dump.custody:
            custody.hold()
        holder.stop()
        for custody in dump.custody:
            custody.kill()
        arrived = ImageSet()
        for name in self.images.names():
            arrived.decode_file(name, self.images.encode_file(name))
        self.build = FileBuild(arrived, options=holder.allowed)
        holder.copies.append(self.build)
        fds.build(self.build)
        assert locked()
        self.build.resume()
        self.sock = socket.socket(fileno=os.dup(self.build.fds[self.build.tables["fdinfo-1"][fd]]))
        self.sock.settimeout(10)


@pytest.fixture
def move(holder: Holder) -> Iterator[Callable[[socket.socket], socket.socket]]:
    moved: list[Moved] = []

    def once(far: socket.socket) -> socket.socket:
        moved.append(Moved(holder, far))
        return moved[-1].sock

    yield once
    for each in moved:
        each.sock.close()


def take(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return bytes(data)


def fill(sock: socket.socket, seed: int) -> bytes:
    """Send until nothing goes any more. Returns what went."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BIG)
    sock.setblocking(False)
    data, sent = Random(seed).randbytes(4 * BIG), 0
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        try:
            sent += sock.send(data[sent : sent + 65536])
        except BlockingIOError:
            time.sleep(0.01)
    sock.setblocking(True)
    assert sent < len(data)
    return data[:sent]


def talk(near: socket.socket, far: socket.socket) -> None:
    for one, other in ((near, far), (far, near)):
        data = Random(1).randbytes(300_000)
        one.settimeout(10)
        sent = 0
        while sent < len(data):
            step = one.send(data[sent : sent + 50_000])
            assert take(other, step) == data[sent : sent + step]
            sent += step


@pytest.mark.parametrize("family", FAMILIES)
def test_an_idle_connection(family: str, move: Callable[[socket.socket], socket.socket]) -> None:
    near, far = connection(family)
    names = far.getsockname(), far.getpeername()
    mss = far.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    with near, move(far) as here:
        assert (here.getsockname(), here.getpeername()) == names
        # Over loopback it is more than the kernel lets anyone set.
        assert mss - 100 < here.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= mss
        assert here.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
        talk(near, here)
        near.close()
        assert here.recv(1) == b""


@pytest.mark.parametrize("family", FAMILIES)
def test_full_queues_both_ways(family: str, move: Callable[[socket.socket], socket.socket]) -> None:
    near, far = connection(family)
    there, back = fill(near, 2), fill(far, 3)
    (unsent,) = struct.unpack("I", fcntl.ioctl(far, tcp.SIOCOUTQNSD, bytes(4)))
    assert unsent > 1 << 20
    size = far.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    with near, move(far) as here:
        assert here.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == size
        assert take(near, len(back)) == back
        assert take(here, len(there)) == there
        talk(near, here)


def test_it_moves_twice(holder: Holder, move: Callable[[socket.socket], socket.socket]) -> None:
    near, far = connection()
    with near:
        near.sendall(b"waiting")
        first = move(far)
        holder.copies.pop().close()
        with move(first) as here:
            assert take(here, 7) == b"waiting"
            talk(near, here)


@pytest.mark.parametrize("data", [b"", b"some words"], ids=["empty", "queued"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "state",
    [tcp.TCP_FIN_WAIT1, tcp.TCP_FIN_WAIT2, tcp.TCP_CLOSE_WAIT, tcp.TCP_LAST_ACK, tcp.TCP_CLOSING],
)
def test_ends_that_are_shut(
    state: int, family: str, data: bytes, move: Callable[[socket.socket], socket.socket]
) -> None:
    near, far = connection(family)
    connected = [Connection(*far.getsockname()[:2], *far.getpeername()[:2])]
    near.sendall(data)
    far.sendall(data)
    time.sleep(0.05)
    lock = None
    if state == tcp.TCP_CLOSING:
        lock = NetworkLock(connected)
        near.shutdown(socket.SHUT_WR)
        far.shutdown(socket.SHUT_WR)
        # The FIN of the other end arrives, its ACK of ours does not.
        info = tcp.Segment(connected[0], 0x11, *_numbers(far), 500)
        info.send()
    if state in (tcp.TCP_CLOSE_WAIT, tcp.TCP_LAST_ACK):
        near.shutdown(socket.SHUT_WR)
        time.sleep(0.05)
    if state in (tcp.TCP_FIN_WAIT1, tcp.TCP_LAST_ACK):
        lock = NetworkLock(connected)
    if state in (tcp.TCP_FIN_WAIT1, tcp.TCP_FIN_WAIT2, tcp.TCP_LAST_ACK):
        far.shutdown(socket.SHUT_WR)
        time.sleep(0.05)
    assert tcp.state_of(far) == state
    try:
        here = move(far)
    finally:
        if lock:
            lock.release()
    with near, here:
        assert take(near, len(data)) == data
        assert take(here, len(data)) == data
        if state not in tcp.FIN_RECEIVED:
            near.sendall(b"more")
            assert take(here, 4) == b"more"
            near.shutdown(socket.SHUT_WR)
        if state not in tcp.FIN_SENT:
            here.sendall(b"more")
            assert take(near, 4) == b"more"
            here.shutdown(socket.SHUT_WR)
        assert here.recv(1) == b""
        assert near.recv(1) == b""
        for sock in (near, here):
            deadline = time.monotonic() + 10
            while tcp.state_of(sock) not in (tcp.TCP_FIN_WAIT2, 7, 6):
                assert time.monotonic() < deadline
                time.sleep(0.01)


def _numbers(sock: socket.socket) -> tuple[int, int]:
    """Next number from the peer, first number it has not acknowledged."""
    ((message, _),) = (found for found in tcp.read_all([sock]) if not isinstance(found, str))
    entry = tcp_stream_entry.FromString(message)
    return entry.inq_seq, entry.outq_seq - 1 - entry.outq_len


def test_a_connection_that_opens(move: Callable[[socket.socket], socket.socket]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.socket()
        far.bind(("127.0.0.1", 0))
        PORTS.add(str(listener.getsockname()[1]))
        lock = NetworkLock([Connection(*far.getsockname(), *listener.getsockname())])
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.connect(listener.getsockname())
        assert tcp.state_of(far) == tcp.TCP_SYN_SENT
        here = move(far)
        lock.release()
        assert select.select([], [here], [], 10)[1]
        near, _ = listener.accept()
        with near, here:
            talk(near, here)


def test_the_source_goes_on(holder: Holder) -> None:
    near, far = connection()
    near.sendall(b"in the queue")
    far.setblocking(False)
    twin = socket.socket(fileno=os.dup(far.fileno()))
    holder.give(far.detach())
    images, dump = holder.dump(ESTABLISHED)
    assert len([name for name in images.names() if name.startswith("tcp-stream-")]) == 1
    assert not os.get_blocking(twin.fileno())
    assert locked()
    dump.undo.close()
    assert not locked()
    assert twin.getsockopt(socket.IPPROTO_TCP, tcp.TCP_REPAIR) == 0
    with near, twin:
        twin.settimeout(10)
        assert twin.recv(100) == b"in the queue"
        talk(near, twin)


def test_nothing_passes_the_lock() -> None:
    near, far = connection()
    other, one = connection()
    with near, far, other, one:
        lock = NetworkLock([Connection(*far.getsockname(), *far.getpeername())])
        near.sendall(b"late")
        other.sendall(b"at once")
        assert one.recv(10) == b"at once"
        assert select.select([far], [], [], 0.3)[0] == []
        lock.release()
        far.settimeout(10)
        assert far.recv(10) == b"late"


@pytest.mark.parametrize("outlives", [False, True])
def test_a_lock_ends_with_us_unless_it_must_not(outlives: bool) -> None:
    near, far = connection()
    with near, far:
        connections = [Connection(*far.getsockname(), *far.getpeername())]
        code = f"from phaul.engine.netlock import *; lock = NetworkLock({connections!r}); "
        code += "lock.outlive(); " * outlives + "print(flush=True); input()"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        assert len(locked()) == 2 + 2 * outlives
        process.kill()
        process.communicate()
        near.sendall(b"late")
        assert bool(select.select([far], [], [], 0.3)[0]) == (not outlives)
        NetworkLock(connections).release()
        assert not locked()
        assert take(far, 4) == b"late"


def test_refused_without_the_option_at_the_restore(holder: Holder) -> None:
    near, far = connection()
    with near:
        holder.give(far.detach())
        images, dump = holder.dump(ESTABLISHED)
        images.add("inventory", inventory_entry(img_version=2))
        dump.undo.close()
        with pytest.raises(RestoreError, match="allow them by --tcp-established"):
            holder.build(images)


def test_a_failed_restore_says_nothing_to_the_peer(holder: Holder) -> None:
    near, far = connection()
    with near:
        fd = far.detach()
        holder.give(fd)
        images, dump = holder.dump(ESTABLISHED)
        images.add("inventory", inventory_entry(img_version=2))
        for custody in dump.custody:
            custody.hold()
        holder.stop()
        for custody in dump.custody:
            custody.kill()
        near.sendall(b"to nobody")
        build = FileBuild(images, options=holder.allowed)
        fds.build(build)
        build.close()
        build.abort()
        time.sleep(0.1)
        assert tcp.state_of(near) == TCP_ESTABLISHED
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        # And it may be tried again.
        assert locked()
        build = FileBuild(images, options=holder.allowed)
        holder.copies.append(build)
        fds.build(build)
        build.resume()
        with socket.socket(fileno=os.dup(build.fds[build.tables["fdinfo-1"][fd]])) as here:
            assert take(here, 9) == b"to nobody"
            talk(near, here)


def test_connections_not_yet_accepted_can_be_left_behind(holder: Holder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        holder.start(listener.fileno())
        with pytest.raises(CannotMove, match=r"1 TCP connections to .* not yet accepted"):
            holder.preflight(ESTABLISHED)
        holder.preflight(Options(tcp_established=True, skip_in_flight=True))


def test_impossible_images_are_refused(holder: Holder) -> None:
    near, far = connection()
    with near:
        holder.give(far.detach())
        images, dump = holder.dump(ESTABLISHED)
        images.add("inventory", inventory_entry(img_version=2))
        dump.undo.close()
        for message in images.messages("files", file_entry):
            if message.HasField("isk"):
                message.isk.state = 3
                assert_refused(images, "in state 3")
                message.isk.state = TCP_ESTABLISHED
                message.isk.ino += 1
                assert_refused(images, "0 connections")


def assert_refused(images: ImageSet, why: str) -> None:
    build = FileBuild(images, options=Holder.allowed)
    with pytest.raises(ImageError, match=why):
        fds.build(build)
    build.close()
    build.abort()
