"""The control connection: typed messages over a WebSocket, the same at both ends.

A task of its own always reads, so that the end of the connection (closed, heartbeat lost,
Abort, Failed) is noticed at once, also in the middle of long work that waits for no message:
`guard()` then ends that work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TypeVar

from aiohttp import ClientWebSocketResponse, WSMessage, WSMsgType
from aiohttp.web import WebSocketResponse

from phaul.errors import PeerError, PhaulError
from phaul.messages import Payload, decode, encode, error_from
from phaul.pb import control_pb2 as control

log = logging.getLogger(__name__)

# Seconds. A peer that answers no ping within half of it is gone (aiohttp).
HEARTBEAT = 10.0
# Messages that may lie here unread before the connection itself is left unread.
QUEUE = 64

P = TypeVar("P", bound=Payload)


class Channel:
    """Messages to and from one peer. Made inside the event loop.

    Args:
        ws: open; the channel reads it from now on.
        peer: what to call the other side in messages ("destination").

    Attributes:
        ended: set once the conversation is over; the error says why.
    """

    def __init__(self, ws: ClientWebSocketResponse | WebSocketResponse, peer: str) -> None:
        self.peer = peer
        self.ended: asyncio.Future[PhaulError] = asyncio.get_running_loop().create_future()
        self._ws = ws
        self._queue: asyncio.Queue[Payload | None] = asyncio.Queue(QUEUE)
        self._reader = asyncio.create_task(self._read())

    async def send(self, payload: Payload) -> None:
        """Send a message.

        Raises:
            PhaulError: the conversation is over.
        """
        log.debug("--> %s %s", self.peer, payload.DESCRIPTOR.name)
        try:
            await self._ws.send_bytes(encode(payload))
        except ConnectionError as error:
            if self.ended.done():
                raise self.ended.result() from error
            raise PeerError(f"lost the connection to the {self.peer}") from error

    async def receive(self, within: float) -> Payload:
        """The next message.

        Args:
            within: seconds.

        Raises:
            PhaulError: the conversation is over, or nothing came in time.
        """
        try:
            async with asyncio.timeout(within):
                payload = await self._queue.get()
        except TimeoutError:
            raise PeerError(f"no answer from the {self.peer} in {within:g} s") from None
        if payload is None:
            self._queue.put_nowait(None)
            raise self.ended.result()
        return payload

    async def expect(self, kind: type[P], within: float) -> P:
        """The next message, which has to be of one kind.

        Raises:
            PhaulError: as `receive()`, or it is of another kind.
        """
        payload = await self.receive(within)
        if not isinstance(payload, kind):
            raise self.unexpected(payload, kind.DESCRIPTOR.name)
        return payload

    def unexpected(self, payload: Payload, due: str) -> PeerError:
        """The error for a message at the wrong time."""
        name = payload.DESCRIPTOR.name
        return PeerError(f"the {self.peer} sent {name} where {due} is due")

    @contextlib.asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """Interrupt the body when the conversation ends; it then raises `ended`."""
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        fired = False

        def interrupt(_: asyncio.Future[PhaulError]) -> None:
            nonlocal fired
            fired = True
            task.cancel()

        self.ended.add_done_callback(interrupt)
        try:
            yield
        except asyncio.CancelledError:
            # As asyncio.timeout() does: a cancellation from elsewhere stays one.
            if fired and task.uncancel() <= before:
                raise self.ended.result() from None
            raise
        finally:
            self.ended.remove_done_callback(interrupt)

    async def close(self) -> None:
        """End the conversation in good order. Never raises."""
        self._end(PeerError("the conversation was closed here"))
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        with contextlib.suppress(ConnectionError, TimeoutError):
            await self._ws.close()

    def _end(self, error: PhaulError) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    async def _read(self) -> None:
        try:
            while True:
                await self._queue.put(self._payload(await self._ws.receive()))
        except PhaulError as error:
            self._end(error)
        await self._queue.put(None)

    def _payload(self, message: WSMessage) -> Payload:
        if message.type is not WSMsgType.BINARY:
            if message.type is WSMsgType.TEXT:
                raise PeerError(f"the {self.peer} sent text where messages are binary")
            raise PeerError(f"lost the connection to the {self.peer}")
        payload = decode(message.data)
        log.debug("<-- %s %s", self.peer, payload.DESCRIPTOR.name)
        if isinstance(payload, control.Failed):
            raise error_from(payload, self.peer)
        if isinstance(payload, control.Abort):
            raise PeerError(f"the {self.peer} aborted: {payload.reason}")
        return payload
