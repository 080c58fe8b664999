"""Interval and POSIX timers, from one real process into another."""

from __future__ import annotations

import ctypes
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.engine.state import timers
from phaul.engine.state.timers import PosixTimer, parse_timers
from phaul.errors import DumpError, RestoreError
from phaul.images.pb.core_pb2 import core_entry
from tests.engine.state.lab import Lab, cores, dump, restore

IDLE = """
for number in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, 40, 41):
    signal.signal(number, lambda number, _: say(f"signal {number}"))
ready()
while True:
    wait()
"""

INTERVALS = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
signal.setitimer(signal.ITIMER_REAL, 500.25, 7.5)
signal.setitimer(signal.ITIMER_VIRTUAL, 300, 0.125)
class Value(ctypes.Structure):
    _fields_ = [(n, ctypes.c_long) for n in ("isec", "iusec", "vsec", "vusec")]
must(libc.setitimer(2, ctypes.byref(Value(9, 8, 0, 0)), None))  # stopped, but with an interval
"""

# timer_create by number: libc hides the kernel's ids.
POSIX = """
CREATE, SETTIME, DELETE = 222, 223, 226
def create(clock, notify, number, value, thread=0):
    event = struct.pack("QiiI44x", value, number, notify, thread)
    room = ctypes.c_int()
    must(libc.syscall(CREATE, clock, event, ctypes.byref(room)))
    return room.value
def arm(timer, interval, left):
    must(libc.syscall(SETTIME, timer, 0, struct.pack("4q", *interval, *left), None))
for _ in range(3):
    must(libc.syscall(DELETE, create(1, 1, 0, 0)))
arm(create(1, 0, 40, 0xdeadbeef12345678), (5, 1), (1000, 0))
must(libc.syscall(DELETE, create(1, 1, 0, 0)))
create(0, 1, 0, 7)
arm(create(7, 4, 41, 9, threading.get_native_id()), (0, 0), (2000, 5))
arm(create(2, 0, 41, 1), (1, 0), (500, 0))
"""
END = "ready()\nwait()"


def names(found: list[PosixTimer]) -> list[tuple[int, int, int, int]]:
    return [(timer.id, timer.signal, timer.value, timer.notify) for timer in found]


@pytest.mark.root
def test_interval_timers(lab: Lab) -> None:
    process = lab.stopped(INTERVALS + END)
    images = dump(process, timers)
    entry = cores(images)[0].tc.timers
    assert (entry.real.isec, entry.real.iusec, entry.real.vsec) == (7, 500000, 500)
    assert (entry.virt.isec, entry.virt.iusec) == (0, 125000)
    assert 299 <= entry.virt.vsec <= 300
    assert (entry.prof.isec, entry.prof.iusec, entry.prof.vsec, entry.prof.vusec) == (9, 8, 0, 0)

    other = lab.stopped(IDLE)
    restore(other, images, timers)
    again = cores(dump(other, timers))[0].tc.timers
    assert (again.real.isec, again.real.iusec) == (7, 500000)
    assert 0 <= (entry.real.vsec * 10**6 + entry.real.vusec) - (again.real.vsec * 10**6 + again.real.vusec) < 10**6
    assert (again.virt.isec, again.virt.iusec) == (0, 125000)
    # The kernel adds a tick to what it is told.
    assert 0 <= (again.virt.vsec - entry.virt.vsec) * 10**6 + again.virt.vusec - entry.virt.vusec <= 20_000
    assert str(again.prof) == str(entry.prof)


@pytest.mark.root
def test_an_interval_timer_whose_signal_waits_runs_on(lab: Lab) -> None:
    target = lab.start(
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.05)\ntime.sleep(0.1)\n" + END
    )
    images = dump(lab.freeze(target).root, timers)
    real = cores(images)[0].tc.timers.real
    assert (real.iusec, real.vsec, real.vusec) == (50000, 0, 0)

    target = lab.start(IDLE)
    tree = lab.freeze(target)
    restore(tree.root, images, timers)
    tree.thaw()
    assert [target.line() for _ in range(3)] == [f"signal {signal.SIGALRM.value}"] * 3


@pytest.mark.root
@pytest.mark.parametrize("kernel_takes_ids", [True, False])
def test_posix_timers_keep_their_ids(lab: Lab, monkeypatch: pytest.MonkeyPatch, kernel_takes_ids: bool) -> None:
    if not kernel_takes_ids:
        monkeypatch.setattr(timers, "_ids_can_be_told", lambda: False)
    process = lab.stopped(POSIX + END)
    images = dump(process, timers)
    found = parse_timers(process.proc.read("timers").decode())
    assert names(found) == [(3, 40, 0xDEADBEEF12345678, 0), (5, 0, 7, 1), (6, 41, 9, 4), (7, 41, 1, 0)]
    assert [timer.clock for timer in found] == [1, 0, 7, -6]  # CLOCK_PROCESS_CPUTIME_ID, as the kernel writes it
    assert found[2].thread == process.pid

    entries = cores(images)[0].tc.timers.posix
    assert [entry.HasField("notify_thread_id") for entry in entries] == [False, False, True, False]
    other = lab.stopped(IDLE)
    entries[2].notify_thread_id = other.pid
    restore(other, images, timers)

    assert names(parse_timers(other.proc.read("timers").decode())) == names(found)
    again = cores(dump(other, timers))[0].tc.timers.posix
    for before, after in zip(entries, again, strict=True):
        passed = (before.vsec - after.vsec) * 10**9 + before.vnsec - after.vnsec
        assert 0 <= passed < 10**9
        for each in (before, after):
            each.vsec = each.vnsec = 0
        assert str(before) == str(after)


@pytest.mark.root
def test_a_restored_timer_fires_and_repeats(lab: Lab) -> None:
    images = dump(lab.stopped(POSIX + "arm(3, (0, 20_000_000), (0, 150_000_000))\n" + END), timers)
    del cores(images)[0].tc.timers.posix[1:]
    target = lab.start(IDLE)
    tree = lab.freeze(target)
    restore(tree.root, images, timers)
    tree.thaw()
    started = time.monotonic()
    assert [target.line() for _ in range(3)] == ["signal 40"] * 3
    assert time.monotonic() - started < 5


@pytest.mark.root
def test_this_kernel_tells_whether_it_takes_ids() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert timers._ids_can_be_told() == (libc.prctl(77, 2, 0, 0, 0) >= 0)


@pytest.mark.root
def test_ids_that_cannot_be_reached_are_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "_ids_can_be_told", lambda: False)
    images = dump(lab.stopped(POSIX + END), timers)
    cores(images)[0].tc.timers.posix[3].it_id = 1 << 24
    other = lab.stopped(IDLE)
    with pytest.raises(RestoreError, match=f"POSIX timer {1 << 24} of PID"):
        restore(other, images, timers)
    used = lab.stopped(POSIX + END)  # has counted already
    with pytest.raises((RestoreError, OSError)):
        restore(used, dump(lab.stopped(POSIX + END), timers), timers)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**31 - 1),
            st.integers(0, 64),
            st.integers(0, 2**64 - 1),
            st.sampled_from([("signal", 0), ("none", 1), ("thread", 2)]),
            st.booleans(),
            st.integers(-(2**31), 2**31 - 1),
        ),
        unique_by=lambda record: record[0],
    )
)
def test_all_records_are_read(records: list[tuple[int, int, int, tuple[str, int], bool, int]]) -> None:
    text = "".join(
        f"ID: {number}\nsignal: {signo}/{value:016x}\nnotify: {how}/{'tid' if to_thread else 'pid'}.77\n"
        f"ClockID: {clock}\n"
        for number, signo, value, (how, _), to_thread, clock in records
    )
    assert parse_timers(text) == [
        PosixTimer(number, signo, value, 4 if to_thread else code, 77 if to_thread else None, clock)
        for number, signo, value, (_, code), to_thread, clock in sorted(records)
    ]


def test_an_unknown_record_is_an_error() -> None:
    with pytest.raises(DumpError, match="unknown record 'ID: x'"):
        parse_timers("ID: x\n")


def test_a_clock_of_another_process_keeps_its_sign() -> None:
    core = core_entry()
    entry = core.tc.timers.posix.add(clock_id=-6 & 0xFFFFFFFF)
    assert timers._clock(entry) == -6
