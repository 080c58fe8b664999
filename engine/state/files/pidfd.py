"""pidfd_open(2): a descriptor of a process of the tree."""

from __future__ import annotations

import os

from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, FileOptions, OpenFile, OpenFiles
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.pidfd_pb2 import pidfd_entry

# pidfd_open(2): PIDFD_NONBLOCK and PIDFD_THREAD are O_NONBLOCK and O_EXCL.
_FLAGS = os.O_NONBLOCK | os.O_EXCL


class PidFds(FileKind):
    """fdinfo tells the PID; the skeleton that has it exists before any file is made."""

    name = "pidfd"
    type = fd_types.PIDFD
    field = "pidfd"

    def claims(self, file: OpenFile) -> bool:
        return file.link.startswith(("pidfd:", "anon_inode:[pidfd]"))

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        pid = self._pid(file)
        if pid < 0:
            raise file.refuse("pidfd of a process that was waited for already, cannot be moved")
        if pid not in files.tables:
            raise file.refuse(f"pidfd of PID {pid}, which does not run in the tree, cannot be moved")

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        entry = pidfd_entry(
            id=file_id,
            ino=file.stat.st_ino & 0xFFFFFFFF,
            flags=file.flags,
            nspid=self._pid(file),
            fown=file.owner(),
        )
        return file_entry(type=self.type, id=file_id, pidfd=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        return os.pidfd_open(entry.pidfd.nspid, entry.pidfd.flags & _FLAGS)

    @staticmethod
    def _pid(file: OpenFile) -> int:
        return int(next(file.lines("Pid"), "-1"))
