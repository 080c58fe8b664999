"""eventfd(2): a counter."""

from __future__ import annotations

import os

from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, OpenFile
from phaul.images.pb.eventfd_pb2 import eventfd_file_entry
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry


class EventFds(FileKind):
    """The counter is in fdinfo. That it is a semaphore is there since Linux 6.5.

    The image has no field for the semaphore: EFD_SEMAPHORE (1) stands among the flags, where O_RDWR leaves that
    bit free.
    """

    name = "eventfd"
    type = fd_types.EVENTFD
    field = "efd"

    def claims(self, file: OpenFile) -> bool:
        return file.link == "anon_inode:[eventfd]"

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        semaphore = os.EFD_SEMAPHORE if "1" in file.lines("eventfd-semaphore") else 0
        entry = eventfd_file_entry(
            id=file_id,
            flags=file.flags | semaphore,
            fown=file.owner(),
            counter=int(next(file.lines("eventfd-count")), 16),
        )
        return file_entry(type=self.type, id=file_id, efd=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | entry.efd.flags & os.EFD_SEMAPHORE)
        build.adopt(entry.id, fd)
        # Not as initial value: that is 32 bits wide, the counter 64.
        if entry.efd.counter:
            os.eventfd_write(fd, entry.efd.counter)
        return fd
