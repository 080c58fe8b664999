"""inotify(7): watches under their numbers. Events that wait to be read cannot be moved.

The kernel shows the inode of each watch, and a file handle of it; the handle leads to the path. A watched file that
was deleted is taken along as open ones are (`ghost`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import termios
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul.engine import native
from phaul.engine.state.files import ghost
from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, FileOptions, OpenFile, OpenFiles, no_owner
from phaul.engine.state.files.regular import behind_link, check_path, make_entry
from phaul.errors import DumpError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.fh_pb2 import fh_entry, min_entries
from phaul.images.pb.fsnotify_pb2 import inotify_file_entry, inotify_wd_entry

# linux/inotify.h: all events, IN_EXCL_UNLINK, IN_ONESHOT: what a mask can have after inotify_add_watch(2).
_MASK: Final = 0x0FFF | 0x04000000 | 0x80000000
_MAX_WATCH: Final = 1 << 22
"""The highest number of a watch: the restore has to count up to it."""

_LINE: Final = re.compile(
    r"inotify wd:(\w+) ino:(\w+) sdev:(\w+) mask:(\w+) ignored_mask:(\w+)"
    r"(?: fhandle-bytes:\w+ fhandle-type:(\w+) f_handle:(?P<handle>\w+))?\s*"
)


@dataclass(frozen=True)
class _Watch:
    """A line of fdinfo. The device is as `ghost.kernel_device` has it."""

    number: int
    inode: int
    device: int
    mask: int
    ignored: int
    handle_type: int
    handle: bytes

    @property
    def key(self) -> tuple[int, int]:
        """As `OpenFiles.by_inode`."""
        return os.makedev(self.device >> 20, self.device & 0xFFFFF), self.inode


def _watches(file: OpenFile) -> list[_Watch]:
    found = []
    for line in file.info:
        if line.startswith("inotify "):
            match = _LINE.fullmatch(line)
            if not match:
                raise DumpError(f"{file.resource} of PID {file.pid}: {line!r} cannot be understood")
            wd, inode, device, mask, ignored, kind = (int(text or "0", 16) for text in match.groups()[:6])
            found.append(_Watch(wd, inode, device, mask, ignored, kind, bytes.fromhex(match["handle"] or "")))
    return sorted(found, key=lambda watch: watch.number)


def _mount_points(device: int) -> Iterator[str]:
    """Where a file system is mounted."""
    wanted = f"{device >> 20}:{device & 0xFFFFF}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        _, _, number, _, place, *_ = line.split()
        if number == wanted:
            yield re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), place)


def _open_handle(device: int, kind: int, handle: bytes) -> int | None:
    """An O_PATH descriptor of the inode with this handle; None where handles do not lead to inodes."""
    packed = native.buffer(struct.pack("Ii", len(handle), kind) + handle)
    for place in _mount_points(device) if handle else ():
        with contextlib.suppress(OSError):
            mount = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return native.syscall("open_by_handle_at", mount, packed.address, os.O_PATH | os.O_CLOEXEC)
            finally:
                os.close(mount)
    return None


def _directories(files: OpenFiles) -> Iterable[str]:
    """Where the tree has to do with files."""
    found = [os.path.dirname(file.link) for file in files.all if file.link.startswith("/")]
    for pid in files.tables:
        with contextlib.suppress(OSError):
            found += [os.readlink(f"/proc/{pid}/cwd"), os.path.dirname(os.readlink(f"/proc/{pid}/exe"))]
    return dict.fromkeys(found)


def _by_inode(key: tuple[int, int], files: OpenFiles) -> str | None:
    """A path of an inode that the tree has open, or that lies beside such a file."""
    for directory in _directories(files):
        with contextlib.suppress(OSError):
            status = os.lstat(directory)
            if (status.st_dev, status.st_ino) == key:
                return directory
            for entry in os.scandir(directory):
                if entry.inode() == key[1] and entry.stat(follow_symlinks=False).st_dev == key[0]:
                    return entry.path
    return None


@contextlib.contextmanager
def _watched(watch: _Watch, file: OpenFile, files: OpenFiles) -> Iterator[OpenFile]:
    """What is watched, as a file whose link is its path.

    Raises:
        CannotMove: its path cannot be found.
    """
    resource = f"{file.resource} (inotify watch {watch.number})"
    with contextlib.ExitStack() as stack:
        fd = _open_handle(watch.device, watch.handle_type, watch.handle)
        if fd is not None:
            stack.callback(os.close, fd)
            found = behind_link(file.pid, resource, f"/proc/self/fd/{fd}")
            # Without a suffix and yet lost: the kernel knows the inode, but none of its names.
            if not ghost.is_lost(found) or found.link.endswith(ghost.DELETED):
                yield found
                return
        for opened in files.by_inode.get(watch.key, []):
            if opened.link.startswith("/"):
                yield opened
                return
        path = _by_inode(watch.key, files)
        if path is None:
            device = f"{watch.device >> 20}:{watch.device & 0xFFFFF}"
            raise file.refuse(
                f"inotify watch {watch.number} on inode {watch.inode} of device {device}, whose path cannot be found"
            )
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        yield behind_link(file.pid, resource, f"/proc/self/fd/{fd}")


def _words(handle: bytes) -> list[int]:
    """A handle as images have it: 64-bit words, filled up with zeros."""
    return list(struct.unpack(f"={min_entries}Q", handle.ljust(8 * min_entries, b"\0")))


def _drain(fd: int) -> None:
    """Drop all events. Does not wait."""
    while size := _unread(fd):
        os.read(fd, size)


def _unread(fd: int) -> int:
    """Bytes that can be read."""
    (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(size)


class Inotifies(FileKind):
    """inotify_init1(2)."""

    name = "inotify"
    type = fd_types.INOTIFY
    field = "ify"

    def claims(self, file: OpenFile) -> bool:
        return file.link in ("anon_inode:inotify", "anon_inode:[inotify]")

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        for watch in _watches(file):
            if watch.number > _MAX_WATCH:
                raise file.refuse(f"inotify with a watch of number {watch.number}, cannot be moved")
            with _watched(watch, file, files) as found:
                check_path(found, options)
        # A running program may be about to read them.
        if files.stopped and (unread := _unread(file.dup())):
            raise file.refuse(f"inotify with {unread} bytes of events that were not read, cannot be moved")

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        entry = inotify_file_entry(id=file_id, flags=file.flags, fown=file.owner())
        for watch in _watches(file):
            with _watched(watch, file, dump.files) as found:
                path = found.link
                if ghost.is_lost(found):
                    number = dump.new_id()
                    dump.add(make_entry(found, number, no_owner(), dump))
                    path = ghost.stand_in(found, dump)
            handle = fh_entry(bytes=len(watch.handle), type=watch.handle_type, handle=_words(watch.handle), path=path)
            entry.wd.append(
                inotify_wd_entry(
                    id=file_id, i_ino=watch.inode, mask=watch.mask, ignored_mask=watch.ignored,
                    s_dev=watch.device, wd=watch.number, f_handle=handle,
                )
            )  # fmt: skip
        return file_entry(type=self.type, id=file_id, ify=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        return native.syscall("inotify_init1", entry.ify.flags & os.O_NONBLOCK | os.O_CLOEXEC)

    def finish(self, entry: file_entry, fd: int, build: FileBuild) -> None:
        watches = sorted(entry.ify.wd, key=lambda watch: watch.wd)
        targets = [_target(watch, build) for watch in watches]

        def watch_all() -> None:
            for watch, target in zip(watches, targets, strict=True):
                _add(fd, watch, target)
            # What the restore itself does with watched files, from now on too, is none of the program's business.
            _drain(fd)
            again = os.dup(fd)
            build.at_end.callback(os.close, again)
            build.at_end.callback(_drain, again)

        build.later(watch_all)


def _target(watch: inotify_wd_entry, build: FileBuild) -> str:
    """A path to what is to be watched; valid until the build is closed."""
    lost = ghost.find(watch.s_dev, watch.i_ino, watch.f_handle.path, build)
    if lost is not None and (place := ghost.place(lost, build)):
        return place
    fd: int | None
    if watch.f_handle.HasField("path"):
        try:
            fd = os.open(build.path(watch.f_handle.path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RestoreError(f"{watch.f_handle.path}: {error.strerror} (the source watches it)") from error
    else:
        handle = struct.pack(f"={len(watch.f_handle.handle)}Q", *watch.f_handle.handle)
        fd = _open_handle(watch.s_dev, watch.f_handle.type, handle[: watch.f_handle.bytes])
        if fd is None:
            raise RestoreError(f"inode {watch.i_ino}, which the source watches, is not here")
    return f"/proc/self/fd/{build.keep_until_close(fd)}"


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
