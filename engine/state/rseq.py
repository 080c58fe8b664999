"""Restartable sequences (rseq(2), glibc 2.35 and later register one a thread).

A thread that is stopped inside a critical section has to leave it by its abort handler: the sequence relies
on not having been interrupted, and its commit would be wrong on another CPU.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.engine.native import Registers
from phaul.errors import CannotMove, RestoreError
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonThread
    from phaul.engine.source import SourceThread

_RSEQ_CS_OFFSET: Final = 8  # struct rseq: cpu_id_start, cpu_id, rseq_cs, ...
_SECTION: Final = struct.Struct("<II3Q")  # struct rseq_cs: version, flags, start, length, abort handler
_NO_RESTART_ON_SIGNAL: Final = 1 << 1


def configuration(pid: int, tid: int) -> tuple[int, int, int] | None:
    """Address, size and signature of a stopped thread's area; None if it has none.

    Raises:
        CannotMove: the kernel has restartable sequences but does not tell (before Linux 5.13).
    """
    try:
        found = native.rseq_configuration(tid)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        if _kernel_has_rseq():
            reason = "this kernel does not tell where it is"
            raise CannotMove(pid, f"rseq area of thread {tid}", reason) from error
        return None
    return found if found[0] else None


def aborted(pid: int, tid: int, registers: Registers) -> Registers:
    """Registers of a stopped thread with a critical section left by its abort handler.

    To be called before anything is run in the thread: the kernel forgets the section then.

    Raises:
        CannotMove: see `configuration`.
    """
    area = configuration(pid, tid)
    if area is None:
        return registers
    (section,) = struct.unpack("<Q", native.read_memory(pid, area[0] + _RSEQ_CS_OFFSET, 8))
    if not section:
        return registers
    _, flags, start, length, handler = _SECTION.unpack(native.read_memory(pid, section, _SECTION.size))
    if not 0 <= registers.gpr["ip"] - start < length or flags & _NO_RESTART_ON_SIGNAL:
        return registers
    return Registers(registers.gpr | {"ip": handler}, registers.xstate, registers.sigmask)


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Fills rseq_entry if the thread has an area.

    Raises:
        CannotMove: see `configuration`.
    """
    del call
    area = configuration(thread.process.pid, thread.tid)
    if area is not None:
        entry = core.thread_core.rseq_entry
        entry.rseq_abi_pointer, entry.rseq_abi_size, entry.signature = area
    yield


def restore_thread(thread: SkeletonThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Registers the area again. It must be mapped: the kernel writes the CPU's number there.

    Raises:
        RestoreError: the kernel takes no area of this size.
    """
    if not core.thread_core.rseq_entry.rseq_abi_pointer:
        return
    entry = core.thread_core.rseq_entry
    pointer, size, signature = entry.rseq_abi_pointer, entry.rseq_abi_size, entry.signature
    result = call.rseq(pointer, size, 0, signature, may_fail=True)
    yield
    if result.value < 0:
        reason = os.strerror(-result.value)
        raise RestoreError(f"rseq area of thread {thread.tid} ({size} bytes at {pointer:#x}): {reason}")


def _kernel_has_rseq() -> bool:
    try:
        native.syscall("rseq", 0, 0, 0, 0)
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True
