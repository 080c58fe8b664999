"""The source's end of a page stream: memory in, frames out."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

from phaul.errors import PeerError
from phaul.images.pagemap import PageRange, split
from phaul.pageserver import pipeline
from phaul.pageserver.frames import (
    ANSWER_SIZE,
    HEADER_SIZE,
    MAX_DATA,
    MAX_RANGES,
    PAGE_SIZE,
    Header,
    Kind,
    Preamble,
    Totals,
    check_answer,
    encode_target,
    pack_end,
    pack_ranges,
    seal,
)
from phaul.pageserver.pipeline import FrameBuffer
from phaul.transport.endpoint import Endpoint
from phaul.transport.stream import recv_exactly, send_all, set_stall_timeout

ReadPages = Callable[[str, Sequence[PageRange], memoryview], None]
Targets = Iterable[tuple[str, Iterable[PageRange]]]

# Seconds without progress after which the other side counts as dead.
STALL_TIMEOUT = 30.0
# Bytes of pages a frame. Smaller ones cost more switches between threads; in larger ones the
# data has left the caches before it is sent. What a huge page holds stays together.
FRAME_DATA = 2 << 20


def open_stream(endpoint: Endpoint, token: bytes, timeout: float) -> socket.socket:
    """Connect a page stream to an agent that knows the migration already.

    Args:
        endpoint: the agent's.
        token: the migration's, as in the Hello.
        timeout: seconds for connecting and for the answer, each.

    Raises:
        PeerError: not reachable, no agent, or the token is unknown there.
        VersionMismatch: it speaks another version of the framing.
    """
    sock = endpoint.connect(timeout)
    try:
        set_stall_timeout(sock, timeout)
        send_all(sock, Preamble(token).pack())
        answer = bytearray(ANSWER_SIZE)
        recv_exactly(sock, memoryview(answer))
        check_answer(bytes(answer))
    except BaseException:
        sock.close()
        raise
    return sock


class PageSender:
    """Sends pages of a tree; blocking, one thread at a time, `cancel()` from any thread.

    Any number of `send()` (one a round), then one `end()`.

    Args:
        sock: from `open_stream()`; stays the caller's, who closes it.
        read_pages: fills a buffer with the pages of some ranges of a target; called from
            another thread.
        frame_data: bytes of pages a frame, a multiple of the page size, at most MAX_DATA.
        stall_timeout: seconds without progress after which sending fails.
    """

    def __init__(
        self,
        sock: socket.socket,
        read_pages: ReadPages,
        frame_data: int = FRAME_DATA,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> None:
        if frame_data % PAGE_SIZE or not 0 < frame_data <= MAX_DATA:
            raise ValueError(f"frame_data {frame_data}")
        set_stall_timeout(sock, stall_timeout)
        self._sock = sock
        self._read_pages = read_pages
        self._frame_data = frame_data
        self._buffers = [FrameBuffer(), FrameBuffer()]
        self._sequence = 0
        self._cancelled = False
        self.totals = Totals()

    def send(self, targets: Targets) -> None:
        """Send the contents of all ranges of all targets, in the order given.

        Args:
            targets: names of page maps with the ranges that are present.

        Raises:
            PeerError: the connection broke or stalled, or `cancel()` was called.
            Exception: what `read_pages` raised.
        """
        plan = self._plan(targets)

        def produce(buffer: FrameBuffer) -> tuple[memoryview, int] | None:
            item = next(plan, None)
            return self._fill(buffer, *item) if item else None

        with self._cancelable():
            pipeline.run(self._buffers, produce, self._send, self._break)

    def end(self) -> Totals:
        """Say that no more pages come; nothing can be sent afterwards.

        Returns:
            What has been sent; the receiver compares it with what it got.
        """
        with self._cancelable():
            send_all(self._sock, pack_end(self.totals, self._sequence))
        return self.totals

    def cancel(self) -> None:
        """Break the stream: whatever blocks on it fails at once. From any thread."""
        self._cancelled = True
        self._break()

    def _break(self) -> None:
        with contextlib.suppress(OSError):  # broken already
            self._sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _cancelable(self) -> Iterator[None]:
        try:
            yield
        except PeerError as error:
            reason = "cancelled" if self._cancelled else str(error)
            raise PeerError(
                f"page stream: {reason} (frame {self.totals.frames}, {self.totals.data} bytes of pages sent)"
            ) from error

    def _plan(self, targets: Targets) -> Iterator[tuple[str, Sequence[PageRange]]]:
        for target, ranges in targets:
            for chunk in split(ranges, self._frame_data, MAX_RANGES):
                yield target, chunk

    def _fill(self, buffer: FrameBuffer, target: str, ranges: Sequence[PageRange]) -> tuple[memoryview, int]:
        records = pack_ranges(ranges)
        data_size = PAGE_SIZE * sum(item.nr_pages for item in ranges)
        frame = buffer.frame(len(records), data_size)
        frame[HEADER_SIZE : HEADER_SIZE + len(records)] = records
        self._read_pages(target, ranges, buffer.data(data_size))
        number = encode_target(target)
        seal(frame, Header(Kind.PAGES, len(ranges), data_size, number, self._sequence, 0))
        self._sequence += 1
        return frame, data_size

    def _send(self, item: tuple[memoryview, int]) -> None:
        frame, data_size = item
        send_all(self._sock, frame)
        self.totals.add(data_size)
