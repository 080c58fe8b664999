"""Two threads and a few big buffers: one fills while the other empties.

Both ends of a page stream are such a pipeline (source: read memory | send; destination:
receive | write memory), and both sides of it spend their time in system calls that release the
GIL, so they really overlap.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

from phaul.pageserver.frames import (
    HEADER_SIZE,
    MAX_DATA,
    MAX_RANGES,
    PAGE_SIZE,
    RANGE_SIZE,
)

T = TypeVar("T")

# Room for the longest header, rounded up so that the data begins on a page.
_DATA_OFFSET = -(-(HEADER_SIZE + MAX_RANGES * RANGE_SIZE) // PAGE_SIZE) * PAGE_SIZE


class FrameBuffer:
    """Memory for one frame of any size.

    The data always begins at the same, page-aligned place; the header and the ranges end
    where it begins. So a frame is contiguous, whatever its number of ranges.
    """

    def __init__(self) -> None:
        self._view = memoryview(mmap.mmap(-1, _DATA_OFFSET + MAX_DATA))

    def data(self, size: int) -> memoryview:
        """The first `size` bytes of the data."""
        return self._view[_DATA_OFFSET : _DATA_OFFSET + size]

    def frame(self, ranges_size: int, data_size: int) -> memoryview:
        """Header, ranges and data as one piece."""
        start = _DATA_OFFSET - ranges_size - HEADER_SIZE
        return self._view[start : _DATA_OFFSET + data_size]


def run(
    buffers: Sequence[FrameBuffer],
    produce: Callable[[FrameBuffer], T | None],
    consume: Callable[[T], None],
    unblock: Callable[[], None],
) -> None:
    """Call `produce` in a thread of its own and `consume` in this one until the end.

    Args:
        buffers: at least two; each is owned by one side at a time.
        produce: fills a buffer and returns what `consume` shall get, or None at the end.
        consume: is done with the buffer when it returns.
        unblock: must make a blocked `produce` fail soon; called when `consume` failed.

    Raises:
        Exception: whatever the first of the two to fail has raised. Both are over by then.
    """
    free: SimpleQueue[FrameBuffer | None] = SimpleQueue()
    full: SimpleQueue[tuple[FrameBuffer, T | None] | BaseException] = SimpleQueue()
    for buffer in buffers:
        free.put(buffer)

    def work() -> None:
        try:
            while (buffer := free.get()) is not None:
                item = produce(buffer)
                full.put((buffer, item))
                if item is None:
                    return
        except BaseException as error:  # handed over: the other thread raises it
            full.put(error)

    thread = threading.Thread(target=work, name="pages", daemon=True)
    thread.start()
    try:
        while True:
            got = full.get()
            if isinstance(got, BaseException):
                raise got
            buffer, item = got
            if item is None:
                return
            consume(item)
            free.put(buffer)
    except BaseException:
        free.put(None)
        unblock()
        raise
    finally:
        thread.join()
