"""Registers: bit for bit through an entry, and interrupted calls that go on in another process."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.engine import native
from phaul.engine.native import Registers
from phaul.engine.source import SourceThread
from phaul.engine.state import registers as state
from phaul.errors import CannotMove, ImageError, NoSuchProcess, RestoreError
from phaul.images.pb.core_pb2 import core_entry
from tests.engine.state.lab import Lab, Target

MASK = (1 << 64) - 1
SOFTWARE_BYTES = slice(416, 512)  # of the FXSAVE area: the kernel's own
IDLE = "ready(); wait()"
EPOLL_WAIT, NANOSLEEP, RESTART_SYSCALL, READ, CLOSE = 232, 35, 219, 0, 3


def through_entry(registers: Registers) -> Registers:
    """What comes out of the bytes of an image."""
    core = core_entry()
    state.encode(registers, core, 1, 1)
    core.thread_info.clear_tid_addr = core.thread_core.futex_rla = core.thread_core.futex_rla_len = 0
    core.thread_core.blk_sigset = registers.sigmask
    return state.decode(core_entry.FromString(core.SerializeToString()), 1)


def random_xstate(source: random.Random, template: bytes) -> bytes:
    """All components of this CPU in use, with random content that the kernel takes."""
    area = bytearray(template)
    area[:512] = source.randbytes(512)
    struct.pack_into("<4H", area, 0, 0x37F, source.getrandbits(16), source.getrandbits(8), source.getrandbits(11))
    mxcsr_mask = struct.unpack_from("<I", template, 28)[0]
    struct.pack_into("<2I", area, 24, source.getrandbits(16) & mxcsr_mask, mxcsr_mask)
    for i in range(8):  # st0-7 have ten bytes of sixteen
        area[32 + 16 * i + 10 : 48 + 16 * i] = bytes(6)
    for offset, size in (native.xsave_component(n) for n in components()):
        area[offset : offset + size] = source.randbytes(size)
    struct.pack_into("<Q", area, 512, 3 | sum(1 << n for n in components()))
    return bytes(area)


def components() -> list[int]:
    return [n for n in (2, 5, 6, 7) if native.xsave_supported() >> n & 1]


def registers_with(**changes: int) -> Registers:
    gpr = dict.fromkeys(native.REGISTERS, 0) | {"cs": state.USER_CS, "ss": state.USER_DS, "orig_ax": MASK}
    return Registers(gpr | {name: value & MASK for name, value in changes.items()}, EMPTY_XSTATE)


EMPTY_XSTATE = bytes(max((sum(native.xsave_component(n)) for n in components()), default=576))


@pytest.mark.root
@pytest.mark.parametrize("seed", range(8))
def test_every_bit_comes_through(lab: Lab, seed: int) -> None:
    source = random.Random(seed)
    one, other = lab.stopped(IDLE).threads[0], lab.stopped(IDLE).threads[0]
    wanted = one.regs.copy()
    wanted.gpr |= {name: source.getrandbits(64) for name in "r8 r9 r10 r11 r12 r13 r14 r15 bx cx dx si di bp".split()}
    wanted.gpr |= {"ax": source.getrandbits(63), "orig_ax": MASK, "gs_base": source.getrandbits(46)}
    wanted.gpr["flags"] ^= source.getrandbits(12) & 0x8D5  # CF PF AF ZF SF OF
    wanted.xstate = random_xstate(source, one.regs.xstate)
    wanted.sigmask = source.getrandbits(64) & ~(1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1)
    native.set_registers(one.tid, wanted)
    wanted = native.get_registers(one.tid)

    native.set_registers(other.tid, through_entry(wanted))
    seen = native.get_registers(other.tid)

    assert seen.gpr == wanted.gpr
    assert seen.sigmask == wanted.sigmask
    assert seen.xstate[: SOFTWARE_BYTES.start] == wanted.xstate[: SOFTWARE_BYTES.start]
    assert seen.xstate[SOFTWARE_BYTES.stop :] == wanted.xstate[SOFTWARE_BYTES.stop :]
    for process in (one.process, other.process):  # they would crash
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.root
def test_components_in_their_initial_state_stay_so(lab: Lab) -> None:
    thread = lab.stopped(IDLE).threads[0]
    wanted = thread.regs.copy()
    area = bytearray(wanted.xstate)
    struct.pack_into("<Q", area, 512, 0)
    native.set_registers(thread.tid, Registers(wanted.gpr, bytes(area), wanted.sigmask))
    wanted = native.get_registers(thread.tid)
    assert struct.unpack_from("<Q", wanted.xstate, 512) == (0,)

    native.set_registers(thread.tid, Registers(wanted.gpr, random_xstate(random.Random(1), wanted.xstate)))
    native.set_registers(thread.tid, through_entry(wanted))
    assert native.get_registers(thread.tid) == wanted


@given(st.binary(min_size=64, max_size=64), st.integers(0, MASK), st.sets(st.sampled_from(components() or [0])))
def test_any_content_of_any_component_comes_through(words: bytes, mask: int, in_use: set[int]) -> None:
    area = bytearray(EMPTY_XSTATE)
    area[160:224] = words
    for number in in_use - {0}:
        offset, size = native.xsave_component(number)
        area[offset : offset + size] = (words * (size // 64 + 1))[:size]
    struct.pack_into("<Q", area, 512, sum(1 << n for n in in_use - {0}) | 2)
    before = Registers(registers_with().gpr, bytes(area), mask)
    assert through_entry(before) == before


@pytest.mark.parametrize(("component", "name"), [(17, "AMX"), (18, "AMX"), (19, "APX"), (14, "component 14")])
def test_state_that_the_format_cannot_hold_is_refused_by_name(component: int, name: str) -> None:
    area = bytearray(EMPTY_XSTATE)
    struct.pack_into("<Q", area, 512, 1 << component)
    with pytest.raises(CannotMove, match=rf"CPU state \({name}\) of thread 8 of PID 7: "):
        state.encode(Registers(registers_with().gpr, bytes(area)), core_entry(), 7, 8)


@pytest.mark.parametrize(
    ("register", "value", "message"),
    [
        ("cs", 0x23, "thread 8 of PID 7: runs 32-bit code, which cannot be moved"),
        ("fs", 0x63, "segment fs=0x63 of thread 8 of PID 7: cannot be moved"),
        ("ds", 0x0F, "segment ds=0xf of thread 8 of PID 7: cannot be moved"),
    ],
)
def test_foreign_segments_are_refused(register: str, value: int, message: str) -> None:
    with pytest.raises(CannotMove) as refusal:
        state.encode(registers_with(**{register: value}), core_entry(), 7, 8)
    assert str(refusal.value) == message


def entry_of(registers: Registers) -> core_entry:
    core = core_entry()
    state.encode(registers, core, 1, 1)
    return core


def test_a_component_that_this_cpu_lacks_is_named() -> None:
    core = entry_of(registers_with())
    lacking = next(n for n in (3, 9, 7) if not native.xsave_supported() >> n & 1)
    core.thread_info.fpregs.xsave.xstate_bv = 1 << lacking
    with pytest.raises(RestoreError, match=r"thread 5 uses .* registers, which this CPU or its kernel has not"):
        state.decode(core, 5)


def test_damaged_entries_are_refused() -> None:
    short = entry_of(registers_with())
    del short.thread_info.fpregs.xmm_space[3:]
    wide = entry_of(registers_with())
    wide.thread_info.fpregs.cwd = 1 << 20
    foreign = entry_of(registers_with())
    foreign.mtype = core_entry.AARCH64
    missing = entry_of(registers_with())
    missing.thread_info.fpregs.xsave.xstate_bv = 1 << components()[0]
    unknown = entry_of(registers_with())
    unknown.thread_info.fpregs.xsave.xstate_bv = 1 << 40
    for core in (short, wide, foreign, missing, unknown):
        with pytest.raises(ImageError, match="core-5"):
            state.decode(core, 5)


# Interrupted calls

MOVE_NR = bytes.fromhex("b8 23000000 0f05")  # mov $35, %eax; syscall


@pytest.mark.parametrize(
    ("number", "result", "code", "then"),
    [
        (READ, -512, b"", (READ, -512)),
        (READ, -513, b"", (READ, -513)),
        (READ, -514, b"", (READ, -514)),
        (NANOSLEEP, -516, b"", (NANOSLEEP, -514)),
        (EPOLL_WAIT, -errno.EINTR, b"", (EPOLL_WAIT, -514)),
        (CLOSE, -errno.EINTR, b"", (CLOSE, -errno.EINTR)),  # the descriptor is closed: never again
        (EPOLL_WAIT, -errno.EBADF, b"", (EPOLL_WAIT, -errno.EBADF)),
        (READ, 5, b"", (READ, 5)),
        (-1, -514, b"", (-1, -514)),  # a value that happens to be in rax
        (RESTART_SYSCALL, -516, MOVE_NR, (NANOSLEEP, -514)),
        (RESTART_SYSCALL, -516, bytes.fromhex("b8 23000000 31d2 0f05"), (NANOSLEEP, -514)),
        (RESTART_SYSCALL, -516, bytes.fromhex("8b442408 0f05"), (-1, -errno.EINTR)),
        (
            RESTART_SYSCALL,
            -516,
            bytes.fromhex("b8 03000000 0f05"),
            (-1, -errno.EINTR),
        ),  # close: not such a call
        (RESTART_SYSCALL, -516, b"", (-1, -errno.EINTR)),
    ],
)
def test_restartable(number: int, result: int, code: bytes, then: tuple[int, int]) -> None:
    before = registers_with(orig_ax=number, ax=result, ip=0x401000)
    after = state.restartable(before, code)
    assert (after.gpr["orig_ax"], after.gpr["ax"]) == (then[0] & MASK, then[1] & MASK)
    assert before.gpr | {"orig_ax": 0, "ax": 0} == after.gpr | {"orig_ax": 0, "ax": 0}


@given(st.integers(-1, 500), st.integers(-600, 600), st.binary(max_size=40))
def test_restartable_leaves_nothing_that_only_the_old_kernel_knows(number: int, result: int, code: bytes) -> None:
    after = state.restartable(registers_with(orig_ax=number, ax=result), code).gpr
    if after["orig_ax"] != MASK:
        assert after["ax"] != -516 & MASK
        if after["ax"] in {-512 & MASK, -513 & MASK, -514 & MASK}:
            assert after["orig_ax"] != RESTART_SYSCALL


@given(st.integers(-1, 500), st.integers(-600, 600), st.integers(0x1000, 1 << 47))
def test_interrupted_calls_come_through_as_criu_writes_them(number: int, result: int, ip: int) -> None:
    before = registers_with(orig_ax=number, ax=result, ip=ip)
    gpr = entry_of(before).thread_info.gpregs
    if number >= 0 and result in (-512, -513, -514):
        assert (gpr.ax, gpr.ip, gpr.orig_ax) == (number, ip - 2, result & MASK)
    else:
        assert (gpr.ax, gpr.ip, gpr.orig_ax) == (result & MASK, ip, number & MASK)
    assert through_entry(before).gpr == before.gpr


WAITING = """
libc.poll.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int]
signal.signal(signal.SIGUSR1, lambda *_: None)
here, there = os.pipe()
class Event(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("events", ctypes.c_uint32), ("fd", ctypes.c_uint64)]
poll = struct.pack("iHH", here, select.POLLIN, 0)
epoll = select.epoll()
epoll.register(0, select.EPOLLIN)
event = Event()
usr2 = ctypes.c_uint64(1 << signal.SIGUSR2 - 1)
must(libc.pthread_sigmask(0, ctypes.byref(usr2), None))
long = struct.pack("qq", 1000, 0)
calls = {
    "read": lambda: libc.read(0, ctypes.create_string_buffer(8), 1),
    "poll": lambda: libc.poll(struct.pack("iHH", 0, select.POLLIN, 0), 1, 1000000),
    "nanosleep": lambda: libc.nanosleep(long, None),
    "pause": lambda: libc.pause(),
    "epoll_wait": lambda: libc.epoll_wait(epoll.fileno(), ctypes.byref(event), 1, -1),
    "sigtimedwait": lambda: libc.sigtimedwait(ctypes.byref(usr2), None, long),
}
ready()
result = calls[NAME]()
say(f"{result} {errno.errorcode.get(ctypes.get_errno(), 'OK') if result < 0 else 'OK'}")
"""

CALLS = {
    # name: result as stopped, number, what it returns when it is woken
    "read": (-512, 0, "1 OK"),
    "poll": (-516, 7, "1 OK"),
    "epoll_wait": (-errno.EINTR, 232, "1 OK"),
    "sigtimedwait": (-errno.EINTR, 128, f"{signal.SIGUSR2} OK"),
    "nanosleep": (-516, 230, None),
    "pause": (-514, 34, None),
}


def stopped_in(lab: Lab, name: str, times: int = 1) -> tuple[Target, SourceThread]:
    """A process in a call, stopped so often: from the second time on the call may be restart_syscall."""
    target = lab.start(f"NAME = {name!r}\n" + WAITING)
    for _ in range(times - 1):
        wait_for_call(target.pid, CALLS[name][1], RESTART_SYSCALL)
        lab.freeze(target).thaw()
    wait_for_call(target.pid, CALLS[name][1], RESTART_SYSCALL)
    return target, lab.freeze(target).root.threads[0]


def wait_for_call(pid: int, *numbers: int) -> None:
    wanted, deadline = {str(number) for number in numbers}, time.monotonic() + 10
    while Path(f"/proc/{pid}/syscall").read_text().split()[0] not in wanted:
        assert time.monotonic() < deadline, Path(f"/proc/{pid}/syscall").read_text()
        time.sleep(0.001)


def go_on_as_if_elsewhere(thread: SourceThread) -> None:
    """With the registers as they come out of an image."""
    core = core_entry()
    for step in state.dump_thread(thread, thread.batch(), core):
        assert step is None
    core.thread_core.blk_sigset = thread.regs.sigmask
    native.set_registers(thread.tid, state.decode(core, thread.tid))
    native.ptrace(native.PTRACE_DETACH, thread.tid)


@pytest.mark.root
@pytest.mark.parametrize("name", CALLS)
def test_what_the_kernel_leaves_of_a_call(lab: Lab, name: str) -> None:
    result, number, _ = CALLS[name]
    _, thread = stopped_in(lab, name)
    assert (thread.regs.gpr["ax"], thread.regs.gpr["orig_ax"]) == (result & MASK, number)


@pytest.mark.root
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name, (_, _, woken) in CALLS.items() if woken])
def test_an_interrupted_call_goes_on(lab: Lab, name: str, times: int) -> None:
    target, thread = stopped_in(lab, name, times)
    go_on_as_if_elsewhere(thread)
    wait_for_call(target.pid, CALLS[name][1])
    if name == "sigtimedwait":
        os.kill(target.pid, signal.SIGUSR2)
    else:
        target.tell("x")
    assert target.line() == CALLS[name][2]


@pytest.mark.root
@pytest.mark.parametrize("when", ["stopped", "later"])
@pytest.mark.parametrize("name", CALLS)
def test_a_handled_signal_still_interrupts_it(lab: Lab, name: str, when: str) -> None:
    target, thread = stopped_in(lab, name)
    if when == "stopped":
        os.kill(target.pid, signal.SIGUSR1)
    go_on_as_if_elsewhere(thread)
    if when == "later":
        wait_for_call(target.pid, CALLS[name][1])
        os.kill(target.pid, signal.SIGUSR1)
    assert target.line() == "-1 EINTR"


@pytest.mark.root
def test_preflight_takes_an_ordinary_process(lab: Lab) -> None:
    state.preflight(lab.start(IDLE).pid)


@pytest.mark.root
def test_preflight_refuses_a_32_bit_program(tmp_path: Path) -> None:
    # A loop, at the start of the only segment (ELFCLASS32, EM_386).
    head = struct.pack("<16s2H5I6H", b"\x7fELF\x01\x01\x01", 2, 3, 1, 0x10054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<8I", 1, 0, 0x10000, 0x10000, 0x56, 0x56, 5, 0x1000)
    program = tmp_path / "loop32"
    program.write_bytes(head + segment + b"\xeb\xfe")
    program.chmod(0o755)
    with subprocess.Popen([program]) as child:
        try:
            with pytest.raises(CannotMove, match=f"program of PID {child.pid}: 32-bit code cannot be moved"):
                state.preflight(child.pid)
        finally:
            child.kill()


def test_preflight_of_a_process_that_has_gone() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    with pytest.raises(NoSuchProcess):
        state.preflight(child.pid)
