"""The destination of one migration. The mirror of `phaul.source`: the same verbs.

Whatever fails before Commit, and whoever ends the conversation, leads to `drop()`: all that
has been built is killed and the source is told. After Commit nothing can end it but the tree
running, or an engine that could not let it go.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterable
from contextlib import suppress

from phaul.aio import in_thread, regardless
from phaul.channel import Channel
from phaul.engine.needed import NeededFile, check_files
from phaul.engine.restore import Restore, RestoreOptions
from phaul.engine.thread import EngineThread
from phaul.errors import PeerError, PhaulError
from phaul.images.imageset import ImageSet
from phaul.messages import ImageCollector, failed
from phaul.pageserver.receiver import PageReceiver
from phaul.pb import control_pb2 as control
from phaul.states import DESTINATION_STEPS, DestinationState, Machine

log = logging.getLogger(__name__)

# Seconds for the source to do its part of a step; its life is watched by the heartbeat.
STEP_TIMEOUT = 600.0
# Seconds for the page stream to come after it was asked for.
STREAM_TIMEOUT = 30.0
# No kernel gives a larger number (include/linux/threads.h).
PID_MAX_LIMIT = 1 << 22


class Destination:
    """One incoming migration.

    Args:
        channel: to the source, whose Hello was taken and answered.
        token: names the migration.

    Attributes:
        token: as given.
    """

    def __init__(self, channel: Channel, token: bytes) -> None:
        self.token = token
        self._channel = channel
        self._machine = Machine(DestinationState.READY, DESTINATION_STEPS)
        self._engine = EngineThread()
        self._options = RestoreOptions()
        self._restore: Restore | None = None
        self._stream: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

    @property
    def state(self) -> DestinationState:
        """How far it is: what a source in doubt gets to hear."""
        return self._machine.state

    def attach(self, stream: socket.socket) -> bool:
        """Give the migration its page stream.

        Returns:
            False when it has one, or takes none any more; the socket stays the caller's.
        """
        if self._stream.done() or self.state is DestinationState.DROPPED:
            return False
        self._stream.set_result(stream)
        return True

    async def run(self) -> None:
        """Take the whole migration. Cancelling it before Commit drops it.

        Raises:
            PhaulError: it was dropped, for this reason; nothing is left, the source knows.
        """
        try:
            await self._take()
        finally:
            if self._stream.done() and not self._stream.cancelled():
                self._stream.result().close()
            self._stream.cancel()
            self._engine.close()

    async def _take(self) -> None:
        try:
            async with self._channel.guard():
                await self._preflight()
                await self._stage(await self._images())
                await self._pages()
                await self._finish()
                await self._channel.expect(control.Commit, STEP_TIMEOUT)
                # No await between the arrival of Commit and this step: from here on the
                # source gets RUNNING (or FAILED) for an answer, and before it DROPPED.
                self._machine.to(DestinationState.COMMITTED)
        except BaseException as error:
            self._machine.to(DestinationState.DROPPED)
            await regardless(self._drop(error))
            raise
        await regardless(self._commit())

    async def _preflight(self) -> None:
        wanted = await self._channel.expect(control.Preflight, STEP_TIMEOUT)
        self._options = RestoreOptions(shell_job=wanted.shell_job, tcp_established=wanted.tcp_established)
        files = [NeededFile(file.path, file.size, file.build_id) for file in wanted.files]
        reply = control.PreflightReply(
            taken=taken([*wanted.pids, *wanted.tids]),
            files=await asyncio.to_thread(check_files, files),
        )
        await self._channel.send(reply)

    async def _images(self) -> dict[str, bytes]:
        collector = ImageCollector()
        while True:
            payload = await self._channel.receive(STEP_TIMEOUT)
            match payload:
                case control.ImageFile():
                    collector.add(payload)
                case control.Stage():
                    return collector.finish()
                case _:
                    raise self._channel.unexpected(payload, "ImageFile or Stage")

    async def _stage(self, files: dict[str, bytes]) -> None:
        self._machine.to(DestinationState.STAGING)
        images = await asyncio.to_thread(_decode, files)
        self._restore = Restore(images, self._options)
        await self._engine.run(self._restore.stage)
        await self._channel.send(control.Staged())

    async def _pages(self) -> None:
        assert self._restore is not None
        try:
            async with asyncio.timeout(STREAM_TIMEOUT):
                stream = await asyncio.shield(self._stream)
        except TimeoutError:
            raise PeerError("the source opened no page stream") from None
        receiver = PageReceiver(stream, self._restore.write_pages)
        totals = await in_thread(receiver.run, receiver.cancel)
        done = await self._channel.expect(control.PagesDone, STEP_TIMEOUT)
        if (done.frames, done.bytes) != (totals.frames, totals.data):
            raise PeerError(
                f"the source sent {done.frames} frames with {done.bytes} bytes, "
                f"{totals.frames} with {totals.data} have come"
            )

    async def _finish(self) -> None:
        assert self._restore is not None
        await self._channel.expect(control.Finish, STEP_TIMEOUT)
        await self._engine.run(self._restore.finish)
        self._machine.to(DestinationState.PREPARED)
        await self._channel.send(control.Prepared())

    async def _commit(self) -> None:
        assert self._restore is not None
        try:
            await self._engine.run(self._restore.resume)
        except Exception as error:
            self._machine.to(DestinationState.FAILED)
            with suppress(PhaulError):
                await self._channel.send(failed(error))
            raise
        self._machine.to(DestinationState.RUNNING)
        # A source that is gone asks for it (GET /migrations/TOKEN).
        with suppress(PhaulError):
            await self._channel.send(control.Running())

    async def _drop(self, error: BaseException) -> None:
        try:
            if self._restore is not None:
                await self._engine.run(self._restore.abort)
        finally:
            if not self._channel.ended.done():
                ends = isinstance(error, asyncio.CancelledError)
                reason = control.Abort(reason="the agent ends") if ends else failed(error)
                with suppress(PhaulError):
                    await self._channel.send(reason)


def taken(ids: Iterable[int]) -> list[str]:
    """Which of these PIDs and TIDs are in use here, one line for each.

    Threads of others count, and so do groups and sessions without a leader: the kernel gives
    no number twice.

    Raises:
        PeerError: no PID can be such a number.
    """
    lines = []
    for number in sorted(set(ids)):
        if not 0 < number <= PID_MAX_LIMIT:
            raise PeerError(f"the source says that it has a PID {number}")
        if os.path.exists(f"/proc/{number}"):
            try:
                with open(f"/proc/{number}/comm") as file:
                    name = file.read().strip()
            except OSError:
                name = "?"
            lines.append(f"PID {number} is taken ({name})")
        else:
            with suppress(ProcessLookupError):
                os.killpg(number, 0)
                lines.append(f"PID {number} is taken (a process group)")
    return lines


def _decode(files: dict[str, bytes]) -> ImageSet:
    images = ImageSet()
    for name, data in files.items():
        images.decode_file(name, data)
    return images
