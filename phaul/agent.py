"""The destination's daemon: takes migrations, several at once, over one listening socket.

GET /migrate             WebSocket: the conversation of one migration (phaul.destination)
GET /migrations/TOKEN    JSON {"state", "agent"}: for a source whose Commit had no answer
page stream              recognized by its magic, joined to its migration by the token
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from aiohttp import web

from phaul import handshake
from phaul.channel import HEARTBEAT, Channel
from phaul.destination import Destination
from phaul.errors import PeerError, PhaulError, UsageError
from phaul.messages import MAX_MESSAGE, SUBPROTOCOL, failed
from phaul.pageserver.frames import MAGIC, TOKEN_SIZE
from phaul.pageserver.receiver import answer, read_preamble
from phaul.pb import control_pb2 as control
from phaul.states import DestinationState
from phaul.transport.endpoint import Endpoint
from phaul.transport.listener import Listener

log = logging.getLogger(__name__)

# Seconds for a peer to introduce itself.
HELLO_TIMEOUT = 10.0
# Dropped tokens that are remembered. A forgotten one is answered as dropped all the same, and
# no source uses a token twice.
MAX_DROPPED = 1 << 16


class Agent:
    """Serves one end point until it is cancelled.

    Args:
        endpoint: where to listen.
        insecure: allow plain text where others than this machine may connect. Whoever can
            talk to an agent can start processes as root.

    Raises:
        UsageError: plain text on a public address without `insecure`.
    """

    def __init__(self, endpoint: Endpoint, insecure: bool = False) -> None:
        if not (endpoint.is_local or insecure):
            raise UsageError(
                f"{endpoint} is reachable from other machines, and the connection is plain "
                "text: listen on loopback or a unix socket, or add --insecure"
            )
        self._endpoint = endpoint
        self._id = os.urandom(TOKEN_SIZE)
        self._hello = control.Hello()
        self._active: dict[bytes, Destination] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: dict[bytes, DestinationState] = {}
        self._dropped: list[bytes] = []

    async def serve(self, ready: Callable[[Endpoint], None]) -> None:
        """Serve until cancelled; then drop what is not committed, finish what is.

        Args:
            ready: called once connections are accepted, with the end point in its final form
                (port 0 replaced).

        Raises:
            UsageError: cannot listen there.
        """
        self._hello = await asyncio.to_thread(handshake.hello, control.DESTINATION, agent_id=self._id)
        app = web.Application()
        app.router.add_get("/migrate", self._migrate)
        app.router.add_get("/migrations/{token}", self._state)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        server = runner.server
        assert server is not None

        async def http(sock: socket.socket) -> None:
            await asyncio.get_running_loop().connect_accepted_socket(server, sock)

        try:
            sock = self._endpoint.listen()
            listener = Listener(sock, {MAGIC: self._pages}, default=http)
            ready(self._endpoint.bound(sock))
            try:
                await listener.serve()
            finally:
                self._endpoint.forget()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await runner.cleanup()

    async def _migrate(self, request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse(
            protocols=(SUBPROTOCOL,),
            heartbeat=HEARTBEAT,
            max_msg_size=MAX_MESSAGE,
            compress=False,
            timeout=2.0,
        )
        await ws.prepare(request)
        # A task of its own: the web server may cancel its handlers, but a migration ends by
        # the rules of its protocol only.
        task = asyncio.create_task(self._converse(Channel(ws, "source")))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({task})
        return ws

    async def _converse(self, channel: Channel) -> None:
        try:
            theirs = await channel.expect(control.Hello, HELLO_TIMEOUT)
            await self._greet(channel, theirs)
            await self._take(channel, theirs.token)
        except PhaulError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("a migration failed in an unforeseen way")
        finally:
            await channel.close()

    async def _greet(self, channel: Channel, theirs: control.Hello) -> None:
        ours = control.Hello()
        ours.CopyFrom(self._hello)
        ours.token = theirs.token
        # Before it is checked, so that the source can tell for itself what does not fit.
        await channel.send(ours)
        try:
            handshake.check(theirs, ours)
            token = theirs.token
            if len(token) != TOKEN_SIZE or token in self._active or token in self._ended:
                raise PeerError("the token of the migration is not a new one")
        except PhaulError as error:
            await channel.send(failed(error))
            raise

    async def _take(self, channel: Channel, token: bytes) -> None:
        migration = Destination(channel, token)
        self._active[token] = migration
        log.info("migration %s: begins", token.hex())
        try:
            await migration.run()
        finally:
            del self._active[token]
            self._remember(token, migration.state)
            log.info("migration %s: %s", token.hex(), migration.state)

    def _remember(self, token: bytes, state: DestinationState) -> None:
        self._ended[token] = state
        if state is DestinationState.DROPPED:
            self._dropped.append(token)
            if len(self._dropped) > MAX_DROPPED:
                del self._ended[self._dropped.pop(0)]

    async def _state(self, request: web.Request) -> web.Response:
        try:
            token = bytes.fromhex(request.match_info["token"])
        except ValueError:
            token = b""
        if len(token) != TOKEN_SIZE:
            raise web.HTTPBadRequest(text="not a token")
        if token in self._active:
            state = self._active[token].state
        else:
            if token not in self._ended:
                # Whoever asks will act on the answer: from now on it has to stay true.
                self._remember(token, DestinationState.DROPPED)
            state = self._ended[token]
        return web.json_response({"state": state.value, "agent": self._id.hex()})

    async def _pages(self, sock: socket.socket) -> None:
        try:
            preamble = await read_preamble(sock, HELLO_TIMEOUT)
            migration = self._active.get(preamble.token)
            if await answer(sock, preamble, migration is not None) and migration is not None and migration.attach(sock):
                return
            log.warning("page stream refused: no migration waits for it")
        except PeerError as error:
            log.warning("%s", error)
        except asyncio.CancelledError:
            sock.close()
            raise
        sock.close()
