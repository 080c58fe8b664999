"""signalfd(2): a set of signals. What is pending belongs to the processes, not to the file."""

from __future__ import annotations

import array
import os

from phaul.engine import native
from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, OpenFile
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.signalfd_pb2 import signalfd_entry


class SignalFds(FileKind):
    """The mask is in fdinfo. Whoever reads gets its own signals, so it does not matter who makes the file."""

    name = "signalfd"
    type = fd_types.SIGNALFD
    field = "sgfd"

    def claims(self, file: OpenFile) -> bool:
        return file.link == "anon_inode:[signalfd]"

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        mask = int(next(file.lines("sigmask")), 16)
        entry = signalfd_entry(id=file_id, flags=file.flags, fown=file.owner(), sigmask=mask)
        return file_entry(type=self.type, id=file_id, sgfd=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        mask = array.array("Q", [entry.sgfd.sigmask])
        # SFD_CLOEXEC is O_CLOEXEC; the mask is _NSIG / 8 bytes long.
        return native.syscall("signalfd4", -1, mask.buffer_info()[0], mask.itemsize, os.O_CLOEXEC)
