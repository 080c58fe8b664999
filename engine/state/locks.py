"""Locks and leases on files: flock(2), POSIX and OFD locks and leases (fcntl(2)): filelocks.img.

A POSIX lock belongs to a process, the others to the open file, whoever has it. Both are set again in the process
that has the descriptor, as soon as all descriptors are in place. Whoever waits for a lock waits in a system call,
which it makes again.

Source: fdinfo in proc(5), fs/locks.c (the text of its lock lines), CRIU's file_lock_entry.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.engine.state.files.base import F_GETOWN_EX, F_SETOWN_EX, FileOptions, OpenFile, OpenFiles
from phaul.errors import DumpError, ImageError, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.file_lock_pb2 import file_lock_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch, Result
    from phaul.engine.skeleton import SkeletonProcess


class Kind(enum.IntEnum):
    """file_lock_entry.flag."""

    POSIX = 1
    FLOCK = 2
    OFDLCK = 4
    LEASE = 8


BREAKING: Final = 4
"""In the type of a lease: somebody wants to open the file; the other bits say what the lease has to become."""

_TYPES: Final = {"READ": fcntl.F_RDLCK, "WRITE": fcntl.F_WRLCK, "UNLCK": fcntl.F_UNLCK}
_FLOCK: Final = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX}
_STRUCT: Final = struct.Struct("hhqqi4x")  # struct flock
_NO_OWNER: Final = struct.pack("2i", 0, 0)
# "1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF"
_LINE: Final = re.compile(r"\d+:\s*(\w+)\s+(\S+)\s+(\w+)\s+-?\d+\s+\S+\s+(\d+)\s+(\d+|EOF)")


def check(file: OpenFile, options: FileOptions) -> None:
    """Refuse a file with a lock, unless the user wants locks to be moved.

    Raises:
        CannotMove: there is one, or one of an unknown kind.
    """
    for user in file.users:
        for line in user.locks:
            kind = line.split()[1]
            if kind not in Kind.__members__:
                raise file.refuse(f"{file.link} with a lock ({kind}), cannot be moved")
            if not options.file_locks:
                raise file.refuse(f"{file.link} with a lock ({kind}); with --file-locks it can be moved")


def dump(files: OpenFiles, images: ImageSet) -> None:
    """Add all locks of the tree to filelocks.

    Raises:
        DumpError: the kernel describes one in an unknown way.
    """
    seen: set[object] = set()
    for file in files.all:
        for user in file.users:
            for line in user.locks:
                entry = _entry(line)
                # A lock shows in every descriptor of its open file; a POSIX lock only in those of its process.
                owner = user.pid if entry.flag == Kind.POSIX else 0
                key = (file, owner, entry.flag, entry.type, entry.start, entry.len)
                if key not in seen:
                    seen.add(key)
                    entry.pid, entry.fd = user.pid, user.fd
                    images.add("filelocks", entry)


def _entry(line: str) -> file_lock_entry:
    found = _LINE.fullmatch(line)
    if not found or found[1] not in Kind.__members__ or found[3] not in _TYPES:
        raise DumpError(f"lock {line!r} cannot be understood")
    kind, state, access, start, end = found.groups()
    return file_lock_entry(
        flag=Kind[kind],
        type=_TYPES[access] | (BREAKING if state == "BREAKING" else 0),
        start=int(start),
        len=0 if end == "EOF" else int(end) + 1 - int(start),
    )


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Set the locks that a process has, or whose open files were found with it; before it loses its rights.

    Raises:
        ImageError: a lock is of an unknown kind. RestoreError: somebody else here has a lock that conflicts.
    """
    made: list[tuple[file_lock_entry, Result]] = []
    for entry in images.messages("filelocks", file_lock_entry):
        if entry.pid == process.pid:
            made.append((entry, _restore(entry, call)))
    yield
    for entry, result in made:
        breaking = entry.flag == Kind.LEASE and entry.type & BREAKING
        if result.value != (-errno.EAGAIN if breaking else 0):
            reason = "nobody can break it" if breaking else os.strerror(-result.value)
            name = Kind(entry.flag).name
            raise RestoreError(f"lock ({name}) on fd {entry.fd} of PID {entry.pid} cannot be set: {reason}")


def _restore(entry: file_lock_entry, call: Batch) -> Result:
    fd = entry.fd
    if entry.flag == Kind.FLOCK and entry.type in _FLOCK:
        return call.flock(fd, _FLOCK[entry.type] | fcntl.LOCK_NB, may_fail=True)
    if entry.flag in (Kind.POSIX, Kind.OFDLCK) and entry.type in _FLOCK:
        lock = call.data(_STRUCT.pack(entry.type, os.SEEK_SET, entry.start, entry.len, 0))
        command = fcntl.F_SETLK if entry.flag == Kind.POSIX else fcntl.F_OFD_SETLK
        return call.fcntl(fd, command, lock, may_fail=True)
    if entry.flag == Kind.LEASE and entry.type in (fcntl.F_RDLCK, fcntl.F_WRLCK):
        return call.fcntl(fd, fcntl.F_SETLEASE, entry.type, may_fail=True)
    if entry.flag == Kind.LEASE and entry.type & BREAKING:
        return _restore_breaking(entry, call)
    raise ImageError(f"filelocks: lock of PID {entry.pid}: {entry.flag} and type {entry.type} are unknown")


def _restore_breaking(entry: file_lock_entry, call: Batch) -> Result:
    """Set a lease and begin to break it, but without the signal: the one of the source is pending or was handled.

    Returns:
        The result of an open(2) that has to fail with EAGAIN.
    """
    becomes = entry.type & ~BREAKING
    call.fcntl(entry.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK, may_fail=True)
    if becomes == fcntl.F_UNLCK:
        # Only a file that was opened for reading can have a read lease: that is what the source had then.
        call.fcntl(entry.fd, fcntl.F_SETLEASE, fcntl.F_RDLCK, may_fail=True)
    owner = call.space(len(_NO_OWNER))
    call.fcntl(entry.fd, F_GETOWN_EX, owner)
    call.fcntl(entry.fd, F_SETOWN_EX, call.data(_NO_OWNER))
    access = os.O_WRONLY if becomes == fcntl.F_UNLCK else os.O_RDONLY
    opened = call.openat(-100, f"/proc/self/fd/{entry.fd}", access | os.O_NONBLOCK, may_fail=True)
    call.fcntl(entry.fd, F_SETOWN_EX, owner)
    return opened
