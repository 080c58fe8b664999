"""Signals: actions, alternate stacks, masks, and what is queued.

The mask itself is set with the registers (PTRACE_SETSIGMASK); it is only written into the images here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.errors import CannotMove, ImageError
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.siginfo_pb2 import signal_queue_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonProcess, SkeletonThread
    from phaul.engine.source import SourceProcess, SourceThread
    from phaul.images.imageset import ImageSet

SIGKILL: Final = 9
SIGSTOP: Final = 19
# All signals whose action can be set: one entry of `sigactions` each, in this order.
NUMBERS: Final = tuple(n for n in range(1, 65) if n not in (SIGKILL, SIGSTOP))
SIGINFO_SIZE: Final = 128
_SET_SIZE: Final = 8

_ACTION: Final = struct.Struct("<4Q")  # struct kernel_sigaction: handler, flags, restorer, mask
_STACK: Final = struct.Struct("<Qi4xQ")  # stack_t: ss_sp, ss_flags, ss_size
_NUMBER: Final = struct.Struct("<i")  # si_signo, first in siginfo_t


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Fills tc.sigactions and tc.signals_s.

    Raises:
        CannotMove: a SIGSTOP is pending that has not stopped the process yet.
    """
    del images
    room = call.space(_ACTION.size * len(NUMBERS))
    for i, number in enumerate(NUMBERS):
        call.rt_sigaction(number, 0, room + _ACTION.size * i, _SET_SIZE)
    yield
    for handler, flags, restorer, mask in _ACTION.iter_unpack(room.bytes()):
        process.core.tc.sigactions.add(sigaction=handler, flags=flags, restorer=restorer, mask=mask)
    queue = native.pending_signals(process.threads[0].tid, shared=True)
    _encode_queue(queue, process.core.tc.signals_s, process)


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Fills sas, signals_p and the masks.

    Raises:
        CannotMove: a SIGSTOP is pending that has not stopped the process yet.
    """
    stack = call.space(_STACK.size)
    call.sigaltstack(0, stack)
    yield
    # SS_ONSTACK cannot be among the flags: the call is made with a stack pointer of its own.
    sp, flags, size = _STACK.unpack(stack.bytes())
    core.thread_core.sas.ss_sp, core.thread_core.sas.ss_size = sp, size
    core.thread_core.sas.ss_flags = flags & 0xFFFF_FFFF
    core.thread_core.blk_sigset = thread.regs.sigmask
    if thread.tid == thread.process.pid:
        core.tc.blk_sigset = thread.regs.sigmask
    queue = native.pending_signals(thread.tid, shared=False)
    _encode_queue(queue, core.thread_core.signals_p, thread.process)


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> None:
    """Sets actions, then queues what was pending for the process. By the leader, all signals blocked.

    Must have run before any other thread's batch: setting the action of a signal that is ignored by default
    discards it where it is pending, and such a signal ends the batches.

    Raises:
        ImageError: not one action a signal, or a malformed siginfo.
    """
    tc = images.one(f"core-{process.pid}", core_entry).tc
    if len(tc.sigactions) != len(NUMBERS):
        raise ImageError(f"core-{process.pid}: {len(tc.sigactions)} signal actions, not {len(NUMBERS)}")
    for number, action in zip(NUMBERS, tc.sigactions, strict=True):
        packed = _ACTION.pack(action.sigaction, action.flags, action.restorer, action.mask)
        call.rt_sigaction(number, call.data(packed), 0, _SET_SIZE)
    pid = call.getpid()
    for info in _decode_queue(tc.signals_s, process.pid):
        call.rt_sigqueueinfo(pid, _signo(info), call.data(info))


def restore_thread(thread: SkeletonThread, call: Batch, core: core_entry) -> None:
    """Sets the alternate stack and queues what was pending for the thread; by itself, all signals blocked.

    Raises:
        ImageError: a malformed siginfo.
    """
    sas = core.thread_core.sas
    flags = sas.ss_flags - (sas.ss_flags >> 31 << 32)
    call.sigaltstack(call.data(_STACK.pack(sas.ss_sp, flags, sas.ss_size)), 0)
    queue = _decode_queue(core.thread_core.signals_p, thread.tid)
    if queue:
        pid, tid = call.getpid(), call.gettid()
        for info in queue:
            call.rt_tgsigqueueinfo(pid, tid, _signo(info), call.data(info))


def pending_anywhere(images: ImageSet) -> int:
    """Mask of the signals that are queued for any process or thread of the tree (bit 0: signal 1)."""
    mask = 0
    for name in images.names():
        if name.startswith("core-"):
            core = images.one(name, core_entry)
            tid = int(name.removeprefix("core-"))
            for entry in (core.tc.signals_s, core.thread_core.signals_p):
                for info in _decode_queue(entry, tid):
                    mask |= 1 << _signo(info) - 1
    return mask


def _encode_queue(queue: list[bytes], entry: signal_queue_entry, process: SourceProcess) -> None:
    entry.SetInParent()
    for info in queue:
        if _signo(info) == SIGSTOP:
            if process.stop_signal:
                continue  # it is stopped, and will be
            raise CannotMove(process.pid, "pending SIGSTOP", "a process that is being stopped cannot be moved")
        entry.signals.add(siginfo=info)


def _decode_queue(entry: signal_queue_entry, tid: int) -> list[bytes]:
    queue = [signal.siginfo for signal in entry.signals]
    for info in queue:
        if len(info) != SIGINFO_SIZE or _signo(info) not in NUMBERS:
            raise ImageError(f"core-{tid}: malformed pending signal")
    return queue


def _signo(info: bytes) -> int:
    number: int = _NUMBER.unpack_from(info)[0]
    return number
