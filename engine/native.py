"""Typed access to engine/native: the only module that imports `_native`.

Errors are OSError with the kernel's errno; addresses and lengths are plain ints; buffers are anything that
supports the buffer protocol. Every call releases the GIL. What each function does in the kernel is said in
engine/native/*.c.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from phaul.engine._native import ffi, lib

STOP_ON_ERROR: Final = lib.PH_STOP_ON_ERROR
RESULT_IN_RBX: Final = lib.PH_RESULT_IN_RBX

# ptrace(2) requests and options (linux/ptrace.h).
PTRACE_CONT: Final = 7
PTRACE_DETACH: Final = 17
O_TRACESYSGOOD: Final = 1 << 0
O_TRACEFORK: Final = 1 << 1
O_TRACEVFORK: Final = 1 << 2
O_TRACECLONE: Final = 1 << 3
O_EXITKILL: Final = 1 << 20
O_SUSPEND_SECCOMP: Final = 1 << 21

# kcmp(2) types.
KCMP_FILE: Final = 0
KCMP_VM: Final = 1
KCMP_FILES: Final = 2
KCMP_FS: Final = 3
KCMP_SIGHAND: Final = 4
KCMP_EPOLL_TFD: Final = 7

# PAGEMAP_SCAN categories (linux/fs.h, Documentation/admin-guide/mm/pagemap.rst).
PAGE_FILE: Final = 4
PAGE_PRESENT: Final = 8
PAGE_SWAPPED: Final = 16
PAGE_PFNZERO: Final = 32
PAGE_GUARD: Final = 256

REGISTERS: Final = (
    "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di orig_ax ip cs flags sp ss fs_base gs_base ds es fs gs"
).split()
_GPR = struct.Struct("27Q")
_REGION = struct.Struct("3Q")
MAX_REGIONS: Final = 8192


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def syscall_number(name: str) -> int:
    """The number of a system call by name (`SYS_name`). Raises AttributeError if not declared."""
    return int(getattr(lib, f"SYS_{name}"))


def syscall(name: str, *args: int) -> int:
    """Make a system call in this process. Negative arguments are taken as two's complement."""
    words = [a & (1 << 64) - 1 for a in args] + [0] * (6 - len(args))
    return _check(lib.ph_syscall(syscall_number(name), *words), name)


@dataclass(frozen=True)
class Buffer:
    """Bytes in our own memory at a known address; kept while the object lives."""

    address: int
    size: int
    _keep: Any

    def content(self) -> bytes:
        """What the bytes are now."""
        return bytes(ffi.buffer(self._keep))


def buffer(content: bytes) -> Buffer:
    """A copy of `content` that system calls of this process can be pointed to."""
    data = ffi.new("uint8_t[]", len(content))
    ffi.buffer(data)[:] = content
    return Buffer(int(ffi.cast("uintptr_t", data)), len(content), data)


def address_of(memory: memoryview) -> int:
    """Where writable memory of ours lies."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))


@dataclass(slots=True)
class Registers:
    """Registers of one task: general ones by name (user_regs_struct), XSAVE area, signal mask."""

    gpr: dict[str, int]
    xstate: bytes = b""
    sigmask: int = 0

    def packed(self) -> bytes:
        """NT_PRSTATUS as the kernel has it."""
        return _GPR.pack(*(self.gpr[name] & (1 << 64) - 1 for name in REGISTERS))

    def copy(self) -> Registers:
        return Registers(dict(self.gpr), self.xstate, self.sigmask)


def _unpack(gpr: Any) -> dict[str, int]:
    return dict(zip(REGISTERS, _GPR.unpack(bytes(ffi.buffer(gpr))), strict=True))


def get_registers(tid: int) -> Registers:
    """All of a stopped tracee's registers and its signal mask."""
    regs = ffi.new("struct ph_regs *")
    _check(lib.ph_get_regs(tid, regs), f"registers of task {tid}")
    return Registers(_unpack(regs.gpr), bytes(ffi.buffer(regs.xstate, regs.xstate_len)), int(regs.sigmask))


def set_registers(tid: int, registers: Registers) -> None:
    """XSAVE area, then signal mask, then general registers: a death in between blocks nothing for good."""
    regs = ffi.new("struct ph_regs *")
    regs.gpr = list(registers.packed())
    ffi.buffer(regs.xstate)[: len(registers.xstate)] = registers.xstate
    regs.xstate_len, regs.sigmask = len(registers.xstate), registers.sigmask
    _check(lib.ph_set_regs(tid, regs), f"registers of task {tid}")


def set_sigmask(tid: int, mask: int) -> None:
    _check(lib.ph_set_sigmask(tid, mask), f"signal mask of task {tid}")


def set_general_registers(tid: int, registers: Registers) -> None:
    _check(lib.ph_set_gpr(tid, registers.packed()), f"registers of task {tid}")


def ptrace(request: int, tid: int, addr: int = 0, data: int = 0) -> int:
    return _check(lib.ph_ptrace(request, tid, addr, data), f"ptrace {request:#x} of task {tid}")


def stop(tids: Sequence[int], options: int) -> list[int]:
    """Seize and stop tasks, all at once. Returns for each its wait status, or -errno if it was not stopped."""
    statuses = ffi.new("int32_t[]", len(tids))
    lib.ph_stop(ffi.new("int32_t[]", list(tids)), len(tids), options, statuses)
    return list(statuses)


def wait(tid: int, timeout: float | None = None) -> int:
    """Wait status of a tracee's next stop. Raises TimeoutError after `timeout` seconds."""
    status = ffi.new("int32_t *")
    _check(lib.ph_wait(tid, -1 if timeout is None else int(timeout * 1000), status), f"wait {tid}")
    return int(status[0])


def pending_signals(tid: int, shared: bool) -> list[bytes]:
    """Queued signals, oldest first, 128 bytes of siginfo_t each (PTRACE_PEEKSIGINFO)."""
    found: list[bytes] = []
    room = ffi.new("uint8_t[]", 32 * 128)
    while True:
        n = _check(lib.ph_peek_siginfo(tid, shared, len(found), 32, room), f"signals of {tid}")
        data = bytes(ffi.buffer(room, n * 128))
        found += [data[i : i + 128] for i in range(0, len(data), 128)]
        if n < 32:
            return found


def rseq_configuration(tid: int) -> tuple[int, int, int]:
    """Address, size and signature of the task's rseq area (address 0: none). ENOSYS/EIO on old kernels."""
    found = ffi.new("uint64_t[3]")
    _check(lib.ph_rseq_config(tid, found), f"rseq of task {tid}")
    return int(found[0]), int(found[1]), int(found[2])


@dataclass(slots=True)
class Run:
    """What happened while a list ran: tasks it made (traced), signals held back."""

    new_tids: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


def run(tid: int, stop_signal: int, marker: int, registers: Registers | None) -> Run:
    """Let a stopped tracee run injected code up to the end of its list (native/injected.c).

    Args:
        stop_signal: the signal that ends the list, or 0 to find the end by syscall stops.
        marker: address behind the code's tgkill.
        registers: what to start with; None goes on from where the task is.
    """
    run = ffi.new("struct ph_run *")
    run.tid, run.stop_signal, run.marker = tid, stop_signal, marker
    gpr = registers.packed() if registers else ffi.NULL
    _check(lib.ph_run(run, gpr), f"injected code in task {tid}")
    return Run(list(run.new_tids[0 : run.n_new]), list(run.held[0 : run.n_held]))


def leave(tid: int, registers: Registers) -> None:
    """Make one last system call from outside the scratch memory (see ph_leave)."""
    _check(lib.ph_leave(tid, registers.packed()), f"last call of task {tid}")


def _ranges(ranges: Sequence[tuple[int, int]]) -> Any:
    return ffi.new("uint64_t[]", [word for pair in ranges for word in pair])


def vm_read(pid: int, mem_fd: int, ranges: Sequence[tuple[int, int]], buffer: Any) -> int:
    """Read (address, length) ranges, one after the other, into a writable buffer.

    Args:
        mem_fd: /proc/PID/mem for what protection hides from process_vm_readv, or -1.

    Returns:
        The number of bytes, the sum of all lengths. Raises OSError (EFAULT, EIO) if a range is not there.
    """
    room = ffi.from_buffer("uint8_t[]", buffer, require_writable=True)
    if len(room) < sum(length for _, length in ranges):
        raise ValueError("buffer too small")
    return _check(lib.ph_vm_read(pid, mem_fd, _ranges(ranges), len(ranges), room), f"memory of {pid}")


def vm_write(pid: int, mem_fd: int, ranges: Sequence[tuple[int, int]], buffer: Any) -> int:
    """Write consecutive bytes of a buffer to (address, length) ranges; see `vm_read`."""
    data = ffi.from_buffer("uint8_t[]", buffer)
    if len(data) < sum(length for _, length in ranges):
        raise ValueError("buffer too small")
    return _check(lib.ph_vm_write(pid, mem_fd, _ranges(ranges), len(ranges), data), f"memory of {pid}")


def read_memory(pid: int, address: int, length: int) -> bytes:
    """A small piece of another process's memory."""
    room = bytearray(length)
    vm_read(pid, -1, [(address, length)], room)
    return bytes(room)


def write_memory(pid: int, address: int, data: bytes) -> None:
    vm_write(pid, -1, [(address, len(data))], data)


class PageScanner:
    """Which pages of a range fall into which categories: PAGEMAP_SCAN, or reading pagemap where that is missing.

    Reading knows only PRESENT, SWAPPED, FILE and SOFT_DIRTY: zero pages then count as present.

    Attributes:
        has_scan: whether it is PAGEMAP_SCAN.
        known: the categories that can be asked for.
    """

    def __init__(self, pagemap_fd: int) -> None:
        self._fd = pagemap_fd
        self._regions = ffi.new("struct ph_region[]", MAX_REGIONS)
        self._walk_end = ffi.new("uint64_t *")
        self.has_scan = self._probe(0) != -errno.ENOTTY
        self.known = PAGE_PRESENT | PAGE_SWAPPED | PAGE_FILE
        if self.has_scan:
            self.known |= PAGE_PFNZERO | (PAGE_GUARD if self._probe(PAGE_GUARD) >= 0 else 0)

    def _probe(self, categories: int) -> int:
        masks = ffi.new("uint64_t[4]", [0, 0, 0, categories])
        return int(lib.ph_pagemap_scan(self._fd, 0, 0, 0, masks, ffi.NULL, 0, self._walk_end))

    def scan(
        self,
        start: int,
        end: int,
        *,
        inverted: int = 0,
        every: int = 0,
        any_of: int = 0,
        ret: int = 0,
        flags: int = 0,
    ) -> list[tuple[int, int, int]]:
        """Regions (start, end, categories & ret) of [start, end), ascending."""
        masks = ffi.new("uint64_t[4]", [inverted, every, any_of, ret])
        found: list[tuple[int, int, int]] = []
        while start < end:
            args = (masks, self._regions, MAX_REGIONS, self._walk_end)
            if self.has_scan:
                n = lib.ph_pagemap_scan(self._fd, start, end, flags, *args)
            else:
                n = lib.ph_pagemap_read(self._fd, start, end, *args)
            _check(n, f"page scan at {start:#x}")
            found += _REGION.iter_unpack(bytes(ffi.buffer(self._regions, n * _REGION.size)))
            start = int(self._walk_end[0])
        return found


@dataclass(frozen=True, slots=True)
class InjectedCode:
    """The machine code that runs lists of calls in other tasks, and offsets into it."""

    code: bytes
    saved: int
    marker: int
    stub: int


def injected_code() -> InjectedCode:
    code, words = ffi.new("const uint8_t **"), ffi.new("uint32_t[3]")
    size = lib.ph_injected(code, words + 0, words + 1, words + 2)
    return InjectedCode(bytes(ffi.buffer(code[0], size)), *(int(w) for w in words))


def build_stub(base: int, data_size: int) -> bytes:
    """An ELF program: injected code at `base`, `data_size` zero bytes from base + 4096 on."""
    room = ffi.new("uint8_t[]", 8192)
    return bytes(ffi.buffer(room, _check(lib.ph_build_stub(base, data_size, room, 8192), "stub")))


SPAWN_STEPS: Final = {1: "fork", 2: "time namespace", 3: "clone3", 4: "exec"}


class Parent(IntEnum):
    """Whose child a new skeleton becomes."""

    INIT = lib.PH_PARENT_INIT  # or of our nearest subreaper
    CALLER = lib.PH_PARENT_CALLER
    CALLERS_PARENT = lib.PH_PARENT_CALLERS_PARENT


def spawn_skeleton(
    pid: int,
    stub_fd: int,
    comm_fd: int,
    *,
    parent: Parent,
    clocks: tuple[int, int] | None,
) -> None:
    """Start the stub as process `pid`; it ends by itself when the other end of comm_fd closes.

    Args:
        clocks: offsets in nanoseconds of CLOCK_MONOTONIC and CLOCK_BOOTTIME for a new time namespace,
            or None to stay in ours.

    Raises:
        OSError: EEXIST when the PID is taken; `.filename` names the step that failed.
    """
    args, step = ffi.new("struct ph_spawn *"), ffi.new("int32_t *")
    args.pid, args.stub_fd, args.comm_fd = pid, stub_fd, comm_fd
    args.parent = parent
    if clocks is not None:
        args.set_clocks = 1
        args.monotonic, args.boottime = (divmod(ns, 10**9) for ns in clocks)
    result = lib.ph_spawn_skeleton(args, step)
    if result < 0:
        raise OSError(-result, os.strerror(-result), SPAWN_STEPS[int(step[0])])


def xsave_component(number: int) -> tuple[int, int]:
    """Offset and size of a component in the standard XSAVE format (CPUID leaf 0xD)."""
    offset, size = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    _check(lib.ph_xsave_component(number, offset, size), "cpuid")
    return int(offset[0]), int(size[0])


def xsave_supported() -> int:
    """Bit mask of the XSAVE components that the kernel has enabled (XCR0)."""
    return int(lib.ph_xsave_supported())
