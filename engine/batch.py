"""Batches: lists of system calls that a stopped task is made to run in one round trip.

    call = thread.batch()
    fd = call.openat(AT_FDCWD, b"/etc/hosts", os.O_RDONLY)
    call.dup3(fd, 7, 0)              # results are arguments of later calls
    old = call.space(32)
    call.rt_sigaction(10, 0, old, 8)
    call.run()
    fd.value, old.bytes()

The task runs the list by itself (native/injected.c): thousands of calls cost one stop. Addresses of buffers
are known while recording, since records grow downwards and buffers upwards from one fixed address.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from phaul.engine import native

RECORD: Final = struct.Struct("<II6Qq")
_MASK = (1 << 64) - 1
_NOT_RUN = -(1 << 63)


class BatchError(OSError):
    """A call of a batch failed; calls after it were not made.

    Attributes:
        call: name of the system call.
        arguments: as recorded.
    """

    def __init__(self, error: int, tid: int, call: str, arguments: tuple[object, ...]) -> None:
        super().__init__(error, os.strerror(error))
        self.tid, self.call, self.arguments = tid, call, arguments

    def __str__(self) -> str:
        shown = ", ".join(hex(a) if isinstance(a, int) and a > 4096 else str(a) for a in self.arguments)
        return f"{self.call}({shown}) in task {self.tid}: {self.strerror}"


class Space(int):
    """Address of an output buffer in the task; `bytes()` is its content after the run."""

    _batch: Batch
    size: int

    def bytes(self) -> bytes:
        start = int(self) - self._batch.middle
        return bytes(self._batch.buffers[start : start + self.size])


class Result:
    """What a recorded call returned. May be an argument of later calls of the same batch."""

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch, self._index = batch, index

    @property
    def value(self) -> int:
        """The call's result after the run; a negative errno if the call was allowed to fail."""
        value = self._batch.results[self._index]
        if value == _NOT_RUN:
            raise RuntimeError("the batch has not come to this call")
        return value

    @property
    def address(self) -> int:
        """Where in the task the result is stored (8 bytes)."""
        return self._batch.record_address(self._index) + 56

    def __repr__(self) -> str:
        return f"<result of call {self._index}>"


def run_steps(call: Batch, steps: Iterable[Iterator[None] | None]) -> None:
    """Run state functions around one batch: up to their `yield`, then the batch, then their rest.

    Args:
        steps: generators, or None of a function that only added calls. Each is made only when those before it have
            added their calls: their order matters.

    Raises:
        BatchError: a call of the batch failed.
    """
    waiting = [step for step in steps if step is not None and next(step, call) is not call]
    call.run()
    for step in waiting:
        for _ in step:
            raise RuntimeError("a state function yields once")


class Runner(Protocol):
    """Runs packed batches in one task; where its scratch memory is."""

    tid: int
    middle: int

    def execute(self, records: bytes, buffers: bytes) -> tuple[bytes, bytes]:
        """Run records (last first) with buffers from `middle` on; returns both as they are after the run."""
        ...


class Batch:
    """A list of system calls under construction; any declared system call is a method."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.middle = runner.middle
        self.buffers = bytearray()
        self.results: list[int] = []
        self._calls: list[tuple[str, tuple[object, ...], bytes, bool]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.run()

    def record_address(self, index: int) -> int:
        return self.middle - RECORD.size * (index + 1)

    def data(self, content: bytes | bytearray, align: int = 8) -> int:
        """Address of an input buffer with this content."""
        self.buffers += bytes(-len(self.buffers) % align)
        address = self.middle + len(self.buffers)
        self.buffers += content
        return address

    def space(self, size: int, content: bytes = b"") -> Space:
        """Address of a buffer of `size` bytes that the task may write; starts with `content`, then zeros."""
        space = Space(self.data(content.ljust(size, b"\0"), align=16))
        space._batch, space.size = self, size
        return space

    def __getattr__(self, name: str) -> Callable[..., Result]:
        if name.startswith("_"):
            raise AttributeError(name)
        number = native.syscall_number(name)

        def record(*args: int | bytes | str | Result, may_fail: bool = False) -> Result:
            return self._record(name, number, args, may_fail)

        return record

    def _record(self, name: str, number: int, args: tuple[int | bytes | str | Result, ...], may_fail: bool) -> Result:
        flags = 0 if may_fail else native.STOP_ON_ERROR
        words = []
        for i, arg in enumerate(args):
            if isinstance(arg, Result):
                flags |= 1 << i
                words.append(arg.address)
            elif isinstance(arg, int):
                words.append(arg & _MASK)
            else:
                words.append(self.data(os.fsencode(arg) + b"\0"))
        words += [0] * (6 - len(words))
        self._calls.append((name, args, RECORD.pack(number, flags, *words, _NOT_RUN), may_fail))
        return Result(self, len(self._calls) - 1)

    def run_one(self, name: str, *args: int | bytes | str | Result) -> int:
        """Add one last call, run the batch, and return what that call returned."""
        result = getattr(self, name)(*args)
        self.run()
        return int(result.value)

    def run(self) -> None:
        """Make the task run the list. An empty list costs nothing.

        Raises:
            BatchError: a call that may not fail has failed; the ones before it have been made.
        """
        if not self._calls:
            return
        packed = b"".join(call[2] for call in reversed(self._calls))
        after, buffers = self._runner.execute(packed, bytes(self.buffers))
        self.buffers = bytearray(buffers)
        self.results = [words[8] for words in RECORD.iter_unpack(after)][::-1]
        for (name, args, _, may_fail), result in zip(self._calls, self.results, strict=True):
            if -4096 < result < 0 and not may_fail:
                raise BatchError(-result, self._runner.tid, name, args)
