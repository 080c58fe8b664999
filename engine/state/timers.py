"""Interval timers (setitimer(2)) and POSIX timers (timer_create(2)).

Times are what is left at the freeze: timers stand still while the process is on its way.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.errors import DumpError, RestoreError
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.timer_pb2 import itimer_entry, posix_timer_entry, task_timers_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch, Space
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess
    from phaul.images.imageset import ImageSet

REAL, VIRTUAL, PROF = range(3)
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4

_TIMES: Final = struct.Struct("<4Q")  # itimerval and itimerspec: interval, then what is left
_SIGEVENT: Final = struct.Struct("<QIIi44x")  # value, signal, notify, thread
_ID: Final = struct.Struct("<I")

PR_TIMER_CREATE_RESTORE_IDS: Final = 77  # since Linux 6.15
_OFF, _ON, _GET = range(3)
# A timer id is reached by making and deleting this many others, where the kernel cannot be told the id.
MAX_ID_STEPS: Final = 20_000

_RECORD: Final = re.compile(r"ID: (\d+)\nsignal: (\d+)/([0-9a-f]+)\nnotify: (\w+)/(pid|tid)\.(\d+)\nClockID: (-?\d+)\n")
_NOTIFY: Final = {"signal": SIGEV_SIGNAL, "none": SIGEV_NONE, "thread": SIGEV_THREAD}


@dataclass(frozen=True)
class PosixTimer:
    """One record of /proc/PID/timers. `thread` is the one to be notified, or None for the process."""

    id: int
    signal: int
    value: int
    notify: int
    thread: int | None
    clock: int


def parse_timers(text: str) -> list[PosixTimer]:
    """/proc/PID/timers (proc(5)), ordered by id.

    Raises:
        DumpError: it is not of the form that we know.
    """
    found = []
    at = 0
    while at < len(text):
        record = _RECORD.match(text, at)
        if record is None:
            raise DumpError(f"/proc/PID/timers: unknown record {text[at:].splitlines()[0]!r}")
        number, signal, value, notify, kind, owner, clock = record.groups()
        # SIGEV_THREAD_ID is a flag, shown by "tid"; the kernel takes it with SIGEV_SIGNAL only.
        to_thread = kind == "tid"
        how = SIGEV_THREAD_ID if to_thread else _NOTIFY[notify]
        thread = int(owner) if to_thread else None
        found.append(PosixTimer(int(number), int(signal), int(value, 16), how, thread, int(clock)))
        at = record.end()
    return sorted(found, key=lambda timer: timer.id)


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Fills tc.timers."""
    del images
    timers = process.core.tc.timers
    intervals = [call.space(_TIMES.size) for _ in range(3)]
    for which, room in enumerate(intervals):
        call.getitimer(which, room)
    posix = parse_timers(process.proc.read("timers").decode())
    states = []
    for timer in posix:
        left = call.space(_TIMES.size)
        call.timer_gettime(timer.id, left)
        states.append((left, call.timer_getoverrun(timer.id)))
    yield
    for entry, room in zip((timers.real, timers.virt, timers.prof), intervals, strict=True):
        entry.isec, entry.iusec, entry.vsec, entry.vusec = _TIMES.unpack(room.bytes())
    for timer, (left, overrun) in zip(posix, states, strict=True):
        timers.posix.append(_posix_entry(timer, left.bytes(), overrun.value))


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Makes the POSIX timers with their ids, then arms all timers. Needs the threads.

    Raises:
        RestoreError: a timer cannot get its id.
    """
    timers = images.one(f"core-{process.pid}", core_entry).tc.timers
    for which, entry in enumerate((timers.real, timers.virt, timers.prof)):
        times = _interval_times(which, entry)
        if any(times):
            call.setitimer(which, call.data(_TIMES.pack(*times)), 0)
    made = _create(process.pid, call, timers)
    for posix in timers.posix:
        times = (posix.isec, posix.insec, posix.vsec, posix.vnsec)
        if any(times):
            call.timer_settime(posix.it_id, 0, call.data(_TIMES.pack(*times)), 0)
    yield
    for wanted, room in made:
        (got,) = _ID.unpack(room.bytes())
        if got != wanted:
            raise RestoreError(f"POSIX timer {wanted} of PID {process.pid} came out as {got}")


def _posix_entry(timer: PosixTimer, left: bytes, overrun: int) -> posix_timer_entry:
    interval_s, interval_ns, value_s, value_ns = _TIMES.unpack(left)
    return posix_timer_entry(
        it_id=timer.id,
        clock_id=timer.clock & 0xFFFF_FFFF,
        si_signo=timer.signal,
        it_sigev_notify=timer.notify,
        sival_ptr=timer.value,
        overrun=overrun,
        isec=interval_s,
        insec=interval_ns,
        vsec=value_s,
        vnsec=value_ns,
        notify_thread_id=timer.thread,
    )


def _interval_times(which: int, entry: itimer_entry) -> tuple[int, int, int, int]:
    value = entry.vsec, entry.vusec
    if which == REAL and not any(value):
        # It has run out and its SIGALRM is still pending: the kernel would start it anew at delivery.
        value = entry.isec, entry.iusec
    return entry.isec, entry.iusec, *value


def _create(pid: int, call: Batch, timers: task_timers_entry) -> list[tuple[int, Space]]:
    """Adds calls that make the timers; returns their ids and where the kernel writes what it chose."""
    wanted = sorted(timers.posix, key=lambda timer: timer.it_id)
    if not wanted:
        return []
    made = []
    if _ids_can_be_told():
        call.prctl(PR_TIMER_CREATE_RESTORE_IDS, _ON, 0, 0, 0)
        for timer in wanted:
            room = call.space(_ID.size, _ID.pack(timer.it_id))
            call.timer_create(_clock(timer), call.data(_event(timer)), room)
            made.append((timer.it_id, room))
        call.prctl(PR_TIMER_CREATE_RESTORE_IDS, _OFF, 0, 0, 0)
        return made
    # A process counts its timers from 0 up, also those that are gone.
    if wanted[-1].it_id > MAX_ID_STEPS:
        raise RestoreError(f"POSIX timer {wanted[-1].it_id} of PID {pid}: this kernel cannot restore so high an id")
    nothing, spare, next_id = call.data(_SIGEVENT.pack(0, 0, SIGEV_NONE, 0)), call.space(_ID.size), 0
    for timer in wanted:
        for passed in range(next_id, timer.it_id):
            call.timer_create(0, nothing, spare)
            call.timer_delete(passed)
        room = call.space(_ID.size)
        call.timer_create(_clock(timer), call.data(_event(timer)), room)
        made.append((timer.it_id, room))
        next_id = timer.it_id + 1
    return made


def _event(timer: posix_timer_entry) -> bytes:
    thread = timer.notify_thread_id if timer.it_sigev_notify & SIGEV_THREAD_ID else 0
    return _SIGEVENT.pack(timer.sival_ptr, timer.si_signo, timer.it_sigev_notify, thread)


def _clock(timer: posix_timer_entry) -> int:
    # Clocks of other processes and threads have negative numbers.
    return timer.clock_id - (timer.clock_id >> 31 << 32)


@cache
def _ids_can_be_told() -> bool:
    try:
        native.syscall("prctl", PR_TIMER_CREATE_RESTORE_IDS, _GET, 0, 0, 0)
    except OSError:
        return False
    return True
