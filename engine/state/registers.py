"""General and FPU registers of a thread, and the system call that it was stopped in.

Images hold the XSAVE area by component, not by offset: the restoring CPU lays it out anew. Components that
are in their initial state are left out, as the CPU does (Intel SDM volume 1, section 13.6).

**Interrupted calls.** The kernel leaves a restart code in rax (-ERESTARTSYS and its like) and the number of
the call in orig_rax; whether the call is made again is decided when signals are delivered. CRIU decides at
dump (it always restarts) and its restorer never looks at orig_rax. So that the kernel can still decide at the
destination, and CRIU can restore our images, a thread with a restart code is written as CRIU would write it
(ip on the `syscall` instruction, ax the number of the call) with the code in orig_ax, where a stopped thread
has -1 or the number of a call.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.engine.inject import INTERRUPTED_BY_STOP, signed
from phaul.engine.native import Registers
from phaul.engine.proc import PAGE_SIZE, Proc
from phaul.errors import CannotMove, ImageError, NoSuchProcess, RestoreError
from phaul.images.pb import core_pb2, core_x86_pb2

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.source import SourceThread

# Selectors that mean the same in every process (linux: asm/segment.h).
USER_CS: Final = 0x33
USER_DS: Final = 0x2B

# The FXSAVE area up to its reserved bytes: these words, st0-7, xmm0-15.
_FXSAVE: Final = struct.Struct("<4H2Q2I 32I 64I")
_FXSAVE_WORDS: Final = "cwd swd twd fop rip rdp mxcsr mxcsr_mask".split()
_XSTATE_BV_OFFSET: Final = 512
_XSAVE_HEADER_END: Final = 576
_LEGACY: Final = 0b11  # x87 and SSE

# XSAVE component -> its field of user_x86_xsave_entry, word type, name for people.
_COMPONENTS: Final = {
    2: ("ymmh_space", "I", "AVX"),
    3: ("bndreg_state", "Q", "MPX"),
    4: ("bndcsr_state", "Q", "MPX"),
    5: ("opmask_reg", "Q", "AVX-512"),
    6: ("zmm_upper", "Q", "AVX-512"),
    7: ("hi16_zmm", "Q", "AVX-512"),
    9: ("pkru", "I", "protection key"),
}
_FOREIGN: Final = {11: "shadow stack", 12: "shadow stack", 17: "AMX", 18: "AMX", 19: "APX"}

# Restart codes (linux/errno.h): for the kernel only, never seen by a program.
ERESTARTSYS: Final = -512
ERESTARTNOINTR: Final = -513
ERESTARTNOHAND: Final = -514
ERESTART_RESTARTBLOCK: Final = -516
_CODES: Final = (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND)

_SYSCALL_LENGTH: Final = 2
_NR_RESTART_SYSCALL: Final = 219
# Calls that leave a restart block: poll, nanosleep, futex, clock_nanosleep.
_WITH_RESTART_BLOCK: Final = frozenset({7, 35, 202, 230})
_MASK: Final = (1 << 64) - 1


def dump_thread(thread: SourceThread, call: Batch, core: core_pb2.core_entry) -> Iterator[None]:
    """Fills `mtype` and `thread_info` (without clear_tid_addr).

    Raises:
        CannotMove: 32-bit code, own segment descriptors, or CPU state that CRIU's format cannot hold.
    """
    pid, tid, registers = thread.process.pid, thread.tid, thread.regs
    _refuse_shadow_stack(thread.proc)
    encode(restartable(registers, _code_before(tid, registers)), core, pid, tid)
    yield


def preflight(pid: int) -> None:
    """Refuses 32-bit programs and shadow stacks.

    Raises:
        CannotMove: with the name of what cannot be moved.
    """
    try:
        with open(Proc(pid).open("exe"), "rb") as program:
            if program.read(5) == b"\x7fELF\x01":
                raise CannotMove(pid, "program", "32-bit code cannot be moved")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"PID {pid}: no such process") from error
    for tid in Proc(pid).tids():
        _refuse_shadow_stack(Proc(pid, tid))


def _refuse_shadow_stack(thread: Proc) -> None:
    # Supervisor state: not in the XSAVE area that ptrace shows.
    if "shstk" in thread.status.get("x86_Thread_features", ""):
        raise CannotMove(thread.pid, f"shadow stack of thread {thread.tid}", "cannot be moved")


def encode(registers: Registers, core: core_pb2.core_entry, pid: int, tid: int) -> None:
    """Writes registers into a core entry.

    Raises:
        CannotMove: 32-bit code, own segment descriptors, or CPU state that CRIU's format cannot hold.
    """
    core.mtype = core_pb2.core_entry.X86_64
    gpr = {name: value & _MASK for name, value in registers.gpr.items()}
    if gpr["cs"] != USER_CS:
        raise CannotMove(pid, f"thread {tid}", "runs 32-bit code, which cannot be moved")
    for name in ("ds", "es", "fs", "gs"):
        if gpr[name] not in (0, USER_DS):
            raise CannotMove(pid, f"segment {name}={gpr[name]:#x} of thread {tid}", "cannot be moved")
    code = signed(gpr["ax"])
    if signed(gpr["orig_ax"]) >= 0 and code in _CODES:
        gpr |= {"ax": gpr["orig_ax"], "orig_ax": code & _MASK, "ip": gpr["ip"] - _SYSCALL_LENGTH}
    entry = core.thread_info.gpregs
    for name, value in gpr.items():
        setattr(entry, name, value)
    entry.mode = core_x86_pb2.NATIVE
    _encode_xstate(registers.xstate, core.thread_info.fpregs, pid, tid)


def decode(core: core_pb2.core_entry, tid: int) -> Registers:
    """The registers of a core entry, laid out for this CPU, with the signal mask.

    They are to be set at a signal-type stop, where the kernel restarts interrupted calls.

    Raises:
        ImageError: the entry is of another architecture or has too few words.
        RestoreError: it uses CPU state that this CPU or kernel has not.
    """
    if core.mtype != core_pb2.core_entry.X86_64 or core.thread_info.gpregs.mode != core_x86_pb2.NATIVE:
        raise ImageError(f"core-{tid}: registers of another architecture")
    gpr = {name: getattr(core.thread_info.gpregs, name) for name in native.REGISTERS}
    code = signed(gpr["orig_ax"])
    if code in _CODES:
        gpr |= {"orig_ax": gpr["ax"], "ax": code & _MASK, "ip": gpr["ip"] + _SYSCALL_LENGTH & _MASK}
    mask = core.thread_core.blk_sigset if core.thread_core.HasField("blk_sigset") else core.tc.blk_sigset
    return Registers(gpr, _decode_xstate(core.thread_info.fpregs, tid), mask)


def restartable(registers: Registers, code: bytes) -> Registers:
    """Registers for a thread that goes on in another process, where what the kernel remembers is missing.

    * -ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND: kept, the kernel there restarts the call or returns
      EINTR.
    * -ERESTART_RESTARTBLOCK: the call anew, as -ERESTARTNOHAND: EINTR if a handler runs first. Relative times
      begin anew.
    * -EINTR from a call that returns it at any stop: the same.
    * restart_syscall (the thread was stopped before): its number is taken from the `mov $nr, %eax` before the
      instruction; if there is none it is EINTR.

    Args:
        code: the bytes before registers.gpr["ip"], the `syscall` instruction last.
    """
    number, result = signed(registers.gpr["orig_ax"]), signed(registers.gpr["ax"])
    if number < 0:
        return registers
    if result in (*_CODES, ERESTART_RESTARTBLOCK) and number == _NR_RESTART_SYSCALL:
        original = _number_before(code)
        if original is None:
            return _with(registers, ax=-errno.EINTR, orig_ax=-1)
        return _with(registers, ax=ERESTARTNOHAND, orig_ax=original)
    if result == ERESTART_RESTARTBLOCK or (result == -errno.EINTR and number in INTERRUPTED_BY_STOP):
        return _with(registers, ax=ERESTARTNOHAND)
    return registers


def _with(registers: Registers, **changes: int) -> Registers:
    changed = {name: value & _MASK for name, value in changes.items()}
    return Registers(registers.gpr | changed, registers.xstate, registers.sigmask)


def _number_before(code: bytes) -> int | None:
    # b8 imm32: mov $imm32, %eax. Arguments may be set up between it and the syscall instruction.
    for at in range(len(code) - 7, -1, -1):
        number = int.from_bytes(code[at + 1 : at + 5], "little")
        if code[at] == 0xB8 and number in _WITH_RESTART_BLOCK:
            return number
    return None


def _code_before(tid: int, registers: Registers) -> bytes:
    if registers.gpr["orig_ax"] != _NR_RESTART_SYSCALL:
        return b""
    end = registers.gpr["ip"]
    # Not past the start of the page: what is before it may not be mapped.
    start = max(end - 34, end - _SYSCALL_LENGTH & -PAGE_SIZE)
    return native.read_memory(tid, start, end - start)


def _encode_xstate(xstate: bytes, entry: core_x86_pb2.user_x86_fpregs_entry, pid: int, tid: int) -> None:
    words = _FXSAVE.unpack_from(xstate)
    for name, word in zip(_FXSAVE_WORDS, words[:8], strict=True):
        setattr(entry, name, word)
    entry.st_space.extend(words[8:40])
    entry.xmm_space.extend(words[40:])
    (in_use,) = struct.unpack_from("<Q", xstate, _XSTATE_BV_OFFSET)
    entry.xsave.xstate_bv = in_use
    for number in _bits(in_use & ~_LEGACY):
        if number not in _COMPONENTS:
            name = _FOREIGN.get(number, f"component {number}")
            reason = "the image format has no place for it"
            raise CannotMove(pid, f"CPU state ({name}) of thread {tid}", reason)
        field, word_type, _ = _COMPONENTS[number]
        offset, size = _layout()[number]
        component = f"<{size // struct.calcsize(word_type)}{word_type}"
        getattr(entry.xsave, field).extend(struct.unpack_from(component, xstate, offset))


def _decode_xstate(entry: core_x86_pb2.user_x86_fpregs_entry, tid: int) -> bytes:
    area = bytearray(max((offset + size for offset, size in _layout().values()), default=_XSAVE_HEADER_END))
    if len(entry.st_space) != 32 or len(entry.xmm_space) != 64:
        raise ImageError(f"core-{tid}: FPU registers are incomplete")
    head = [getattr(entry, name) for name in _FXSAVE_WORDS]
    try:
        _FXSAVE.pack_into(area, 0, *head, *entry.st_space, *entry.xmm_space)
    except struct.error as error:
        raise ImageError(f"core-{tid}: FPU registers are out of range") from error
    if entry.xsave.cet.cet:
        raise RestoreError(f"thread {tid} has a shadow stack, which phaul cannot restore")
    in_use = entry.xsave.xstate_bv if entry.HasField("xsave") else _LEGACY
    for number in _bits(in_use & ~_LEGACY):
        if number not in _COMPONENTS:
            raise ImageError(f"core-{tid}: unknown CPU state component {number}")
        field, word_type, name = _COMPONENTS[number]
        if number not in _layout():
            raise RestoreError(f"thread {tid} uses {name} registers, which this CPU or its kernel has not")
        offset, size = _layout()[number]
        words = getattr(entry.xsave, field)
        if len(words) * struct.calcsize(word_type) != size:
            raise ImageError(f"core-{tid}: {len(words)} words of {name} registers where {size} bytes belong")
        struct.pack_into(f"<{len(words)}{word_type}", area, offset, *words)
    struct.pack_into("<Q", area, _XSTATE_BV_OFFSET, in_use)
    return bytes(area)


@cache
def _layout() -> dict[int, tuple[int, int]]:
    """Offset and size of the components behind the legacy area that this CPU and kernel have."""
    return {number: native.xsave_component(number) for number in _bits(native.xsave_supported() & ~_LEGACY)}


def _bits(mask: int) -> Iterator[int]:
    return (number for number in range(mask.bit_length()) if mask >> number & 1)
