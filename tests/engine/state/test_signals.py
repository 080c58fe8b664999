"""Signal actions, alternate stacks, masks and queues, from one real process into another."""

from __future__ import annotations

import os
import signal

import pytest

from phaul.engine import native
from phaul.engine.proc import Proc
from phaul.engine.state import signals
from phaul.errors import CannotMove, ImageError
from phaul.images.imageset import ImageSet
from phaul.images.pb.core_pb2 import core_entry
from tests.engine.state.lab import Lab, cores, dump, restore

# Handlers that stay what they are in another process have to be addresses of libc.
BUSY = """
class Action(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("handler", "flags", "restorer", "mask")]
getpid = ctypes.cast(libc.getpid, ctypes.c_void_p).value
def action(number, handler, flags, mask):
    act = Action(handler, flags | 0x04000000, getpid, mask)
    must(libc.syscall(13, number, ctypes.byref(act), None, 8))
for number in range(1, 65):
    if number not in (9, 19):
        action(number, (0, 1, getpid + number)[number % 3], (number % 2) << 28, number << 20)
stack = ctypes.create_string_buffer(65536)
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
must(libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(stack), FLAGS, 65536)), None))
signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - {9, 19})
libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
for i in range(5):
    must(libc.sigqueue(os.getpid(), 40 + i % 2, 1000 + i))
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGCHLD)
def directed():
    signal.pthread_sigmask(signal.SIG_SETMASK, {10, 17, *range(34, 50)})
    for number in (45, 44, 44):
        signal.pthread_kill(threading.get_ident(), number)
    ready()
    time.sleep(1000)
if THREADED:
    threading.Thread(target=directed, daemon=True).start()
else:
    signal.pthread_kill(threading.get_ident(), 44)
    ready()
wait()
"""
PLAIN = """
if THREADED:
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
ready()
wait()
"""
SS_AUTODISARM = 1 << 31


def script(text: str, *, threaded: bool = False, flags: int = 0) -> str:
    return f"THREADED, FLAGS = {threaded}, {flags - (flags >> 31 << 32)}\n{text}"


@pytest.mark.root
def test_entries_say_what_the_process_has(lab: Lab) -> None:
    process = lab.stopped(script(BUSY, flags=SS_AUTODISARM))
    (core,) = cores(dump(process, signals))

    assert len(core.tc.sigactions) == 62
    for number, action in zip(signals.NUMBERS, core.tc.sigactions, strict=True):
        # Other bits are of no meaning for the kernel, which keeps no SIGKILL and SIGSTOP in a mask.
        assert action.mask == number << 20 & ~(1 << 18)
        assert action.flags == (number % 2) << 28 | 0x04000000
    ignored = sum(1 << n - 1 for n in signals.NUMBERS if n % 3 == 1)
    assert process.proc.signal_set("SigIgn") == ignored
    assert [a.sigaction == 1 for a in core.tc.sigactions] == [n % 3 == 1 for n in signals.NUMBERS]
    queued = [int.from_bytes(signal.siginfo[:4], "little") for signal in core.tc.signals_s.signals]
    assert queued == [40, 41, 40, 41, 40, 10, 17]
    assert core.thread_core.sas.ss_size == 65536
    assert core.thread_core.sas.ss_flags == SS_AUTODISARM
    assert core.tc.blk_sigset == core.thread_core.blk_sigset == process.proc.signal_set("SigBlk")


@pytest.mark.root
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("flags", [0, SS_AUTODISARM])
def test_another_process_gets_all_of_it(lab: Lab, threaded: bool, flags: int) -> None:
    process = lab.stopped(script(BUSY, threaded=threaded, flags=flags))
    images = dump(process, signals)
    other = lab.stopped(script(PLAIN, threaded=threaded))

    for thread, core in zip(other.threads, cores(images), strict=True):
        thread.regs.sigmask = core.thread_core.blk_sigset  # the batch's end sets the mask that the thread had
    restore(other, images, signals)

    assert [str(core) for core in cores(dump(other, signals))] == [str(core) for core in cores(images)]
    for mine, theirs in zip(process.threads, other.threads, strict=True):
        for name in ("SigPnd", "ShdPnd", "SigIgn", "SigCgt"):
            assert mine.proc.status[name] == theirs.proc.status[name]
        for shared in (False, True):
            assert native.pending_signals(mine.tid, shared) == native.pending_signals(theirs.tid, shared)


@pytest.mark.root
def test_values_of_queued_signals_arrive_in_order(lab: Lab) -> None:
    process = lab.stopped(script(BUSY))
    target = lab.start(
        """
signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
ready()
wait()
libc.sigwaitinfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
info, numbers = ctypes.create_string_buffer(128), ctypes.c_uint64(3 << 39)
for _ in range(5):
    number = must(libc.sigwaitinfo(ctypes.byref(numbers), info))
    say(f"{number} {struct.unpack_from('Q', info, 24)[0]}")
"""
    )
    tree = lab.freeze(target)
    tree.root.threads[0].regs.sigmask = (1 << 64) - 1
    images = dump(process, signals)
    for action in images.one(f"core-{process.pid}", core_entry).tc.sigactions:
        action.sigaction = 0
    restore(tree.root, images, signals)
    tree.thaw()
    target.tell("go")
    assert [target.line() for _ in range(5)] == ["40 1000", "40 1002", "40 1004", "41 1001", "41 1003"]


@pytest.mark.root
def test_a_pending_stop_is_refused(lab: Lab) -> None:
    process = lab.stopped(script(PLAIN))
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(CannotMove, match=f"pending SIGSTOP of PID {process.pid}: "):
        dump(process, signals)
    os.kill(process.pid, signal.SIGCONT)


@pytest.mark.root
def test_damaged_images_are_refused(lab: Lab) -> None:
    process = lab.stopped(script(BUSY))
    before = Proc(process.pid).status

    def damaged(part: str) -> ImageSet:
        images = dump(process, signals)
        core = images.one(f"core-{process.pid}", core_entry)
        if part == "actions":
            del core.tc.sigactions[61]
        elif part == "length":
            core.tc.signals_s.signals[0].siginfo = b"\x0a\0\0\0"
        else:
            core.thread_core.signals_p.signals[0].siginfo = bytes([19]) + bytes(127)
        return images

    for part in ("actions", "length", "number"):
        with pytest.raises(ImageError, match=f"core-{process.pid}: "):
            restore(process, damaged(part), signals)
    after = Proc(process.pid).status
    assert all(before[name] == after[name] for name in ("SigPnd", "ShdPnd", "SigIgn", "SigCgt"))
