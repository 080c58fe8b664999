"""memfd_create(2): files in memory, with name, seals and size.

The pages travel as those of shared memory do (pagemap-shmem-ID), whether the file is mapped or only open; who
writes them here needs `open_inode` before anything else of the files is built.
"""

from __future__ import annotations

import fcntl
import os
import resource as limits
import stat
from typing import Final

from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, FileOptions, OpenFile, OpenFiles, no_owner
from phaul.engine.state.files.regular import behind_link
from phaul.errors import ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.fown_pb2 import fown_entry
from phaul.images.pb.memfd_pb2 import memfd_file_entry, memfd_inode_entry

_PREFIX: Final = "/memfd:"
_DELETED: Final = " (deleted)"


def is_memfd(link: str, status: os.stat_result) -> bool:
    """Whether a link of /proc/PID leads to a memfd. (A file "/memfd:x" of the root directory has a name.)"""
    return link.startswith(_PREFIX) and status.st_nlink == 0


def _seals(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    finally:
        os.close(fd)


def _dump(file: OpenFile, file_id: int, owner: fown_entry, dump: FileDump) -> file_entry:
    from phaul.engine.memory import shmem_id

    key = (memfd_inode_entry, file.stat.st_dev, file.stat.st_ino)
    if key not in dump.paths:
        dump.paths[key] = len(dump.images.messages("memfd")) + 1
        inode = memfd_inode_entry(
            name=file.link.removeprefix(_PREFIX).removesuffix(_DELETED),
            uid=file.stat.st_uid,
            gid=file.stat.st_gid,
            size=file.stat.st_size,
            shmid=shmem_id(file.stat.st_dev, file.stat.st_ino),
            seals=_seals(file.path),
            inode_id=dump.paths[key],
            mode=file.stat.st_mode,
        )
        dump.images.add("memfd", inode)
    entry = memfd_file_entry(id=file_id, flags=file.flags, pos=file.pos, fown=owner, inode_id=dump.paths[key])
    return file_entry(type=fd_types.MEMFD, id=file_id, memfd=entry)


def check(file: OpenFile) -> None:
    """Refuse a memfd that cannot be moved."""
    if os.statvfs(file.path).f_bsize != limits.getpagesize():
        raise file.refuse("memfd of huge pages, cannot be moved")


def add_mapping(dump: FileDump, pid: int, resource: str, link: str, flags: int) -> int:
    """Add a memfd that is mapped to files.img, unless it is there already.

    Args:
        resource: what to call it in an error ("mapping at 7f0000000000").
        link: "/proc/PID/map_files/START-END".
        flags: O_RDWR for a writable shared mapping, else O_RDONLY.

    Returns:
        The id of the file; `memfd_inode_entry` of the same file tells where its pages are.
    """
    file = behind_link(pid, resource, link, flags)
    key = (file.link, file.stat.st_dev, file.stat.st_ino, flags)
    if key not in dump.paths:
        check(file)
        dump.paths[key] = dump.new_id()
        dump.add(_dump(file, dump.paths[key], no_owner(), dump))
    return dump.paths[key]


def open_inode(inode_id: int, build: FileBuild) -> int:
    """The memfd itself, writable, of full size and without content; sealed at the end of the build.

    A mapping that stays read-only has to be made from a descriptor that is opened for reading only, or
    F_SEAL_WRITE fails: open `/proc/self/fd/N` anew.

    Raises:
        ImageError: there is no such memfd.
    """
    made = build.shared.setdefault(memfd_inode_entry, {})
    if inode_id not in made:
        found = [inode for inode in build.images.messages("memfd", memfd_inode_entry) if inode.inode_id == inode_id]
        if len(found) != 1:
            raise ImageError(f"memfd: {len(found)} inodes have the number {inode_id}")
        made[inode_id] = _make(found[0], build)
    fd: int = made[inode_id]
    return fd


def _make(inode: memfd_inode_entry, build: FileBuild) -> int:
    if inode.hugetlb_flag:
        raise RestoreError(f"memfd {inode.name}: huge pages cannot be restored")
    # Without MFD_ALLOW_SEALING a memfd has this one seal from the start.
    sealing = 0 if inode.seals == fcntl.F_SEAL_SEAL else os.MFD_ALLOW_SEALING
    try:
        fd = build.keep_until_close(os.memfd_create(inode.name, os.MFD_CLOEXEC | sealing))
        os.ftruncate(fd, inode.size)
        if (inode.uid, inode.gid) != (os.geteuid(), os.getegid()):
            os.fchown(fd, inode.uid, inode.gid)
        if inode.HasField("mode") and inode.mode != os.fstat(fd).st_mode:
            os.fchmod(fd, stat.S_IMODE(inode.mode))
    except OSError as error:
        raise RestoreError(f"memfd {inode.name}: {error.strerror}") from error
    except (OverflowError, ValueError) as error:
        raise ImageError(f"memfd {inode.name!r}: {error}") from error
    if sealing and inode.seals:
        build.later(lambda: _seal(inode, fd))
    return fd


def _seal(inode: memfd_inode_entry, fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, inode.seals)
    except OSError as error:
        raise RestoreError(f"memfd {inode.name}: seals {inode.seals:#x}: {error.strerror}") from error


class Memfds(FileKind):
    """Open descriptions of memfds; several may share one inode."""

    name = "memfd"
    type = fd_types.MEMFD
    field = "memfd"

    def claims(self, file: OpenFile) -> bool:
        return is_memfd(file.link, file.stat) and not file.flags & os.O_PATH

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        check(file)

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        return _dump(file, file_id, file.owner(), dump)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        inode = open_inode(entry.memfd.inode_id, build)
        access = entry.memfd.flags & (os.O_ACCMODE | os.O_APPEND | os.O_LARGEFILE | os.O_NOATIME)
        fd = build.adopt(entry.id, os.open(f"/proc/self/fd/{inode}", access | os.O_CLOEXEC))
        if entry.memfd.pos:
            os.lseek(fd, entry.memfd.pos, os.SEEK_SET)
        return fd
