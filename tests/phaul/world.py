"""A pretended engine, for the order of things only: who may run the tree, whatever goes wrong.

A `World` has one tree of two pages. `FakeDump` and `FakeRestore` stand where the engine's classes
stand and write down what is asked of them; each step can fail, or call a function of the
test first (cut the connection, interrupt ...). At no time may the tree run at both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import ClassVar

import pytest

import phaul.destination
import phaul.handshake
import phaul.source
from phaul.agent import Agent
from phaul.engine.dump import DumpOptions, Preflight
from phaul.engine.needed import NeededFile
from phaul.engine.restore import RestoreOptions
from phaul.images.imageset import ImageSet
from phaul.images.pagemap import PageRange
from phaul.images.pb.inventory_pb2 import inventory_entry
from phaul.pb import control_pb2 as control
from phaul.transport.endpoint import Endpoint, TcpEndpoint

PID = 4000000  # above pid_max of most systems: never taken here
TARGET = f"pagemap-{PID}"
RANGES = [PageRange(0x10000, 1), PageRange(0x40000, 300)]
PAGES = bytes(index % 251 for index in range(301)) * 4096

SOURCE_STEPS = ["preflight", "freeze", "collect", "read_pages", "hold"]
DESTINATION_STEPS = ["check_files", "stage", "write_pages", "finish"]


class World:
    """One tree, two sides.

    Attributes:
        log: steps in the order in which they began.
        before: step -> what to call when it begins; may raise.
        source, destination: "runs", "stopped", "held" or "gone".
    """

    current: ClassVar[World]

    def __init__(self) -> None:
        World.current = self
        self.log: list[str] = []
        self.before: dict[str, Callable[[], None]] = {}
        self.source = "runs"
        self.destination = "gone"
        self.memory = bytearray(len(PAGES))
        self._lock = threading.Lock()

    def step(self, name: str) -> None:
        self.log.append(name)
        self.before.get(name, lambda: None)()

    def now(self, *, source: str | None = None, destination: str | None = None) -> None:
        with self._lock:
            self.source = source or self.source
            self.destination = destination or self.destination
            assert (self.source, self.destination) != ("runs", "runs"), self.log

    async def settled(self, source: str, destination: str) -> None:
        """Waits until both sides are in these states."""
        deadline = time.monotonic() + 10
        while (self.source, self.destination) != (source, destination):
            assert time.monotonic() < deadline, (self.source, self.destination, self.log)
            await asyncio.sleep(0.01)


def preflight(pid: int, options: DumpOptions) -> Preflight:
    World.current.step("preflight")
    return Preflight([PID], [PID, PID + 1], [NeededFile(b"/bin/true", -1, b"")], 4096)


def check_files(files: Sequence[NeededFile]) -> list[str]:
    assert files == [NeededFile(b"/bin/true", -1, b"")]
    World.current.step("check_files")
    return []


class FakeDump:
    """In the place of phaul.engine.dump.Dump."""

    def __init__(self, pid: int, options: DumpOptions) -> None:
        self.world = World.current

    def freeze(self) -> None:
        self.world.step("freeze")
        self.world.now(source="stopped")

    def collect(self) -> ImageSet:
        self.world.step("collect")
        images = ImageSet()
        images.add("inventory", inventory_entry(img_version=2))
        return images

    def page_targets(self) -> list[str]:
        return [TARGET]

    def pages_of(self, target: str) -> list[PageRange]:
        return RANGES

    def read_pages(self, target: str, ranges: Sequence[PageRange], buffer: memoryview) -> None:
        self.world.step("read_pages")
        offset = _offset(ranges)
        buffer[:] = PAGES[offset : offset + len(buffer)]

    def hold(self) -> None:
        self.world.step("hold")
        self.world.now(source="held")

    def thaw(self) -> None:
        self.world.log.append("thaw")
        self.world.now(source="runs")

    def leave_held(self) -> None:
        assert self.world.source == "held"
        self.world.log.append("leave_held")

    def kill(self) -> None:
        self.world.step("kill")
        self.world.now(source="gone")


class FakeRestore:
    """In the place of phaul.engine.restore.Restore."""

    def __init__(self, images: ImageSet, options: RestoreOptions) -> None:
        assert images.names() == ["inventory"]
        self.world = World.current

    def stage(self) -> None:
        self.world.now(destination="stopped")
        self.world.step("stage")

    def write_pages(self, target: str, ranges: Sequence[PageRange], data: memoryview) -> None:
        self.world.step("write_pages")
        assert target == TARGET
        offset = _offset(ranges)
        self.world.memory[offset : offset + len(data)] = data

    def finish(self) -> None:
        self.world.step("finish")

    def resume(self) -> None:
        self.world.step("resume")
        self.world.now(destination="runs")

    def abort(self) -> None:
        assert self.world.destination == "stopped"
        self.world.log.append("abort")
        self.world.now(destination="gone")


def _offset(ranges: Sequence[PageRange]) -> int:
    if ranges[0] == RANGES[0]:
        return 0
    return 4096 + ranges[0].vaddr - RANGES[1].vaddr


def hello(role: control.Role, token: bytes = b"", agent_id: bytes = b"") -> control.Hello:
    return control.Hello(
        phaul_version="1.2.3",
        protocol=1,
        role=role,
        arch="x86_64",
        page_size=4096,
        kernel_release="6.18",
        features=dict.fromkeys((*phaul.handshake.SOURCE_NEEDS, *phaul.handshake.DESTINATION_NEEDS), True),
        cpu_features=["avx2", "sse2"],
        vdso_id=b"v" * 16,
        token=token,
        agent_id=agent_id,
    )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A fresh world, with the pretended engine in its place."""
    monkeypatch.setattr(phaul.source, "preflight", preflight)
    monkeypatch.setattr(phaul.source, "Dump", FakeDump)
    monkeypatch.setattr(phaul.destination, "Restore", FakeRestore)
    monkeypatch.setattr(phaul.destination, "check_files", check_files)
    monkeypatch.setattr(phaul.handshake, "hello", hello)
    return World()


@contextlib.asynccontextmanager
async def agent_running(endpoint: Endpoint | None = None) -> AsyncIterator[tuple[Agent, Endpoint]]:
    """A real agent, and where it listens."""
    ready: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
    agent = Agent(endpoint or TcpEndpoint("127.0.0.1", 0))
    serving = asyncio.create_task(agent.serve(ready.set_result))
    try:
        yield agent, await asyncio.wait_for(ready, 10)
    finally:
        serving.cancel()
        await asyncio.wait({serving})


class Proxy:
    """Stands between source and agent; can cut all connections, and refuse new ones."""

    def __init__(self, behind: Endpoint) -> None:
        assert isinstance(behind, TcpEndpoint)
        self._behind = behind
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.get_running_loop()
        self.refuses = False

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Endpoint]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield TcpEndpoint("127.0.0.1", server.sockets[0].getsockname()[1])
        finally:
            server.close()
            self._cut()

    def cut(self) -> None:
        """From any thread: all connections die at once; returns when both sides saw it."""
        self._loop.call_soon_threadsafe(self._cut)
        time.sleep(0.1)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        if self.refuses:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(self._behind.host, self._behind.port)
        self._writers.append(there_writer)
        await asyncio.gather(self._copy(reader, there_writer), self._copy(there_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()
