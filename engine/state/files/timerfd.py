"""timerfd_create(2): a timer, and how often it has expired unread."""

from __future__ import annotations

import array
import fcntl
import os
import re
import select
import struct
import time
from typing import Final

from phaul.engine import native
from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, OpenFile
from phaul.errors import ImageError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.timerfd_pb2 import timerfd_entry

TFD_TIMER_ABSTIME: Final = 1
TFD_IOC_SET_TICKS: Final = 0x40085400  # _IOW('T', 0, u64), linux/timerfd.h; CONFIG_CHECKPOINT_RESTORE
_PAIR = re.compile(r"\((\d+), (\d+)\)")
# The clocks that timerfd_create takes; alarms tick on the clocks without.
_CLOCKS: Final = {0: time.CLOCK_REALTIME, 1: time.CLOCK_MONOTONIC, 7: time.CLOCK_BOOTTIME, 8: 0, 9: 7}


def _pair(text: str) -> tuple[int, int]:
    found = _PAIR.fullmatch(text)
    if found is None:
        raise ValueError(f"unknown time in fdinfo: {text!r}")
    return int(found[1]), int(found[2])


class TimerFds(FileKind):
    """fdinfo shows the time that is left, also for an absolute timer, and the interval.

    A timer goes on with the time that was left at the dump; an absolute one stays absolute, so that a clock that
    is set still moves it.
    """

    name = "timerfd"
    type = fd_types.TIMERFD
    field = "tfd"

    def claims(self, file: OpenFile) -> bool:
        return file.link == "anon_inode:[timerfd]"

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        seconds, nanoseconds = _pair(next(file.lines("it_value")))
        every_seconds, every_nanoseconds = _pair(next(file.lines("it_interval")))
        entry = timerfd_entry(
            id=file_id,
            flags=file.flags,
            fown=file.owner(),
            clockid=int(next(file.lines("clockid"))),
            ticks=int(next(file.lines("ticks"))),
            settime_flags=int(next(file.lines("settime flags")), 8),
            vsec=seconds,
            vnsec=nanoseconds,
            isec=every_seconds,
            insec=every_nanoseconds,
        )
        return file_entry(type=self.type, id=file_id, tfd=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        timer = entry.tfd
        if timer.clockid not in _CLOCKS:
            raise ImageError(f"files: timerfd with unknown clock {timer.clockid}")
        fd = build.adopt(entry.id, native.syscall("timerfd_create", timer.clockid, os.O_CLOEXEC))
        first = timer.vsec * 10**9 + timer.vnsec
        expired = not first and (timer.isec or timer.insec)
        if expired:
            first = 1
        if first:
            if timer.settime_flags & TFD_TIMER_ABSTIME:
                first += time.clock_gettime_ns(_CLOCKS[timer.clockid])
            seconds, nanoseconds = divmod(first, 10**9)
            value = array.array("q", [timer.isec, timer.insec, seconds, nanoseconds])
            native.syscall("timerfd_settime", fd, timer.settime_flags, value.buffer_info()[0], 0)
        if expired:
            # An interval timer rests from when it expires until it is read; its ticks would count one more.
            select.select([fd], [], [])
        if timer.ticks:
            fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("Q", timer.ticks))
        return fd
