"""What users get wrong: one clear line, a documented exit code, and nothing has changed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from aiohttp import web

from phaul import handshake
from phaul.channel import Channel
from phaul.errors import (
    NoSuchProcess,
    NotPermitted,
    PeerError,
    RestoreError,
    UsageError,
    VersionMismatch,
)
from phaul.messages import SUBPROTOCOL
from phaul.pb import control_pb2 as control
from tests.cli.run import agent, assert_error, phaul, phaul_as_nobody, sleeper
from tests.support.visible import difference, visible_state

pytestmark = pytest.mark.root

NO_SUCH_PID = 4194304  # PID_MAX_LIMIT: one more than any
KTHREADD = 2


@pytest.fixture(scope="module")
def here() -> Iterator[str]:
    """An agent on this very machine: every PID of a source is taken there."""
    with agent() as address:
        yield address


@pytest.mark.parametrize(
    ("pid", "says"),
    [
        (NO_SUCH_PID, f"PID {NO_SUCH_PID}: no such process"),
        (KTHREADD, f"PID {KTHREADD}: is a kernel thread"),
        (-1, "PID -1"),
        (0, "PID 0"),
    ],
)
@pytest.mark.parametrize("command", ["dump", "migrate"])
def test_pids_that_are_none(here: str, tmp_path: object, command: str, pid: int, says: str) -> None:
    words = ["dump", f"-t{pid}", "-D", tmp_path] if command == "dump" else ["migrate", "--", pid, here]
    assert_error(phaul(*words), NoSuchProcess, says)


@pytest.mark.parametrize(
    "arguments",
    [
        ["agent", "--listen", "tcp://127.0.0.1:0"],
        ["check"],
        ["dump", "-t", "1", "-D", "/tmp"],
        ["migrate", "1", "HERE"],
    ],
)
def test_not_root(here: str, arguments: list[str]) -> None:
    done = phaul_as_nobody(*(here if word == "HERE" else word for word in arguments))
    assert_error(done, NotPermitted, "root")


def test_a_pid_that_is_taken_at_the_destination(here: str) -> None:
    with sleeper() as process:
        before = visible_state(process.pid)
        done = phaul("migrate", process.pid, here)
        says = f"destination: PID {process.pid} is taken (sleep)"
        assert_error(done, RestoreError, says)
        assert "frozen" not in done.stderr
        assert not difference(before, visible_state(process.pid))


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    with sleeper() as process:
        done = phaul("migrate", process.pid, address)
        assert_error(done, PeerError, f"cannot reach {address}: Connection refused")
        done = phaul("migrate", process.pid, "unix:///no/such/socket")
        assert_error(done, PeerError, "cannot reach unix:///no/such/socket: No such file")
        done = phaul("migrate", process.pid, "tcp://no-such-host.invalid:1")
        assert_error(done, PeerError, "cannot reach tcp://no-such-host.invalid:1: ")


@contextlib.contextmanager
def tcp_server(act: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that listens, and is no agent."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        act(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


HTTP = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda sock: (sock.recv(4096), sock.sendall(HTTP)), "is no phaul agent (HTTP 200)"),
        (lambda sock: sock.sendall(b"220 mail ESMTP\r\n"), "does not answer as a phaul agent"),
        (lambda sock: sock.sendall(b"\x00\xff" * 50000), "does not answer as a phaul agent"),
        (lambda sock: sock.recv(4096), "does not answer as a phaul agent"),
        (lambda sock: (sock.recv(4096), sock.recv(1)), "in time"),
    ],
    ids=["http", "mail", "binary", "hangs-up", "silent"],
)
def test_foreign_destinations(act: Callable[[socket.socket], None], says: str) -> None:
    with sleeper() as process, tcp_server(act) as address:
        done = phaul("migrate", process.pid, address, "--connect-timeout", "1", timeout=10)
        assert_error(done, PeerError, says)
        assert address in done.stderr
        assert process.poll() is None


@contextlib.contextmanager
def web_server(handler: Callable[[web.Request], object]) -> Iterator[str]:
    """A web server of our own with one handler, in a thread."""
    ready: list[str] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/migrate", handler)  # type: ignore[arg-type]
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.append(f"tcp://127.0.0.1:{runner.addresses[0][1]}")
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait(10)
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_a_websocket_that_is_no_agent() -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.receive()
        return ws

    with sleeper() as process, web_server(handler) as address:
        done = phaul("migrate", process.pid, address)
        assert_error(done, PeerError, f"{address} is no phaul agent (another WebSocket)")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("protocol", 99, "control protocol: 1 at the source, 99 at the destination"),
        ("arch", "riscv64", "at the source, riscv64 at the destination"),
        ("vdso_id", b"\xaa" * 16, "aaaaaaaaaaaaaaaa"),
    ],
)
def test_a_destination_that_does_not_fit(field: str, value: object, says: str) -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(protocols=(SUBPROTOCOL,))
        await ws.prepare(request)
        channel = Channel(ws, "source")
        await channel.expect(control.Hello, 5)
        ours = handshake.hello(control.DESTINATION, agent_id=bytes(16))
        setattr(ours, field, value)
        await channel.send(ours)
        await asyncio.wait({channel.ended}, timeout=5)
        await channel.close()
        return ws

    with sleeper() as process, web_server(handler) as address:
        before = visible_state(process.pid)
        assert_error(phaul("migrate", process.pid, address), VersionMismatch, says)
        assert not difference(before, visible_state(process.pid))


def test_plain_text_on_a_public_address() -> None:
    done = phaul("agent", "--listen", "tcp://0.0.0.0:0")
    assert_error(done, UsageError, "add --insecure")


def test_an_address_that_is_taken(here: str) -> None:
    assert_error(phaul("agent", "--listen", here), UsageError, "Address already in use")
