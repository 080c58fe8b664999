"""What inotify watches: inodes, by file handle, and the paths that lead to them. Not a kind of file.

The kernel shows the inode of each watch, and a file handle of it; the handle leads to the path. A watched file that
was deleted is taken along as open ones are (`ghost`).
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul.engine import native
from phaul.engine.state.files import ghost
from phaul.engine.state.files.base import FileBuild, FileDump, OpenFile, OpenFiles, no_owner
from phaul.engine.state.files.regular import behind_link, make_entry
from phaul.errors import RestoreError
from phaul.images.pb.fh_pb2 import fh_entry, min_entries

HANDLE: Final = r"(?: fhandle-bytes:\w+ fhandle-type:(?P<type>\w+) f_handle:(?P<handle>\w+))?\s*"
"""The end of a line of fdinfo about an inode; missing where the file system knows no handles."""


@dataclass(frozen=True)
class Inode:
    """What is watched. The device is as `ghost.kernel_device` has it."""

    number: int
    device: int
    handle_type: int
    handle: bytes

    @classmethod
    def of_line(cls, match: re.Match[str]) -> Inode:
        """From the groups inode, device, type and handle, all hexadecimal."""
        number, device, kind = (int(match[name] or "0", 16) for name in ("inode", "device", "type"))
        return cls(number, device, kind, bytes.fromhex(match["handle"] or ""))

    @property
    def key(self) -> tuple[int, int]:
        """As `OpenFiles.by_inode`."""
        return os.makedev(self.device >> 20, self.device & 0xFFFFF), self.number


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
def watched(inode: Inode, name: str, file: OpenFile, files: OpenFiles) -> Iterator[OpenFile]:
    """What is watched, as a file whose link is its path.

    Args:
        name: of the watch ("inotify watch 3").
        file: to which it belongs.

    Raises:
        CannotMove: its path cannot be found.
    """
    resource = f"{file.resource} ({name})"
    with contextlib.ExitStack() as stack:
        fd = _open_handle(inode.device, inode.handle_type, inode.handle)
        if fd is not None:
            stack.callback(os.close, fd)
            found = behind_link(file.pid, resource, f"/proc/self/fd/{fd}")
            # Without a suffix and yet lost: the kernel knows the inode, but none of its names.
            if not ghost.is_lost(found) or found.link.endswith(ghost.DELETED):
                yield found
                return
        for opened in files.by_inode.get(inode.key, []):
            if opened.link.startswith("/"):
                yield opened
                return
        path = _by_inode(inode.key, files)
        if path is None:
            device = f"{inode.device >> 20}:{inode.device & 0xFFFFF}"
            raise file.refuse(f"{name} on inode {inode.number} of device {device}, whose path cannot be found")
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        yield behind_link(file.pid, resource, f"/proc/self/fd/{fd}")


def dump_handle(inode: Inode, name: str, file: OpenFile, dump: FileDump) -> fh_entry:
    """The handle of what is watched, with its path; a deleted file goes to the images."""
    with watched(inode, name, file, dump.files) as found:
        path = found.link
        if ghost.is_lost(found):
            number = dump.new_id()
            dump.add(make_entry(found, number, no_owner(), dump))
            path = ghost.stand_in(found, dump)
    # In 64-bit words, filled up with zeros.
    words = struct.unpack(f"={min_entries}Q", inode.handle.ljust(8 * min_entries, b"\0"))
    return fh_entry(bytes=len(inode.handle), type=inode.handle_type, handle=words, path=path)


def target(device: int, inode: int, handle: fh_entry, build: FileBuild) -> str:
    """A path to what is to be watched; valid until the build is closed.

    Raises:
        RestoreError: it is not here.
    """
    lost = ghost.find(device, inode, handle.path, build)
    if lost is not None and (place := ghost.place(lost, build)):
        return place
    fd: int | None
    if handle.HasField("path"):
        try:
            fd = os.open(build.path(handle.path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RestoreError(f"{handle.path}: {error.strerror} (the source watches it)") from error
    else:
        packed = struct.pack(f"={len(handle.handle)}Q", *handle.handle)
        fd = _open_handle(device, handle.type, packed[: handle.bytes])
        if fd is None:
            raise RestoreError(f"inode {inode}, which the source watches, is not here")
    return f"/proc/self/fd/{build.keep_until_close(fd)}"
