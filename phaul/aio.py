"""What asyncio lacks for work that must not be left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def regardless(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when the caller is cancelled meanwhile.

    The cancellation is raised afterwards, unless `work` itself fails.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def in_thread(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Run blocking `work` in a thread; a cancelled caller first waits until it is over.

    Args:
        work: blocks.
        cancel: makes `work` end soon; called from the event loop.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
            cancel()
    if cancelled is not None:
        future.exception()  # looked at: the cancellation is what the caller gets
        raise cancelled
    return future.result()
