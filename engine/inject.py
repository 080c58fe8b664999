"""Runs batches in stopped tasks: crash-safe in a source, plain in a skeleton.

**In a source** the code lies in the unused tail of the vDSO's last page (a private copy, written through
/proc/PID/mem), together with the task's registers and the first record, an mmap of scratch memory for the
batch. Nothing but one SETREGSET starts it. If we die at any moment, the code runs to its end, unmaps the
scratch, restores mask and registers, and the task goes on where it was; what stays are some bytes in the
tail of a page that nothing reads.

**In a skeleton** code and scratch lie side by side in a gap of all address spaces of the tree (phaul.engine.skeleton),
and the task dies with us.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from functools import cache
from typing import Final

from phaul.engine import native
from phaul.engine.batch import RECORD, Batch, BatchError
from phaul.engine.native import Registers
from phaul.engine.proc import PAGE_SIZE, Mapping, Proc, find_gap
from phaul.errors import CannotMove

CODE: Final = native.injected_code()
LOOP: Final = CODE.code[: CODE.stub]
MAX_SCRATCH: Final = 64 << 20
EINTR, ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, RESTARTBLOCK = -4, -512, -513, -514, -516
NR_RESTART_SYSCALL: Final = 219
# Calls that return EINTR after any stop and have done nothing yet then (signal(7)): read, write, readv,
# writev, accept, sendto, recvfrom, sendmsg, recvmsg, semop, msgsnd, msgrcv, rt_sigtimedwait, io_getevents,
# semtimedop, epoll_wait, epoll_pwait, accept4, recvmmsg, sendmmsg, io_pgetevents, epoll_pwait2.
INTERRUPTED_BY_STOP: Final = frozenset(
    {0, 1, 19, 20, 43, 44, 45, 46, 47, 65, 69, 70, 128, 208, 220, 232, 281, 288, 299, 307, 333, 441}
)
_SAVED = ("flags", "sp", None, *"ax bx cx dx si di bp r8 r9 r10 r11 r12 r13 r14 r15 ip".split())

# Ignored by default, and rarely anything else (SIGCONT last: sending it has an effect on a stopped group).
STOP_SIGNALS: Final = (23, 28, 17, 18)  # SIGURG, SIGWINCH, SIGCHLD, SIGCONT


def stop_signal(taken: int) -> int:
    """A signal to end lists with that is not in `taken` (bit 0: signal 1); 0 if there is none."""
    return next((number for number in STOP_SIGNALS if not taken >> (number - 1) & 1), 0)


def signed(word: int) -> int:
    """A register as the signed number that it may be."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def deliverable(proc: Proc, sigmask: int) -> bool:
    """Whether a signal is pending that the task does not block: it explains an EINTR that we see."""
    return bool((proc.signal_set("SigPnd") | proc.signal_set("ShdPnd")) & ~sigmask)


def resumed(registers: Registers, signal_waits: bool) -> Registers:
    """Registers for a task that goes on in user mode without the kernel's help to restart its call.

    Any ptrace stop makes some calls return EINTR: without a signal to deliver that was us, and the call is made
    again.
    """
    gpr = dict(registers.gpr)
    if signed(gpr["orig_ax"]) >= 0:
        error = signed(gpr["ax"])
        by_us = error == EINTR and not signal_waits and gpr["orig_ax"] in INTERRUPTED_BY_STOP
        if error in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND) or by_us:
            gpr["ax"] = gpr["orig_ax"]
        elif error == RESTARTBLOCK:
            gpr["ax"] = NR_RESTART_SYSCALL
        else:
            return registers
        gpr["ip"] -= 2
        gpr["orig_ax"] = -1
    return Registers(gpr, registers.xstate, registers.sigmask)


@cache
def vdso_tail() -> tuple[int, int]:
    """Offset from the vDSO's end, and length, of the zero bytes at its end (the kernel pads the image).

    Measured on our own vDSO: the target's may hold the remains of a run whose tracer was killed.
    """
    vdso = find_vdso(os.getpid(), Proc(os.getpid()).maps())
    page = native.read_memory(os.getpid(), vdso.end - PAGE_SIZE, PAGE_SIZE)
    used = (len(page.rstrip(b"\0")) + 31) & ~15
    return PAGE_SIZE - used, PAGE_SIZE - used


def find_vdso(pid: int, maps: list[Mapping]) -> Mapping:
    for mapping in maps:
        if mapping.path == b"[vdso]":
            return mapping
    raise CannotMove(pid, "vDSO", "there is none, so no system call can be made in the process")


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the address space of a source code and scratch go.

    Attributes:
        tail: address of the free end of the vDSO.
        middle: of the gap for the scratch; MAX_SCRATCH bytes are free on both sides.
    """

    tail: int
    middle: int


def find_place(pid: int, maps: list[Mapping]) -> Place:
    """The place in a process whose threads are all stopped.

    Raises:
        CannotMove: there is none.
    """
    offset, room = vdso_tail()
    if room < len(LOOP) + RECORD.size:
        raise CannotMove(pid, "vDSO", f"its last page has only {room} bytes to spare")
    try:
        gap = find_gap([(m.start, m.end) for m in maps], 2 * MAX_SCRATCH)
    except ValueError:
        raise CannotMove(pid, "address space", "no room for scratch memory") from None
    return Place(find_vdso(pid, maps).end - offset, gap + MAX_SCRATCH)


class SourceRunner:
    """Runs batches in one stopped thread of a process that must not notice.

    Args:
        registers: the thread's, as stopped; they are put back after each batch.
        mem_fd: /proc/PID/mem, for writing.
    """

    def __init__(self, pid: int, tid: int, registers: Registers, place: Place, mem_fd: int) -> None:
        self.pid, self.tid, self._registers, self._mem_fd = pid, tid, registers, mem_fd
        self._tail, self.middle = place.tail, place.middle

    def _stop_signal(self) -> int:
        proc = Proc(self.pid, self.tid)
        return stop_signal(proc.signal_set("SigCgt") | proc.signal_set("SigPnd") | proc.signal_set("ShdPnd"))

    def execute(self, records: bytes, buffers: bytes) -> tuple[bytes, bytes]:
        """See Runner. Whatever happens, the thread is put back as it was."""
        low = (self.middle - len(records)) & -PAGE_SIZE
        length = ((self.middle + len(buffers) + PAGE_SIZE - 1) & -PAGE_SIZE) - low
        stop = self._stop_signal()
        start = self._registers.copy()
        first = self._tail + len(LOOP)
        start.gpr |= {
            "ip": self._tail,
            "orig_ax": -1,
            "bp": stop,
            "bx": 0,
            "r15": length,
            "r12": first,
            "r13": first - RECORD.size,
            "sp": (start.gpr["sp"] - 256) & -16,
        }
        marker = self._tail + CODE.marker
        os.pwrite(self._mem_fd, self._tail_content(low, length), self._tail)
        held: list[int] = []
        try:
            held += native.run(self.tid, stop, marker, start).held
            mapped = signed(native.get_registers(self.tid).gpr["bx"])
            if mapped != low:
                raise BatchError(-mapped, self.tid, "mmap", (low, length))
            native.vm_write(
                self.pid, -1, [(self.middle - len(records), len(records) + len(buffers))], records + buffers
            )
            start.gpr |= {
                "bx": low,
                "r12": self.middle - RECORD.size,
                "r13": self.middle - len(records) - RECORD.size,
            }
            held += native.run(self.tid, stop, marker, start).held
            after = native.read_memory(self.pid, self.middle - len(records), len(records) + len(buffers))
            held += native.run(self.tid, stop, marker, None).held
        finally:
            self._put_back(held)
        return after[: len(records)], after[len(records) :]

    def _tail_content(self, low: int, length: int) -> bytes:
        """Code, saved registers, and the record that maps the scratch."""
        regs = resumed(self._registers, deliverable(Proc(self.pid, self.tid), self._registers.sigmask))
        words = [regs.sigmask if name is None else regs.gpr[name] & (1 << 64) - 1 for name in _SAVED]
        saved = struct.pack(f"<{len(words)}Q", *words)
        prot, flags = 3, 0x100022  # PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_FIXED_NOREPLACE
        record = RECORD.pack(
            native.syscall_number("mmap"),
            native.RESULT_IN_RBX | native.STOP_ON_ERROR,
            low,
            length,
            prot,
            flags,
            (1 << 64) - 1,
            0,
            0,
        )
        return LOOP[: CODE.saved] + saved + LOOP[CODE.saved + len(saved) :] + record

    def _put_back(self, held: list[int]) -> None:
        with contextlib.suppress(ProcessLookupError):
            # In this order: a death of ours in between must not leave everything blocked.
            native.set_sigmask(self.tid, self._registers.sigmask)
            native.set_general_registers(self.tid, self._registers)
            os.pwrite(self._mem_fd, bytes(len(LOOP) + RECORD.size), self._tail)
            for signal in held:
                native.syscall("tgkill", self.pid, self.tid, signal)


class SkeletonRunner:
    """Runs batches in one stopped thread of a skeleton.

    Args:
        stop_signal: ends a list; pending nowhere in the process, or 0 to do without.
        code: address of the injected code. scratch: address of `size` bytes of scratch memory.

    `new_tids` collects the tasks that batches created; they are traced and wait to be waited for.
    """

    def __init__(self, pid: int, tid: int, stop_signal: int, code: int, scratch: int, size: int) -> None:
        self.pid, self.tid, self.code, self._stop = pid, tid, code, stop_signal
        self.middle = scratch + size // 2
        self._half = size // 2
        self._registers = native.get_registers(tid)
        self.new_tids: list[int] = []

    def execute(self, records: bytes, buffers: bytes) -> tuple[bytes, bytes]:
        if max(len(records), len(buffers)) > self._half:
            raise ValueError(f"batch of {len(records)} + {len(buffers)} bytes")
        low, length = self.middle - len(records), len(records) + len(buffers)
        native.write_memory(self.pid, low, records + buffers)
        start = self._registers.copy()
        start.gpr |= {
            "ip": self.code,
            "orig_ax": -1,
            "bp": self._stop,
            "bx": 0,
            "r12": self.middle - RECORD.size,
            "r13": low - RECORD.size,
            "sp": self.middle + self._half - 16,
        }
        run = native.run(self.tid, self._stop, self.code + CODE.marker, start)
        self.new_tids += run.new_tids
        after = native.read_memory(self.pid, low, length)
        return after[: len(records)], after[len(records) :]


def batch(runner: SourceRunner | SkeletonRunner) -> Batch:
    return Batch(runner)
