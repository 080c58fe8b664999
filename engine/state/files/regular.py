"""Files that are opened again by their path: regular files, directories, the harmless devices, O_PATH.

The path must lead to the same file at the dump, and to a file of the same type and size at the restore;
`ghost` takes care of files that have lost theirs. Opened by path are also the files behind a process's working
directory, its program and its mappings: `add_path` makes their entries.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from phaul.engine.state.files import ghost
from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, FileOptions, OpenFile, OpenFiles, no_owner
from phaul.errors import ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.fown_pb2 import fown_entry
from phaul.images.pb.regfile_pb2 import reg_file_entry

# Devices without state (Linux allocated devices): null, zero, full, random, urandom.
DEVICES: Final = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9))

# Flags that only matter to the first open(2): an image that has them would create or cut files.
_NO_NAME: Final = os.O_TMPFILE & ~os.O_DIRECTORY
_NOT_AGAIN: Final = os.O_CREAT | os.O_EXCL | os.O_TRUNC | _NO_NAME


def check_path(file: OpenFile, options: FileOptions | None = None) -> None:
    """Refuse a file that can neither be found again by its path nor be made again.

    Args:
        options: None for a directory, which needs no leave.
    """
    if ghost.is_lost(file):
        ghost.check(file, options)
    try:
        file.link.encode()
    except UnicodeEncodeError:
        raise file.refuse(f"{os.fsencode(file.link)!r}: not a UTF-8 name, cannot be put into an image") from None


def make_entry(file: OpenFile, file_id: int, owner: fown_entry, dump: FileDump) -> file_entry:
    """The entry of a file that `check_path` has let through."""
    name = file.link
    if ghost.is_lost(file):
        name = ghost.name_of(file)
        ghost.dump(file, file_id, dump)
    entry = reg_file_entry(id=file_id, flags=file.flags, pos=file.pos, fown=owner, name=name, mode=file.stat.st_mode)
    if stat.S_ISREG(file.stat.st_mode):
        entry.size = file.stat.st_size
    return file_entry(type=fd_types.REG, id=file_id, reg=entry)


def behind_link(pid: int, resource: str, link: str, flags: int = os.O_RDONLY) -> OpenFile:
    """The file behind one of the links of /proc/PID other than descriptors; see `add_path`."""
    return OpenFile(pid, resource, link, os.readlink(link), os.stat(link), flags)


def add_path(dump: FileDump, pid: int, resource: str, link: str, flags: int = os.O_RDONLY) -> int:
    """Add the file behind one of the links of /proc/PID to files.img, unless it is there already.

    Args:
        resource: what to call it in an error ("working directory").
        link: "/proc/PID/cwd", "/proc/PID/exe", "/proc/PID/map_files/START-END".

    Returns:
        Its id.

    Raises:
        CannotMove: the file is hidden, or deleted and the options do not allow that.
    """
    file = behind_link(pid, resource, link, flags)
    key = (file.link, file.stat.st_dev, file.stat.st_ino, flags)
    known = dump.paths.get(key)
    if known is None:
        check_path(file, dump.options)
        known = dump.paths[key] = dump.new_id()
        dump.add(make_entry(file, known, no_owner(), dump))
    return known


def locate(entry: reg_file_entry, build: FileBuild) -> str:
    """A path of a file on this host, which is what the image says it is; valid until the build is closed.

    Raises:
        RestoreError: it is missing, or another file.
    """
    path = ghost.place(entry, build) or build.path(entry.name)
    try:
        here = os.lstat(path) if stat.S_ISLNK(entry.mode) else os.stat(path)
    except OSError as error:
        raise RestoreError(f"{entry.name}: {error.strerror} (the source has it open)") from error
    if entry.HasField("mode") and stat.S_IFMT(here.st_mode) != stat.S_IFMT(entry.mode):
        raise RestoreError(f"{entry.name}: another type of file than at the source")
    if stat.S_ISREG(here.st_mode) and entry.HasField("size") and here.st_size != entry.size:
        raise RestoreError(f"{entry.name}: has {here.st_size} bytes here, but had {entry.size} at the source")
    if stat.S_ISCHR(here.st_mode) and here.st_rdev not in DEVICES and not entry.flags & os.O_PATH:
        raise RestoreError(f"{entry.name}: another device than at the source")
    return path


class RegularFiles(FileKind):
    """Files with a path and without state of their own."""

    name = "file"
    type = fd_types.REG
    field = "reg"

    def claims(self, file: OpenFile) -> bool:
        if not file.link.startswith("/"):
            return False
        if file.flags & os.O_PATH:
            return True
        mode = file.stat.st_mode
        if stat.S_ISCHR(mode):
            return file.stat.st_rdev in DEVICES
        if file.link.startswith("/memfd:") and file.stat.st_nlink == 0:
            return False
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        check_path(file, options)

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        return make_entry(file, file_id, file.owner(), dump)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        reg = entry.reg
        if not reg.name.startswith("/"):
            raise ImageError(f"files: {reg.name!r} is not an absolute path")
        path, flags = locate(reg, build), reg.flags | os.O_CLOEXEC
        # Among the flags of O_TMPFILE is O_DIRECTORY, which then says nothing about the file.
        flags &= ~(os.O_TMPFILE | _NOT_AGAIN) if flags & _NO_NAME else ~_NOT_AGAIN
        if reg.id in ghost.remapped(build):
            # The path is a link of /proc. What a deleted symbolic link was opened with, it is open with.
            if stat.S_ISLNK(reg.mode):
                return build.adopt(entry.id, os.dup(int(os.path.basename(path))))
            flags &= ~os.O_NOFOLLOW
        # Without waiting if somebody here has a lease on it; `parameters` takes that flag off again.
        fd = os.open(path, flags | os.O_NONBLOCK)
        build.adopt(entry.id, fd)
        if reg.pos and not reg.flags & os.O_PATH:
            os.lseek(fd, reg.pos, os.SEEK_SET)
        return fd
