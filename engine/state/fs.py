"""Working directory, root directory and umask: fs-PID.img."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from phaul.engine.batch import Batch
from phaul.engine.state.files.base import FileBuild, FileDump
from phaul.engine.state.files.regular import add_path, behind_link, check_path, locate
from phaul.errors import CannotMove, ImageError
from phaul.images.pb.fs_pb2 import fs_entry
from phaul.images.pb.regfile_pb2 import reg_file_entry

if TYPE_CHECKING:
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess


def preflight(pid: int) -> None:
    """Refuse a process whose root directory is not ours, or whose working directory is hidden.

    Raises:
        CannotMove: it is so.
    """
    # Of another root, paths would mean something else.
    theirs, ours = os.stat(f"/proc/{pid}/root"), os.stat("/")
    if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
        raise CannotMove(pid, "root directory", "is not that of phaul (chroot), cannot be moved")
    check_path(behind_link(pid, "working directory", f"/proc/{pid}/cwd"))


def dump_process(process: SourceProcess, dump: FileDump) -> None:
    """Add fs-PID. Both directories become files of files.img."""
    pid = process.pid
    preflight(pid)
    entry = fs_entry(
        cwd_id=add_path(dump, pid, "working directory", f"/proc/{pid}/cwd"),
        root_id=add_path(dump, pid, "root directory", f"/proc/{pid}/root"),
        umask=int(process.proc.status["Umask"], 8),
    )
    dump.images.add(f"fs-{pid}", entry)


def restore_process(process: SkeletonProcess, call: Batch, files: FileBuild) -> None:
    """Set working directory and umask; with the rights of root, so before the credentials.

    Raises:
        RestoreError: there is no such directory here.
    """
    entry = files.images.one(f"fs-{process.pid}", fs_entry)
    if _directory(entry.root_id, files).name != "/":
        raise ImageError(f"fs-{process.pid}: another root directory than /")
    call.chdir(locate(_directory(entry.cwd_id, files), files))
    call.umask(entry.umask)


def _directory(file_id: int, files: FileBuild) -> reg_file_entry:
    entry = files.entries.get(file_id)
    if entry is None or not entry.HasField("reg"):
        raise ImageError(f"files: there is no directory with id {file_id}")
    return entry.reg
