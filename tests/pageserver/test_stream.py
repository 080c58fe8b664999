"""Sender and receiver over real sockets: what arrives, what breaks, and in what time."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from phaul.errors import PeerError, RestoreError, VersionMismatch
from phaul.images.pagemap import PAGE_SIZE, PageRange
from phaul.pageserver import frames, throughput
from phaul.pageserver.frames import Header, Kind, Preamble, Status, Totals
from phaul.pageserver.receiver import PageReceiver, answer, read_preamble
from phaul.pageserver.sender import PageSender, open_stream
from phaul.transport.endpoint import TcpEndpoint

STALL = 0.3
TOKEN = bytes(range(16))

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a TCP connection."""
    endpoint = TcpEndpoint("127.0.0.1", 0)
    with endpoint.listen() as listener:
        listener.setblocking(True)
        ours = endpoint.bound(listener).connect(5)
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


class Memory:
    """Pages of several targets, kept as {target: {address: page}}."""

    def __init__(self) -> None:
        self.pages: dict[str, dict[int, bytes]] = {}

    @classmethod
    def random(cls, layout: dict[str, list[PageRange]]) -> Memory:
        memory, source = cls(), random.Random(7)
        for target, ranges in layout.items():
            memory.pages[target] = {
                item.vaddr + index * PAGE_SIZE: source.randbytes(PAGE_SIZE)
                for item in ranges
                for index in range(item.nr_pages)
            }
        return memory

    def read(self, target: str, ranges: Sequence[PageRange], buffer: memoryview) -> None:
        pages = self.pages[target]
        content = b"".join(pages[item.vaddr + index * PAGE_SIZE] for item in ranges for index in range(item.nr_pages))
        buffer[:] = content

    def write(self, target: str, ranges: Sequence[PageRange], data: memoryview) -> None:
        pages = self.pages.setdefault(target, {})
        for item in ranges:
            for index in range(item.nr_pages):
                pages[item.vaddr + index * PAGE_SIZE] = bytes(data[:PAGE_SIZE])
                data = data[PAGE_SIZE:]


def nothing(target: str, ranges: Sequence[PageRange], view: memoryview) -> None:
    """Reads or writes no memory at all."""


LAYOUT = {
    "pagemap-100": [PageRange(0x400000, 3), PageRange(0x7F0000000000, 2000), PageRange(0, 1)],
    "pagemap-101": [PageRange(index * 2 * PAGE_SIZE, 1) for index in range(3000)],
    "pagemap-shmem-5": [PageRange(0, 600)],
}


@pytest.mark.parametrize("frame_data", [PAGE_SIZE * 7, 1 << 20, frames.MAX_DATA])
def test_pages_of_all_targets_arrive(pair: Pair, pool: ThreadPoolExecutor, frame_data: int) -> None:
    source, target = Memory.random(LAYOUT), Memory()
    received = pool.submit(PageReceiver(pair[1], target.write).run)
    sender = PageSender(pair[0], source.read, frame_data)
    # Two rounds, as pre-copy does.
    sender.send([("pagemap-100", LAYOUT["pagemap-100"])])
    sender.send([(name, LAYOUT[name]) for name in ("pagemap-101", "pagemap-shmem-5")])
    assert sender.end() == received.result(10)
    assert sender.totals.data == sum(r.size for ranges in LAYOUT.values() for r in ranges)
    assert target.pages == source.pages


def test_no_pages_at_all(pair: Pair, pool: ThreadPoolExecutor) -> None:
    received = pool.submit(PageReceiver(pair[1], nothing).run)
    sender = PageSender(pair[0], nothing)
    sender.send([])
    assert sender.end() == received.result(5) == Totals(0, 0)


def test_reading_fails(pair: Pair) -> None:
    def fail(target: str, ranges: Sequence[PageRange], buffer: memoryview) -> None:
        raise OSError(14, "Bad address")

    with pytest.raises(OSError, match="Bad address"):
        PageSender(pair[0], fail).send([("pagemap-1", [PageRange(0, 1)])])


def test_writing_fails(pair: Pair, pool: ThreadPoolExecutor) -> None:
    def fail(target: str, ranges: Sequence[PageRange], data: memoryview) -> None:
        raise RestoreError("outside of the maps")

    received = pool.submit(PageReceiver(pair[1], fail).run)
    sender = PageSender(pair[0], nothing)
    with pytest.raises(PeerError, match=r"page stream: .* bytes of pages sent\)"):
        sender.send([("pagemap-1", [PageRange(0, 100_000)])])
    with pytest.raises(RestoreError, match="outside of the maps"):
        received.result(5)


def test_cancelled_while_sending(pair: Pair, pool: ThreadPoolExecutor) -> None:
    sender = PageSender(pair[0], nothing)
    sending = pool.submit(sender.send, [("pagemap-1", [PageRange(0, 100_000)])])
    time.sleep(0.1)  # nobody reads: it blocks in send()
    assert not sending.done()
    sender.cancel()
    with pytest.raises(PeerError, match="cancelled"):
        sending.result(5)


def test_cancelled_while_receiving(pair: Pair, pool: ThreadPoolExecutor) -> None:
    receiver = PageReceiver(pair[1], nothing)
    receiving = pool.submit(receiver.run)
    time.sleep(0.05)
    receiver.cancel()
    with pytest.raises(PeerError, match=r"cancelled \(frame 0, offset 0\)"):
        receiving.result(5)


def test_nobody_takes_the_pages(pair: Pair) -> None:
    sender = PageSender(pair[0], nothing, stall_timeout=STALL)
    with pytest.raises(PeerError, match="takes no more data"):
        sender.send([("pagemap-1", [PageRange(0, 100_000)])])


def good_frame(sequence: int = 0) -> bytes:
    """One page, as a proper source sends it."""
    ranges = [PageRange(PAGE_SIZE, 1)]
    records = frames.pack_ranges(ranges)
    frame = bytearray(frames.HEADER_SIZE) + records + bytes(PAGE_SIZE)
    frames.seal(memoryview(frame), Header(Kind.PAGES, 1, PAGE_SIZE, 1 << 8 | 1, sequence, 0))
    return bytes(frame)


def patched(frame: bytes, offset: int, new: bytes) -> bytes:
    return frame[:offset] + new + frame[offset + len(new) :]


SIZE = len(good_frame())


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", "closed the connection too early (frame 0, offset 0)"),
        (good_frame()[:20], "closed the connection too early (frame 0, offset 0)"),
        (good_frame()[:-1], "closed the connection too early (frame 0, offset 0)"),
        (good_frame(), f"closed the connection too early (frame 1, offset {SIZE})"),
        (good_frame() * 2, f"frame 0 comes where 1 is due (frame 1, offset {SIZE})"),
        (good_frame(1), "frame 1 comes where 0 is due (frame 0, offset 0)"),
        (patched(good_frame(), SIZE - 1, b"x"), "wrong checksum (frame 0, offset 0)"),
        (patched(good_frame(), 0, bytes(8)), "wrong checksum (frame 0, offset 0)"),
        (patched(good_frame(), 8, b"\x09"), "unknown kind of frame 9 (frame 0, offset 0)"),
        (patched(good_frame(), 12, b"\xff\xff\xff\x7f"), "2147483647 ranges (limit 1024)"),
        (patched(good_frame(), 32, b"\xff\xff\xff\xff"), "4294967295 bytes of data (limit"),
        (b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n", "unknown kind of frame"),
        (good_frame() + frames.pack_end(Totals(7, 7), 1), "were sent"),
        (good_frame() + frames.pack_end(Totals(1, PAGE_SIZE), 0), "frame 0 comes where 1"),
    ],
)
def test_hostile_streams(pair: Pair, pool: ThreadPoolExecutor, sent: bytes, says: str) -> None:
    received = pool.submit(PageReceiver(pair[1], nothing).run)
    pair[0].sendall(sent)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(PeerError) as caught:
        received.result(5)
    assert says in str(caught.value)


def test_nothing_is_written_before_it_was_checked(pair: Pair, pool: ThreadPoolExecutor) -> None:
    memory = Memory()
    received = pool.submit(PageReceiver(pair[1], memory.write).run)
    pair[0].sendall(patched(good_frame(), SIZE - 1, b"x"))
    with pytest.raises(PeerError, match="wrong checksum"):
        received.result(5)
    assert memory.pages == {}


def test_a_source_that_stalls_within_a_frame(pair: Pair, pool: ThreadPoolExecutor) -> None:
    received = pool.submit(PageReceiver(pair[1], nothing, STALL, idle_timeout=60).run)
    pair[0].sendall(good_frame()[:100])
    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"gone silent \(frame 0, offset 0\)"):
        received.result(10)
    assert time.monotonic() - begin < 10 * STALL


def test_a_source_that_never_goes_on(pair: Pair, pool: ThreadPoolExecutor) -> None:
    received = pool.submit(PageReceiver(pair[1], nothing, STALL, idle_timeout=2 * STALL).run)
    pair[0].sendall(good_frame())
    with pytest.raises(PeerError, match=rf"gone silent \(frame 1, offset {SIZE}\)"):
        received.result(10)


def serve_once(pool: ThreadPoolExecutor, act: Callable[[socket.socket], None]) -> tuple[TcpEndpoint, Future[None]]:
    """A peer that does something with its first connection."""
    endpoint = TcpEndpoint("127.0.0.1", 0)
    listener = endpoint.listen()
    listener.setblocking(True)
    bound = endpoint.bound(listener)

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
        with connection:
            act(connection)

    return bound, pool.submit(serve)


@pytest.mark.parametrize(
    ("reply", "error", "says"),
    [
        (frames.pack_answer(Status.UNKNOWN_TOKEN), PeerError, "does not know this migration"),
        (frames.pack_answer(Status.BAD_VERSION), VersionMismatch, "page stream version"),
        (b"HTTP/1.1 400 Bad Request\r\n", PeerError, "does not answer as a phaul agent"),
        (b"short", PeerError, "closed the connection too early"),
    ],
)
def test_answers_that_are_none(pool: ThreadPoolExecutor, reply: bytes, error: type[PeerError], says: str) -> None:
    def act(connection: socket.socket) -> None:
        connection.recv(frames.PREAMBLE_SIZE, socket.MSG_WAITALL)
        connection.sendall(reply)

    endpoint, served = serve_once(pool, act)
    with pytest.raises(error, match=says):
        open_stream(endpoint, TOKEN, 5)
    served.result(5)


def test_a_peer_that_does_not_answer(pool: ThreadPoolExecutor) -> None:
    over = threading.Event()

    def wait(connection: socket.socket) -> None:
        over.wait(10)

    endpoint, served = serve_once(pool, wait)
    with pytest.raises(PeerError, match="gone silent"):
        open_stream(endpoint, TOKEN, STALL)
    over.set()
    served.result(5)


@pytest.mark.asyncio
@pytest.mark.parametrize(("version", "known", "accepted"), [(1, True, True), (1, False, False), (2, True, False)])
async def test_preamble_and_answer(pair: Pair, version: int, known: bool, accepted: bool) -> None:
    pair[1].setblocking(False)
    raw = Preamble(TOKEN, version).pack()
    pair[0].sendall(raw[:5])
    reading = asyncio.create_task(read_preamble(pair[1], 5))
    await asyncio.sleep(0.01)
    pair[0].sendall(raw[5:])
    preamble = await reading
    assert preamble.token == TOKEN
    assert await answer(pair[1], preamble, known) is accepted
    reply = pair[0].recv(100)
    assert len(reply) == frames.ANSWER_SIZE
    if accepted:
        frames.check_answer(reply)
    else:
        with pytest.raises(PeerError):
            frames.check_answer(reply)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("sent", "closes", "says"),
    [
        (b"", False, "no preamble in time"),
        (frames.MAGIC, False, "no preamble in time"),
        (frames.MAGIC, True, "closed within the preamble"),
        (b"x" * frames.PREAMBLE_SIZE, False, "does not begin as one"),
    ],
)
async def test_hostile_preambles(pair: Pair, sent: bytes, closes: bool, says: str) -> None:
    pair[1].setblocking(False)
    pair[0].sendall(sent)
    if closes:
        pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(PeerError, match=says):
        await read_preamble(pair[1], 0.1)


def test_the_throughput_helper_measures_something() -> None:
    assert throughput.plain(64 << 20) > 0
    assert throughput.framed(64 << 20) > 0
