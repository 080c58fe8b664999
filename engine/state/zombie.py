"""Zombies: processes that have ended and wait for their parent to ask how. All that is left is the answer."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.engine.proc import Proc
from phaul.engine.state.names import get_bytes, set_bytes
from phaul.errors import ImageError
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.skeleton import SkeletonProcess

# task_core_entry.task_state: CRIU writes the first, and takes both.
DEAD: Final = 2
ZOMBIE: Final = 6

_EXIT_CODE: Final = 52  # field of /proc/PID/stat: as wait(2) gives it
_FLAGS: Final = 9
_RLIMIT_CORE: Final = 4
_PR_SET_NAME: Final = 15
_DEFAULT_ACTION: Final = bytes(32)
_CORE_DUMPED: Final = 0x80


def is_zombie(pid: int) -> bool:
    """Whether a process has ended, with all its threads."""
    proc = Proc(pid)
    return proc.stat[3] in "ZX" and len(proc.tids()) == 1


def is_zombie_image(core: core_entry) -> bool:
    return core.tc.task_state in (DEAD, ZOMBIE)


def dump(pid: int) -> core_entry:
    """The core image of a zombie."""
    proc = Proc(pid)
    core = core_entry(mtype=core_entry.X86_64)
    tc = core.tc
    tc.task_state, tc.exit_code = DEAD, int(proc.stat[_EXIT_CODE])
    tc.personality, tc.flags, tc.blk_sigset = 0, int(proc.stat[_FLAGS]), 0
    set_bytes(tc, "comm", proc.comm)
    return core


def restore(process: SkeletonProcess, core: core_entry) -> None:
    """End a skeleton as the zombie ended. Its parent's SIGCHLD is taken back: what is pending is in the images.

    Raises:
        ImageError: no process ends like that.
    """
    status = core.tc.exit_code
    call = process.batch()
    call.prctl(_PR_SET_NAME, get_bytes(core.tc, "comm"))
    call.prlimit64(0, _RLIMIT_CORE, call.data(struct.pack("<2Q", 0, 0)), 0)
    killer = status & ~_CORE_DUMPED
    if killer & 0xFF == 0:
        call.exit_group(status >> 8 & 0xFF)
        with contextlib.suppress(ProcessLookupError):
            call.run()
    elif 0 < killer < signal.NSIG:
        if killer not in (signal.SIGKILL, signal.SIGSTOP):
            call.rt_sigaction(killer, call.data(_DEFAULT_ACTION), 0, 8)
        call.run()
        _die_of(process.pid, killer)
    else:
        raise ImageError(f"core-{process.pid}: a process cannot end with status {status:#x}")
    if process.parent is not None:
        flush = process.parent.batch()
        flush.rt_sigaction(signal.SIGCHLD, flush.data(_DEFAULT_ACTION), 0, 8)
        flush.run()


def _die_of(pid: int, number: int) -> None:
    native.set_sigmask(pid, 0)
    if number == signal.SIGKILL:
        os.kill(pid, number)
    else:
        # The task is at a signal-delivery stop: it gets this signal instead.
        native.ptrace(native.PTRACE_CONT, pid, 0, number)
    while os.WIFSTOPPED(status := native.wait(pid)):
        native.ptrace(native.PTRACE_CONT, pid, 0, os.WSTOPSIG(status) if not status >> 16 else 0)
