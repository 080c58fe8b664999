"""One port, several protocols: who gets a connection, and who gets none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from phaul.transport.endpoint import TcpEndpoint
from phaul.transport.listener import Listener

MAGIC = b"\x89magic\r\n"


class Served:
    """A listener with two handlers that write down whom they got."""

    def __init__(self) -> None:
        self.endpoint = TcpEndpoint("127.0.0.1", 0)
        self.taken: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def by_magic(self, sock: socket.socket) -> None:
        await self._take("magic", sock)

    async def by_default(self, sock: socket.socket) -> None:
        await self._take("default", sock)

    async def _take(self, who: str, sock: socket.socket) -> None:
        with sock:
            data = await asyncio.get_running_loop().sock_recv(sock, 100)
            self.taken.put_nowait((who, data))

    def connect(self) -> socket.socket:
        return self.endpoint.connect(5)


@contextlib.asynccontextmanager
async def serving(deadline: float = 5.0) -> AsyncIterator[Served]:
    served = Served()
    sock = served.endpoint.listen()
    served.endpoint = served.endpoint.bound(sock)
    listener = Listener(sock, {MAGIC: served.by_magic}, served.by_default, deadline)
    task = asyncio.create_task(listener.serve())
    try:
        yield served
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def closed(sock: socket.socket) -> bool:
    """Waits for the other side to hang up (with a reset, if it left something unread)."""
    sock.settimeout(5)
    try:
        return await asyncio.to_thread(sock.recv, 1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("first", "who"),
    [
        (MAGIC + b"rest", "magic"),
        (b"GET / HTTP/1.1", "default"),
        (b"\x89x", "default"),
        (b"\x89magic\r\r", "default"),
        (b"G", "default"),
    ],
)
async def test_first_bytes_decide_and_stay_unread(first: bytes, who: str) -> None:
    async with serving() as served:
        with served.connect() as client:
            client.sendall(first)
            assert await asyncio.wait_for(served.taken.get(), 5) == (who, first)


@pytest.mark.asyncio
async def test_a_magic_may_come_byte_by_byte() -> None:
    async with serving() as served:
        with served.connect() as client:
            for byte in MAGIC:
                client.sendall(bytes([byte]))
                await asyncio.sleep(0.005)
            assert await asyncio.wait_for(served.taken.get(), 5) == ("magic", MAGIC)


@pytest.mark.asyncio
@pytest.mark.parametrize("first", [b"", MAGIC[:4]])
async def test_silence_is_ended_by_the_deadline(first: bytes) -> None:
    async with serving(deadline=0.1) as served:
        with served.connect() as client:
            client.sendall(first)
            assert await closed(client)
        assert served.taken.empty()


@pytest.mark.asyncio
async def test_hanging_up_harms_nobody() -> None:
    async with serving() as served:
        served.connect().close()
        with served.connect() as client:
            client.sendall(b"still there?")
            assert await asyncio.wait_for(served.taken.get(), 5) == ("default", b"still there?")


@pytest.mark.asyncio
async def test_the_end_closes_listener_and_undecided_connections() -> None:
    async with serving() as served:
        undecided = served.connect()
        await asyncio.sleep(0.05)
    with undecided:
        assert await closed(undecided)
    with pytest.raises(Exception, match="Connection refused"):
        served.connect()
