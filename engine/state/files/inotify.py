"""inotify(7): watches under their numbers. Events that wait to be read cannot be moved."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import termios
from dataclasses import dataclass
from typing import Final

from phaul.engine import native
from phaul.engine.state.files import watches
from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, FileOptions, OpenFile, OpenFiles
from phaul.engine.state.files.regular import check_path
from phaul.errors import DumpError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.fsnotify_pb2 import inotify_file_entry, inotify_wd_entry

# linux/inotify.h: all events, IN_EXCL_UNLINK, IN_ONESHOT: what a mask can have after inotify_add_watch(2).
_MASK: Final = 0x0FFF | 0x04000000 | 0x80000000
_MAX_WATCH: Final = 1 << 22
"""The highest number of a watch: the restore has to count up to it."""

_LINE: Final = re.compile(
    r"inotify wd:(\w+) ino:(?P<inode>\w+) sdev:(?P<device>\w+) mask:(\w+) ignored_mask:(\w+)" + watches.HANDLE
)


@dataclass(frozen=True)
class _Watch:
    """A line of fdinfo."""

    number: int
    mask: int
    ignored: int
    inode: watches.Inode

    @property
    def name(self) -> str:
        return f"inotify watch {self.number}"


def _watches(file: OpenFile) -> list[_Watch]:
    found = []
    for line in file.info:
        if line.startswith("inotify "):
            match = _LINE.fullmatch(line)
            if not match:
                raise DumpError(f"{file.resource} of PID {file.pid}: {line!r} cannot be understood")
            number, mask, ignored = (int(match[i], 16) for i in (1, 4, 5))
            found.append(_Watch(number, mask, ignored, watches.Inode.of_line(match)))
    return sorted(found, key=lambda watch: watch.number)


def _unread(fd: int) -> int:
    """Bytes of events that can be read."""
    (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(size)


def _drain(fd: int) -> None:
    """Drop all events. Does not wait."""
    while size := _unread(fd):
        os.read(fd, size)


class Inotifies(FileKind):
    """inotify_init1(2)."""

    name = "inotify"
    type = fd_types.INOTIFY
    field = "ify"

    def claims(self, file: OpenFile) -> bool:
        return file.link in ("anon_inode:inotify", "anon_inode:[inotify]")

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        # A running program may be about to read them. First, as looking for what is watched may be an event.
        if files.stopped and (unread := _unread(file.dup())):
            raise file.refuse(f"inotify with {unread} bytes of events that were not read, cannot be moved")
        for watch in _watches(file):
            if watch.number > _MAX_WATCH:
                raise file.refuse(f"inotify with a watch of number {watch.number}, cannot be moved")
            with watches.watched(watch.inode, watch.name, file, files) as found:
                check_path(found, options)

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        entry = inotify_file_entry(id=file_id, flags=file.flags, fown=file.owner())
        for watch in _watches(file):
            entry.wd.append(
                inotify_wd_entry(
                    id=file_id, i_ino=watch.inode.number, mask=watch.mask, ignored_mask=watch.ignored,
                    s_dev=watch.inode.device, wd=watch.number,
                    f_handle=watches.dump_handle(watch.inode, watch.name, file, dump),
                )
            )  # fmt: skip
        return file_entry(type=self.type, id=file_id, ify=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        return native.syscall("inotify_init1", entry.ify.flags & os.O_NONBLOCK | os.O_CLOEXEC)

    def finish(self, entry: file_entry, fd: int, build: FileBuild) -> None:
        wanted = sorted(entry.ify.wd, key=lambda watch: watch.wd)
        targets = [watches.target(watch.s_dev, watch.i_ino, watch.f_handle, build) for watch in wanted]

        def watch_all() -> None:
            for watch, target in zip(wanted, targets, strict=True):
                _add(fd, watch, target)
            # What the restore itself does with watched files, from now on too, is none of the program's business.
            _drain(fd)
            again = os.dup(fd)
            build.at_end.callback(os.close, again)
            build.at_end.callback(_drain, again)

        build.later(watch_all)


def _add(fd: int, watch: inotify_wd_entry, target: str) -> None:
    """Add a watch under its number: numbers are given out in ascending order."""
    path = native.buffer(os.fsencode(target) + b"\0")
    if watch.wd > _MAX_WATCH:
        raise RestoreError(f"inotify watch of number {watch.wd}: the highest that can be restored is {_MAX_WATCH}")
    while True:
        try:
            number = native.syscall("inotify_add_watch", fd, path.address, watch.mask & _MASK)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RestoreError("inotify: more watches than /proc/sys/fs/inotify/max_user_watches allows") from error
            raise
        if number == watch.wd:
            return
        if number > watch.wd:
            raise RestoreError(f"inotify watch {watch.wd} gets the number {number} here")
        native.syscall("inotify_rm_watch", fd, number)
