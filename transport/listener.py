"""One port for everything: the first bytes of a connection say who takes it.

An agent needs one address, one firewall rule and one listening socket, yet control is HTTP and
pages are a binary stream. The listener looks at the first bytes without taking them (MSG_PEEK):
a known magic goes to the handler of that protocol, everything else to the default (HTTP).
A client that stays silent is dropped after a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

log = logging.getLogger(__name__)

Handler = Callable[[socket.socket], Awaitable[None]]

# Seconds in which a new connection has to say what it is.
FIRST_BYTES_TIMEOUT = 10.0
# An incomplete magic keeps the socket readable, so there is nothing to wait for but time.
_RETRY_INTERVAL = 0.01
# Out of descriptors or memory: give running connections time to end.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """Accepts connections and hands each to the protocol that its first bytes name.

    Args:
        sock: listening and non-blocking; the listener closes it.
        magics: first bytes -> handler. A handler owns its (non-blocking) socket.
        default: for connections that begin otherwise.
        timeout: seconds for the first bytes.
    """

    def __init__(
        self,
        sock: socket.socket,
        magics: Mapping[bytes, Handler],
        default: Handler,
        timeout: float = FIRST_BYTES_TIMEOUT,
    ) -> None:
        self._sock = sock
        self._magics = dict(magics)
        self._default = default
        self._timeout = timeout
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Accept until cancelled; then the listening socket and all undecided ones are closed."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._sock)
                except OSError as error:
                    # Anything else concerns one connection that died in the queue (accept(2)).
                    if error.errno in _EXHAUSTED:
                        await asyncio.sleep(0.1)
                    continue
                task = loop.create_task(self._dispatch(connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._sock.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _dispatch(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # unix sockets have no Nagle to switch off
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(self._timeout):
                handler = await self._choose(connection)
        except (TimeoutError, OSError, EOFError) as error:
            log.debug("connection dropped before it said what it is: %r", error)
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        await handler(connection)

    async def _choose(self, connection: socket.socket) -> Handler:
        longest = max(map(len, self._magics))
        while True:
            await _readable(connection)
            first = connection.recv(longest, socket.MSG_PEEK)
            if not first:
                raise EOFError("closed before the first byte")
            for magic, handler in self._magics.items():
                if first.startswith(magic):
                    return handler
            if not any(magic.startswith(first) for magic in self._magics):
                return self._default
            await asyncio.sleep(_RETRY_INTERVAL)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def mark() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, mark)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
