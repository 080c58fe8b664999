"""What a stopped thread was doing, in words, for logs: python-ptrace's tables of system calls."""

from __future__ import annotations

from typing import Final

from phaul.engine.native import Registers

_ARGUMENTS: Final = ("di", "si", "dx", "r10", "r8", "r9")
_NR_RESTART_SYSCALL: Final = 219


def describe(registers: Registers) -> str:
    """A line such as "in epoll_wait(epfd=5, events=0x7f.., maxevents=16, timeout=-1)" or "at 0x55..".

    Imports python-ptrace: some milliseconds, the first time.
    """
    from ptrace.syscall.names import SYSCALL_NAMES
    from ptrace.syscall.prototypes import SYSCALL_PROTOTYPES

    number = registers.gpr["orig_ax"]
    if number >> 63:
        return f"at {registers.gpr['ip']:#x}"
    name = SYSCALL_NAMES.get(number, f"system call {number}")
    if number == _NR_RESTART_SYSCALL:
        return "in a system call that is being restarted"
    _, parameters = SYSCALL_PROTOTYPES.get(name, ("", ()))
    shown = [
        f"{parameter}={_show(kind, registers.gpr[register])}"
        for (kind, parameter), register in zip(parameters, _ARGUMENTS, strict=False)
    ]
    return f"in {name}({', '.join(shown)})"


def _show(kind: str, word: int) -> str:
    if "*" in kind:
        return hex(word)
    return str(word - (1 << 64) if word >> 63 else word - (1 << 32) if kind == "int" and word >> 31 == 1 else word)
