"""An agent and those who talk to it without being a source."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest

from phaul.channel import Channel
from phaul.errors import PeerError, PhaulError, VersionMismatch
from phaul.messages import MAX_MESSAGE, SUBPROTOCOL, encode
from phaul.pageserver.frames import ANSWER_SIZE, Preamble, check_answer
from phaul.pb import control_pb2 as control
from phaul.transport.endpoint import Endpoint, TcpEndpoint
from tests.phaul.world import World, agent_running, hello, world

__all__ = ["world"]  # the fixture

pytestmark = pytest.mark.asyncio

TOKEN = b"0123456789abcdef"


def url(endpoint: Endpoint, path: str) -> str:
    assert isinstance(endpoint, TcpEndpoint)
    return f"http://{endpoint.host}:{endpoint.port}{path}"


@contextlib.asynccontextmanager
async def websocket(endpoint: Endpoint) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(url(endpoint, "/migrate"), protocols=(SUBPROTOCOL,)) as ws,
    ):
        yield ws


@contextlib.asynccontextmanager
async def greeted(endpoint: Endpoint) -> AsyncIterator[Channel]:
    """A channel on which both Hellos have gone."""
    async with websocket(endpoint) as ws:
        channel = Channel(ws, "destination")
        await channel.send(hello(control.SOURCE, TOKEN))
        await channel.expect(control.Hello, 5)
        yield channel
        await channel.close()


async def still_works(endpoint: Endpoint) -> None:
    """The agent is none the worse for it."""
    async with aiohttp.ClientSession() as http, http.get(url(endpoint, f"/migrations/{'ab' * 16}")) as response:
        assert (await response.json())["state"] == "dropped"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/", 404), ("/migrate", 400), ("/migrations/xyz", 400), ("/migrations/ab", 400)],
)
async def test_other_requests(world: World, path: str, status: int) -> None:
    async with (
        agent_running() as (_, endpoint),
        aiohttp.ClientSession() as http,
        http.get(url(endpoint, path)) as response,
    ):
        assert response.status == status


@pytest.mark.parametrize(
    "send",
    [
        lambda ws: ws.send_str("hello"),
        lambda ws: ws.send_bytes(b""),
        lambda ws: ws.send_bytes(b"\xff" * 100),
        lambda ws: ws.send_bytes(bytes(MAX_MESSAGE + 1)),
        lambda ws: ws.send_bytes(encode(control.Commit())),
        lambda ws: ws.send_bytes(encode(hello(control.DESTINATION, TOKEN))),
        lambda ws: ws.send_bytes(encode(hello(control.SOURCE, b"short"))),
    ],
    ids=["text", "empty", "garbage", "huge", "commit-first", "wrong-role", "bad-token"],
)
async def test_those_who_do_not_greet(world: World, send: Callable[[aiohttp.ClientWebSocketResponse], object]) -> None:
    async with agent_running() as (_, endpoint):
        async with websocket(endpoint) as ws:
            await send(ws)  # type: ignore[misc]
            async with asyncio.timeout(5):
                while (await ws.receive()).type is aiohttp.WSMsgType.BINARY:
                    pass
            assert ws.closed
        await still_works(endpoint)
    assert world.log == []


async def test_silence_is_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phaul.agent.HELLO_TIMEOUT", 0.1)
    async with agent_running() as (_, endpoint), websocket(endpoint) as ws:
        async with asyncio.timeout(5):
            assert (await ws.receive()).type is aiohttp.WSMsgType.CLOSE


async def test_a_source_of_another_version_gets_both_hellos_and_a_reason(world: World) -> None:
    async with agent_running() as (_, endpoint), websocket(endpoint) as ws:
        channel = Channel(ws, "destination")
        ours = hello(control.SOURCE, TOKEN)
        ours.protocol = 99
        await channel.send(ours)
        theirs = await channel.expect(control.Hello, 5)
        assert theirs.protocol == 1
        with pytest.raises(VersionMismatch, match="99 at the source, 1 at the destination"):
            await channel.receive(5)
        await channel.close()


PIECE = control.ImageFile(name="inventory", data=b"garbage", last=True)


@pytest.mark.parametrize(
    ("payloads", "says"),
    [
        ([control.Commit()], "sent Commit where Preflight is due"),
        ([control.Stage()], "sent Stage where Preflight is due"),
        ([control.Preflight(pids=[0])], "has a PID 0"),
        ([control.Preflight(pids=[4294967295])], "has a PID 4294967295"),
        ([control.Preflight(), control.Finish()], "Finish where ImageFile or Stage is due"),
        ([control.Preflight(), control.Hello()], "Hello where ImageFile or Stage is due"),
        ([control.Preflight(), PIECE, PIECE], "out of order"),
        ([control.Preflight(), PIECE, control.Stage()], "inventory"),
        (
            [control.Preflight(), control.ImageFile(name="../../etc/x", last=True), control.Stage()],
            "etc",
        ),
    ],
)
async def test_conversations_that_go_wrong(
    world: World, payloads: list[control.Hello], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phaul.destination.check_files", lambda files: [])
    async with agent_running() as (_, endpoint):

        async def talk() -> None:
            async with greeted(endpoint) as channel:
                for payload in payloads:
                    await channel.send(payload)
                while True:
                    await channel.receive(5)

        with pytest.raises(PhaulError, match="destination: ") as caught:
            await talk()
        assert says in str(caught.value)
        await still_works(endpoint)
    assert "resume" not in world.log
    assert world.destination == "gone"


async def test_a_page_stream_without_migration_is_refused(world: World) -> None:
    async with agent_running() as (_, endpoint):
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)  # type: ignore[union-attr]
        writer.write(Preamble(TOKEN).pack())
        with pytest.raises(PeerError, match="does not know this migration"):
            check_answer(await reader.readexactly(ANSWER_SIZE))
        assert await reader.read() == b""
        writer.close()


async def test_a_migration_takes_one_page_stream(world: World) -> None:
    async with agent_running() as (_, endpoint), greeted(endpoint):
        for expected in (True, False):
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)  # type: ignore[union-attr]
            writer.write(Preamble(TOKEN).pack())
            check_answer(await reader.readexactly(ANSWER_SIZE))
            if expected:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.1)
            else:
                assert await reader.read() == b""
            writer.close()


async def test_http_is_served_byte_by_byte_too(world: World) -> None:
    async with agent_running() as (_, endpoint):
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)  # type: ignore[union-attr]
        for byte in b"GET /nothing HTTP/1.0\r\n\r\n":
            writer.write(bytes([byte]))
            await writer.drain()
        assert b"404" in await reader.readline()
        writer.close()
