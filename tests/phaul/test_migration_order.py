"""Who may run the tree: every step failing, interrupted and cut off, on both sides.

The agent, the source, the sockets and the protocol are real; the engine is pretended (world.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import aiohttp
import pytest

import phaul.source
from phaul.agent import Agent
from phaul.channel import Channel
from phaul.errors import CannotMove, DumpError, InDoubt, PeerError, PhaulError, RestoreError
from phaul.messages import Payload
from phaul.pb import control_pb2 as control
from phaul.source import MigrateOptions, Source
from phaul.states import DestinationState, SourceState
from phaul.transport.endpoint import Endpoint, TcpEndpoint, UnixEndpoint
from tests.phaul.world import (
    DESTINATION_STEPS,
    PAGES,
    PID,
    SOURCE_STEPS,
    Proxy,
    World,
    agent_running,
    world,
)

__all__ = ["world"]  # the fixture

pytestmark = pytest.mark.asyncio

OPTIONS = MigrateOptions(connect_timeout=5)
# In a migration without trouble; pages go in two frames.
WHOLE = [
    "preflight",
    "check_files",
    "freeze",
    "collect",
    "stage",
    "read_pages",
    "write_pages",
    "finish",
    "hold",
    "resume",
    "kill",
]


def raises(error: Exception) -> Callable[[], None]:
    def step() -> None:
        raise error

    return step


async def ask(endpoint: Endpoint, token: bytes) -> DestinationState:
    assert isinstance(endpoint, TcpEndpoint)
    url = f"http://{endpoint.host}:{endpoint.port}/migrations/{token.hex()}"
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        assert response.status == 200
        return DestinationState((await response.json())["state"])


async def test_all_goes_well(world: World) -> None:
    async with agent_running() as (_, endpoint):
        lines: list[str] = []
        source = Source(PID, endpoint, OPTIONS, lines.append)
        report = await source.migrate()
        assert await ask(endpoint, source.token) is DestinationState.RUNNING
    assert list(dict.fromkeys(world.log)) == WHOLE
    assert (world.source, world.destination) == ("gone", "runs")
    assert world.memory == PAGES
    assert source.state is SourceState.DONE
    assert report.pids == [PID]
    assert report.bytes > len(PAGES)
    assert report.rate > 0
    assert 0 < report.downtime_s < report.total_s < 10
    assert sum(report.phases.values()) <= report.total_s
    assert json.loads(report.to_json())["phases"].keys() == report.phases.keys()
    assert any("running there" in line for line in lines)


async def test_over_a_unix_socket(world: World, tmp_path: object) -> None:
    async with agent_running(UnixEndpoint(f"{tmp_path}/agent")) as (_, endpoint):
        await Source(PID, endpoint, OPTIONS).migrate()
    assert (world.source, world.destination) == ("gone", "runs")
    assert world.memory == PAGES


@pytest.mark.parametrize("step", SOURCE_STEPS)
@pytest.mark.parametrize("error", [DumpError("no"), OSError(5, "unforeseen")])
async def test_a_step_fails_at_the_source(world: World, step: str, error: Exception) -> None:
    world.before[step] = raises(error)
    async with agent_running() as (_, endpoint):
        source = Source(PID, endpoint, OPTIONS)
        with pytest.raises(type(error)) as caught:
            await source.migrate()
        assert caught.value is error
        await world.settled("runs", "gone")
        assert source.state is SourceState.RESUMED
        assert await ask(endpoint, source.token) is DestinationState.DROPPED
    assert "resume" not in world.log
    assert "kill" not in world.log


@pytest.mark.parametrize("step", DESTINATION_STEPS)
@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (RestoreError("PID 7 is taken"), RestoreError),
        (OSError(28, "disk full"), PhaulError),
        (CannotMove(1, "fd 3", "odd"), RestoreError),
    ],
)
async def test_a_step_fails_at_the_destination(
    world: World, step: str, error: Exception, becomes: type[PhaulError]
) -> None:
    world.before[step] = raises(error)
    async with agent_running() as (_, endpoint):
        source = Source(PID, endpoint, OPTIONS)
        with pytest.raises(becomes) as caught:
            await source.migrate()
        assert type(caught.value) is becomes
        assert str(caught.value).startswith("destination: ")
        assert (str(error) if isinstance(error, PhaulError) else repr(error)) in str(caught.value)
        await world.settled("runs", "gone")
        assert await ask(endpoint, source.token) is DestinationState.DROPPED
    assert "resume" not in world.log


@pytest.mark.parametrize("step", [*SOURCE_STEPS, *DESTINATION_STEPS])
async def test_interrupted(world: World, step: str) -> None:
    async with agent_running() as (_, endpoint):
        source = Source(PID, endpoint, OPTIONS)
        loop = asyncio.get_running_loop()
        world.before[step] = lambda: pause_after(lambda: loop.call_soon_threadsafe(source.interrupt))
        with pytest.raises(asyncio.CancelledError):
            await source.migrate()
        await world.settled("runs", "gone")
        assert source.state is SourceState.RESUMED
        assert await ask(endpoint, source.token) is DestinationState.DROPPED
    assert "resume" not in world.log


def pause_after(action: Callable[[], object]) -> None:
    """In an engine thread: do something to the event loop and give it time to act."""
    import time

    action()
    time.sleep(0.1)


@pytest.mark.parametrize("step", [*SOURCE_STEPS, *DESTINATION_STEPS])
async def test_cut_off(world: World, step: str) -> None:
    async with agent_running() as (_, behind):
        proxy = Proxy(behind)
        async with proxy.open() as endpoint:
            source = Source(PID, endpoint, OPTIONS)
            world.before[step] = proxy.cut
            with pytest.raises(PeerError):
                await source.migrate()
            await world.settled("runs", "gone")
            assert source.state is SourceState.RESUMED
            assert await ask(behind, source.token) is DestinationState.DROPPED
    assert "resume" not in world.log


@pytest.mark.parametrize("step", DESTINATION_STEPS)
async def test_the_agent_ends(world: World, step: str) -> None:
    async with agent_running() as (_, endpoint):
        serving = next(task for task in asyncio.all_tasks() if "serve" in repr(task.get_coro()))
        loop = asyncio.get_running_loop()
        world.before[step] = lambda: pause_after(lambda: loop.call_soon_threadsafe(serving.cancel))
        with pytest.raises(PeerError, match="destination aborted: the agent ends"):
            await Source(PID, endpoint, OPTIONS).migrate()
        await world.settled("runs", "gone")


async def test_running_is_lost_and_asked_for(world: World) -> None:
    async with agent_running() as (_, behind):
        proxy = Proxy(behind)
        async with proxy.open() as endpoint:
            world.before["resume"] = proxy.cut
            source = Source(PID, endpoint, OPTIONS)
            await source.migrate()
    assert source.state is SourceState.DONE
    assert (world.source, world.destination) == ("gone", "runs")


async def test_running_is_lost_and_nobody_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phaul.source, "DOUBT_TIMEOUT", 1.0)
    async with agent_running() as (_, behind):
        proxy = Proxy(behind)
        async with proxy.open() as endpoint:

            def cut() -> None:
                proxy.refuses = True
                proxy.cut()

            world.before["resume"] = cut
            source = Source(PID, endpoint, OPTIONS)
            with pytest.raises(InDoubt) as caught:
                await source.migrate()
    text = str(caught.value)
    assert source.token.hex() in text
    assert f"kill -KILL {PID}" in text
    assert f"kill -CONT {PID}" in text
    assert source.state is SourceState.IN_DOUBT
    assert (world.source, world.destination) == ("held", "runs")
    assert world.log[-1] == "leave_held"
    assert "thaw" not in world.log


async def test_asking_can_be_interrupted(world: World) -> None:
    async with agent_running() as (_, behind):
        proxy = Proxy(behind)
        async with proxy.open() as endpoint:
            source = Source(PID, endpoint, OPTIONS)
            loop = asyncio.get_running_loop()

            def cut() -> None:
                proxy.refuses = True
                proxy.cut()
                loop.call_soon_threadsafe(source.interrupt)

            world.before["resume"] = cut
            with pytest.raises(InDoubt):
                await asyncio.wait_for(source.migrate(), 10)
    assert world.source == "held"


async def test_an_interrupt_after_the_commit_changes_nothing(world: World) -> None:
    async with agent_running() as (_, endpoint):
        source = Source(PID, endpoint, OPTIONS)
        loop = asyncio.get_running_loop()
        world.before["resume"] = lambda: pause_after(lambda: loop.call_soon_threadsafe(source.interrupt))
        await source.migrate()
    assert (world.source, world.destination) == ("gone", "runs")


async def test_a_new_agent_at_the_address_is_not_believed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent_running() as (agent, behind):
        proxy = Proxy(behind)
        async with proxy.open() as endpoint:

            def restart() -> None:
                # What an agent started anew looks like from outside.
                monkeypatch.setattr(agent, "_id", bytes(16))
                proxy.cut()

            world.before["resume"] = restart
            with pytest.raises(InDoubt):
                await Source(PID, endpoint, OPTIONS).migrate()
    assert world.source == "held"


async def test_commit_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Channel.send

    async def lose(self: Channel, payload: Payload) -> None:
        if isinstance(payload, control.Commit):
            await self.close()
            raise PeerError("lost the connection")
        await send(self, payload)

    monkeypatch.setattr(Channel, "send", lose)
    async with agent_running() as (_, endpoint):
        source = Source(PID, endpoint, OPTIONS)
        with pytest.raises(PeerError, match="lost the connection"):
            await source.migrate()
        assert source.state is SourceState.RESUMED
        await world.settled("runs", "gone")
    assert "resume" not in world.log


async def test_letting_go_fails_half_way(world: World) -> None:
    world.before["resume"] = raises(OSError(3, "who knows"))
    async with agent_running() as (_, endpoint):
        source = Source(PID, endpoint, OPTIONS)
        with pytest.raises(InDoubt, match="who knows"):
            await source.migrate()
        assert await ask(endpoint, source.token) is DestinationState.FAILED
    assert world.source == "held"


async def test_what_stands_against_it_is_named_before_the_freeze(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phaul.destination.check_files", lambda files: ["/lib/x: another build"])
    async with agent_running() as (_, endpoint):
        with pytest.raises(RestoreError, match=r"^destination: /lib/x: another build$"):
            await Source(PID, endpoint, OPTIONS).migrate()
    assert "freeze" not in world.log


async def test_a_token_is_good_for_one_migration(world: World) -> None:
    async with agent_running() as (_, endpoint):
        first = Source(PID, endpoint, OPTIONS)
        await first.migrate()
        again = Source(PID, endpoint, OPTIONS)
        again.token = first.token
        with pytest.raises(PeerError, match="not a new one"):
            await again.migrate()
    assert world.log.count("resume") == 1


async def test_what_was_said_to_be_dropped_never_runs(world: World) -> None:
    async with agent_running() as (_, endpoint):
        late = Source(PID, endpoint, OPTIONS)
        assert await ask(endpoint, late.token) is DestinationState.DROPPED
        with pytest.raises(PeerError, match="not a new one"):
            await late.migrate()
    assert (world.source, world.destination) == ("runs", "gone")


async def test_dropped_tokens_do_not_pile_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phaul.agent.MAX_DROPPED", 3)
    async with agent_running() as (agent, endpoint):
        source = Source(PID, endpoint, OPTIONS)
        await source.migrate()
        for number in range(10):
            await ask(endpoint, bytes([number] * 16))
        assert known(agent) == 4
        assert await ask(endpoint, source.token) is DestinationState.RUNNING


def known(agent: Agent) -> int:
    return len(agent._ended)
