"""The source of one migration. The mirror of `phaul.destination`: the same verbs.

    greet        connect, introduce each other
    preflight    both sides look for what stands against it; nothing is stopped
    freeze       the tree stops: the downtime begins
    stage        images go over, the destination builds empty processes
    pages        memory goes over
    finish       the rest; both sides hold a complete, stopped tree
    commit       one message later it runs there: the downtime ends

Until `commit` every failure leads to `resume`: the tree goes on here as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field

import aiohttp

from phaul import handshake
from phaul.aio import in_thread, regardless
from phaul.channel import HEARTBEAT, Channel
from phaul.engine.dump import Dump, DumpOptions, Preflight, preflight
from phaul.engine.thread import EngineThread
from phaul.errors import InDoubt, PeerError, PhaulError, RestoreError
from phaul.images.imageset import ImageSet
from phaul.messages import MAX_MESSAGE, SUBPROTOCOL, failed, image_pieces
from phaul.pageserver.sender import PageSender, open_stream
from phaul.pb import control_pb2 as control
from phaul.states import SOURCE_STEPS, DestinationState, Machine, SourceState, Verdict, verdict
from phaul.timeline import Timeline
from phaul.transport.endpoint import Endpoint, TcpEndpoint, UnixEndpoint, unreachable

# Seconds for the destination to do its part of a step; its life is watched by the heartbeat.
STEP_TIMEOUT = 300.0
# Seconds for the answer to Commit before the destination is asked on a new connection.
RUNNING_TIMEOUT = 30.0
# Seconds of asking a destination that does not answer; pause between two questions.
DOUBT_TIMEOUT = 60.0
DOUBT_PAUSE = 0.5
TOKEN_BYTES = 16


@dataclass(frozen=True)
class MigrateOptions:
    """What the user may choose.

    Attributes:
        shell_job: the tree belongs to a terminal session that stays here.
        tcp_established: move TCP connections, too; their addresses must be there.
        tcp_close: restore established TCP connections as closed ones.
        file_locks, link_remap, ghost_limit, ext_unix_sk: as in `DumpOptions`.
        connect_timeout: seconds for reaching the destination.
    """

    shell_job: bool = False
    tcp_established: bool = False
    tcp_close: bool = False
    file_locks: bool = False
    link_remap: bool = False
    ghost_limit: int = DumpOptions.ghost_limit
    ext_unix_sk: bool = False
    connect_timeout: float = 10.0


@dataclass
class Report:
    """What a migration has cost.

    Attributes:
        total_s: seconds from start to end.
        downtime_s: seconds from the begin of the freeze to the destination's Running, as seen
            here: one message longer than the tree has really stood still.
        bytes: contents of pages and images that went over.
        rate: bytes a second while pages went over.
        pids: of the processes, root first.
        phases: seconds of each.
    """

    total_s: float = 0.0
    downtime_s: float = 0.0
    bytes: int = 0
    rate: float = 0.0
    pids: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One JSON object on one line: the contract of `--json`."""
        return json.dumps(asdict(self))


class Source:
    """Moves one tree.

    Args:
        pid: of its root.
        endpoint: of the agent it goes to.
        options: the user's.
        progress: gets a line for people now and then.

    Attributes:
        token: names the migration at both sides.
    """

    def __init__(
        self,
        pid: int,
        endpoint: Endpoint,
        options: MigrateOptions,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.token = os.urandom(TOKEN_BYTES)
        self._pid = pid
        self._endpoint = endpoint
        self._options = options
        self._progress = progress
        self._machine = Machine(SourceState.GREETING, SOURCE_STEPS)
        self._timeline = Timeline()
        self._report = Report(phases=self._timeline.phases)
        self._engine = EngineThread()
        self._dump: Dump | None = None
        self._agent_id = b""
        self._task: asyncio.Task[object] | None = None
        self._give_up = asyncio.Event()

    @property
    def state(self) -> SourceState:
        """How far it is."""
        return self._machine.state

    def interrupt(self) -> None:
        """Take everything back (Ctrl-C). After Commit it only ends the asking when in doubt."""
        if self._machine.can(SourceState.RESUMED) and self.state is not SourceState.COMMITTED:
            if self._task is not None:
                self._task.cancel()
        else:
            self._give_up.set()

    async def migrate(self) -> Report:
        """Do all of it.

        Raises:
            InDoubt: the destination may run the tree; it stays stopped here.
            PhaulError: any other: the tree goes on here, nothing is left there.
            asyncio.CancelledError: interrupted; the tree goes on here.
        """
        self._task = asyncio.current_task()
        try:
            async with self._connected() as channel:
                await self._move(channel)
        finally:
            self._engine.close()
        self._report.total_s = self._timeline.total
        return self._report

    async def _move(self, channel: Channel) -> None:
        with contextlib.ExitStack() as cleanup:
            try:
                async with channel.guard():
                    await self._greet(channel)
                    self._dump = await self._preflight(channel)
                    sender = await self._open_stream(self._dump, cleanup)
                    cleanup.enter_context(_no_collector())
                    frozen_at = time.monotonic()
                    images = await self._freeze(self._dump)
                    await self._stage(channel, images)
                    await self._pages(channel, sender, self._dump)
                    await self._finish(channel, self._dump)
                    self._machine.to(SourceState.COMMITTED)
            except BaseException as error:
                self._machine.to(SourceState.RESUMED)
                await regardless(self._resume(channel, error))
                raise
            await regardless(self._commit(channel, self._dump, frozen_at))

    async def _greet(self, channel: Channel) -> None:
        with self._timeline.span("greet"):
            ours = await asyncio.to_thread(handshake.hello, control.SOURCE, self.token)
            await channel.send(ours)
            theirs = await channel.expect(control.Hello, self._options.connect_timeout)
            handshake.check(ours, theirs)
            self._agent_id = theirs.agent_id
        self._machine.to(SourceState.PREFLIGHT)
        self._progress(f"{self._endpoint}: phaul {theirs.phaul_version}, kernel {theirs.kernel_release}")

    async def _preflight(self, channel: Channel) -> Dump:
        options = DumpOptions(
            shell_job=self._options.shell_job,
            tcp_established=self._options.tcp_established,
            tcp_close=self._options.tcp_close,
            file_locks=self._options.file_locks,
            link_remap=self._options.link_remap,
            ghost_limit=self._options.ghost_limit,
            ext_unix_sk=self._options.ext_unix_sk,
        )
        with self._timeline.span("preflight"):
            found = await self._engine.run(preflight, self._pid, options)
            await channel.send(_preflight_message(found, self._options))
            reply = await channel.expect(control.PreflightReply, STEP_TIMEOUT)
        problems = [*reply.taken, *reply.files]
        if problems:
            raise RestoreError(f"destination: {'; '.join(problems)}")
        self._report.pids = list(found.pids)
        self._progress(
            f"preflight: {len(found.pids)} processes, {len(found.tids)} threads, "
            f"{len(found.files)} files, about {found.bytes >> 20} MiB"
        )
        return Dump(self._pid, options)

    async def _open_stream(self, dump: Dump, cleanup: contextlib.ExitStack) -> PageSender:
        with self._timeline.span("connect pages"):
            stream = await asyncio.to_thread(open_stream, self._endpoint, self.token, self._options.connect_timeout)
        cleanup.callback(stream.close)
        return PageSender(stream, dump.read_pages)

    async def _freeze(self, dump: Dump) -> ImageSet:
        self._machine.to(SourceState.FROZEN)
        with self._timeline.span("freeze"):
            await self._engine.run(dump.freeze)
        self._progress("frozen")
        with self._timeline.span("collect"):
            return await self._engine.run(dump.collect)

    async def _stage(self, channel: Channel, images: ImageSet) -> None:
        with self._timeline.span("images"):
            for name in images.names():
                data = images.encode_file(name)
                self._report.bytes += len(data)
                for piece in image_pieces(name, data):
                    await channel.send(piece)
        with self._timeline.span("stage"):
            await channel.send(control.Stage())
            await channel.expect(control.Staged, STEP_TIMEOUT)
        self._machine.to(SourceState.STAGED)
        self._progress("staged: the destination takes pages")

    async def _pages(self, channel: Channel, sender: PageSender, dump: Dump) -> None:
        with self._timeline.span("pages"):
            begin = time.monotonic()
            targets = [(name, dump.pages_of(name)) for name in dump.page_targets()]
            await in_thread(lambda: sender.send(targets), sender.cancel)
            totals = await in_thread(sender.end, sender.cancel)
            await channel.send(control.PagesDone(frames=totals.frames, bytes=totals.data))
            seconds = time.monotonic() - begin
        self._report.bytes += totals.data
        self._report.rate = totals.data / seconds
        self._progress(
            f"pages: {totals.data / (1 << 20):.1f} MiB in {seconds:.3f} s ({self._report.rate / 1e6:.0f} MB/s)"
        )

    async def _finish(self, channel: Channel, dump: Dump) -> None:
        with self._timeline.span("finish"):
            await channel.send(control.Finish())
            await channel.expect(control.Prepared, STEP_TIMEOUT)
        self._machine.to(SourceState.PREPARED)
        with self._timeline.span("hold"):
            await self._engine.run(dump.hold)

    async def _commit(self, channel: Channel, dump: Dump, frozen_at: float) -> None:
        with self._timeline.span("commit"):
            try:
                await channel.send(control.Commit())
                await channel.expect(control.Running, RUNNING_TIMEOUT)
            except PhaulError as error:
                await self._settle(dump, error)
        self._report.downtime_s = time.monotonic() - frozen_at
        self._machine.to(SourceState.DONE)
        self._progress(f"running there after {self._report.downtime_s * 1e3:.1f} ms")
        with self._timeline.span("kill"):
            try:
                await self._engine.run(dump.kill)
            except PhaulError as error:
                raise InDoubt(
                    f"the tree runs at {self._endpoint}, and its stopped copy here could not "
                    f"be ended ({error}): kill -KILL {self._pid_list()}"
                ) from error

    async def _settle(self, dump: Dump, error: PhaulError) -> None:
        # Returns when the tree runs there.
        self._progress(f"no answer to the commit ({error}); asking {self._endpoint}")
        match await self._ask_until_known():
            case Verdict.KILL:
                return
            case Verdict.RESUME:
                self._machine.to(SourceState.RESUMED)
                await self._engine.run(dump.thaw)
                raise error
            case _:
                self._machine.to(SourceState.IN_DOUBT)
                await self._engine.run(dump.leave_held)
                raise InDoubt(
                    f"{self._endpoint} was told to run the tree and does not say whether it "
                    f"does ({error}). PIDs {self._pid_list()} stay stopped here. Ask its agent "
                    f"for /migrations/{self.token.hex()} or look for them there; if they run "
                    f"there: kill -KILL {self._pid_list()}; if they are not there and the "
                    f"agent has ended: kill -CONT {self._pid_list()}"
                ) from error

    async def _ask_until_known(self) -> Verdict:
        deadline = time.monotonic() + DOUBT_TIMEOUT
        while time.monotonic() < deadline and not self._give_up.is_set():
            decision = await self._ask()
            if decision is not Verdict.ASK_AGAIN:
                return decision
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DOUBT_PAUSE):
                    await self._give_up.wait()
        return Verdict.STAY

    async def _ask(self) -> Verdict:
        try:
            async with (
                asyncio.timeout(self._options.connect_timeout),
                _http_session(self._endpoint) as http,
                http.get(_url(self._endpoint, f"/migrations/{self.token.hex()}")) as response,
            ):
                answer = await response.json()
                state = DestinationState(answer["state"])
                same_agent = bytes.fromhex(answer["agent"]) == self._agent_id
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError):
            return Verdict.ASK_AGAIN
        return verdict(state, same_agent)

    async def _resume(self, channel: Channel, error: BaseException) -> None:
        try:
            if self._dump is not None:
                await self._engine.run(self._dump.thaw)
                self._progress("taken back: the tree goes on here")
        finally:
            if not channel.ended.done():
                reason = failed(error).text
                if isinstance(error, asyncio.CancelledError):
                    reason = "interrupted"
                with contextlib.suppress(PhaulError):
                    await channel.send(control.Abort(reason=reason))

    def _pid_list(self) -> str:
        return " ".join(map(str, self._report.pids))

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Channel]:
        async with _http_session(self._endpoint) as http:
            try:
                async with asyncio.timeout(self._options.connect_timeout):
                    ws = await http.ws_connect(
                        _url(self._endpoint, "/migrate"),
                        protocols=(SUBPROTOCOL,),
                        heartbeat=HEARTBEAT,
                        max_msg_size=MAX_MESSAGE,
                    )
            except TimeoutError:
                raise PeerError(f"no answer from {self._endpoint} in time") from None
            except aiohttp.ClientConnectorError as error:
                raise unreachable(self._endpoint, error.os_error) from error
            except aiohttp.WSServerHandshakeError as error:
                raise PeerError(f"{self._endpoint} is no phaul agent (HTTP {error.status})") from error
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise PeerError(f"{self._endpoint} does not answer as a phaul agent") from error
            if ws.protocol != SUBPROTOCOL:
                await ws.close()
                raise PeerError(f"{self._endpoint} is no phaul agent (another WebSocket)")
            channel = Channel(ws, "destination")
            try:
                yield channel
            finally:
                await regardless(channel.close())


def _preflight_message(found: Preflight, options: MigrateOptions) -> control.Preflight:
    return control.Preflight(
        pids=found.pids,
        tids=found.tids,
        files=[control.NeededFile(path=file.path, size=file.size, build_id=file.build_id) for file in found.files],
        bytes=found.bytes,
        shell_job=options.shell_job,
        tcp_established=options.tcp_established,
    )


def _http_session(endpoint: Endpoint) -> aiohttp.ClientSession:
    if isinstance(endpoint, UnixEndpoint):
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(endpoint.path))
    return aiohttp.ClientSession()


def _url(endpoint: Endpoint, path: str) -> str:
    if isinstance(endpoint, TcpEndpoint):
        return f"http{str(endpoint).removeprefix('tcp')}{path}"
    return f"http://localhost{path}"


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    # A full collection stops every thread for milliseconds.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
