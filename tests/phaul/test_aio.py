"""Work that must not be left half done: also when the caller is cancelled, and cancelled again."""

from __future__ import annotations

import asyncio
import threading

import pytest

from phaul.aio import in_thread, regardless

pytestmark = pytest.mark.asyncio


async def test_regardless_gives_the_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await regardless(work()) == 7


async def test_regardless_of_cancellations() -> None:
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.set()

    task = asyncio.create_task(regardless(work()))
    for _ in range(3):
        await asyncio.sleep(0.005)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_in_thread_gives_the_result_and_the_error() -> None:
    assert await in_thread(lambda: 7, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0, lambda: None)


async def test_in_thread_waits_for_the_end_however_often_it_is_cancelled() -> None:
    asked, over = threading.Event(), threading.Event()

    def work() -> None:
        asked.wait(10)
        over.set()
        raise OSError("broken by the cancellation")

    loop = asyncio.get_running_loop()

    def cancel() -> None:
        loop.call_later(0.05, asked.set)

    task = asyncio.create_task(in_thread(work, cancel))
    for _ in range(3):
        await asyncio.sleep(0.005)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert over.is_set()
