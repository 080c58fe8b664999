"""The destination's end of a page stream: frames in, memory out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

from phaul.errors import PeerError
from phaul.images.pagemap import PageRange
from phaul.pageserver import pipeline
from phaul.pageserver.frames import (
    HEADER_SIZE,
    PREAMBLE_SIZE,
    VERSION,
    FrameChecker,
    PageFrame,
    Preamble,
    Status,
    Totals,
    pack_answer,
)
from phaul.pageserver.pipeline import FrameBuffer
from phaul.transport.stream import recv_exactly, set_stall_timeout

WritePages = Callable[[str, Sequence[PageRange], memoryview], None]

# Seconds without a byte inside a frame after which the other side counts as dead.
STALL_TIMEOUT = 30.0
# Seconds between two frames: the source may be freezing its tree. Its life is watched by the
# heartbeat of the control channel, which ends the stream by `cancel()`.
IDLE_TIMEOUT = 600.0


async def read_preamble(sock: socket.socket, within: float) -> Preamble:
    """Take the first bytes of an accepted page stream.

    Args:
        sock: non-blocking; not closed here.
        within: seconds.

    Raises:
        PeerError: nothing, too little, or something else came.
    """
    loop = asyncio.get_running_loop()
    raw = b""
    try:
        async with asyncio.timeout(within):
            while len(raw) < PREAMBLE_SIZE:
                piece = await loop.sock_recv(sock, PREAMBLE_SIZE - len(raw))
                if not piece:
                    raise PeerError("page stream: closed within the preamble")
                raw += piece
    except TimeoutError:
        raise PeerError("page stream: no preamble in time") from None
    except OSError as error:
        raise PeerError(f"page stream: {error.strerror}") from error
    return Preamble.parse(raw)


async def answer(sock: socket.socket, preamble: Preamble, known: bool) -> bool:
    """Answer a preamble.

    Args:
        sock: non-blocking.
        preamble: what `read_preamble` gave.
        known: there is a migration that waits for this stream.

    Returns:
        Whether frames follow; if not, close the socket.
    """
    status = Status.ACCEPTED if known else Status.UNKNOWN_TOKEN
    if preamble.version != VERSION:
        status = Status.BAD_VERSION
    with contextlib.suppress(OSError):  # the stream ends, and its reader says so
        # 16 bytes into an empty socket buffer: never blocks.
        await asyncio.get_running_loop().sock_sendall(sock, pack_answer(status))
    return status is Status.ACCEPTED


class PageReceiver:
    """Receives pages of a tree; `run()` blocks, `cancel()` from any thread.

    Args:
        sock: an accepted stream whose preamble was answered; stays the caller's.
        write_pages: takes the pages of some ranges of a target. Ranges are well-formed, but
            where they may go is for it to check. The view is valid during the call.
        stall_timeout: seconds without a byte inside a frame after which receiving fails.
        idle_timeout: the same between two frames.
    """

    def __init__(
        self,
        sock: socket.socket,
        write_pages: WritePages,
        stall_timeout: float = STALL_TIMEOUT,
        idle_timeout: float = IDLE_TIMEOUT,
    ) -> None:
        set_stall_timeout(sock, stall_timeout)
        self._sock = sock
        self._write_pages = write_pages
        self._idle_timeout = idle_timeout
        self._checker = FrameChecker()
        self._cancelled = False

    def run(self) -> Totals:
        """Take frames until END.

        Returns:
            What has come, all of it written; the source said the same numbers.

        Raises:
            PeerError: the stream broke, stalled, is malformed, or `cancel()` was called.
            Exception: what `write_pages` raised.
        """
        buffers = [FrameBuffer(), FrameBuffer()]
        pipeline.run(buffers, self._receive, self._write, self._break)
        return self._checker.totals

    def cancel(self) -> None:
        """Break the stream: whatever blocks on it fails at once. From any thread."""
        self._cancelled = True
        self._break()

    def _break(self) -> None:
        with contextlib.suppress(OSError):  # broken already
            self._sock.shutdown(socket.SHUT_RDWR)

    def _receive(self, buffer: FrameBuffer) -> PageFrame | None:
        head = bytearray(HEADER_SIZE)
        self._fill(memoryview(head), self._idle_timeout)
        header = self._checker.header(head)
        frame = buffer.frame(header.ranges_size, header.data_size)
        frame[:HEADER_SIZE] = head
        self._fill(frame[HEADER_SIZE:])
        return self._checker.body(header, frame)

    def _fill(self, view: memoryview, idle_timeout: float = 0.0) -> None:
        try:
            recv_exactly(self._sock, view, idle_timeout)
        except PeerError as error:
            reason = "cancelled" if self._cancelled else str(error)
            raise self._checker.error(reason) from error

    def _write(self, frame: PageFrame) -> None:
        self._write_pages(frame.target, frame.ranges, frame.data)
