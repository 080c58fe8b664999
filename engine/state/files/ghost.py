"""Files whose path does not lead to them any more: remap-fpath.img and ghost-file-ID.img.

A file without any name left is a ghost: its content travels in the image set, and it is made again for a moment at
its old path, opened, and deleted. A file that has other names (hard links) is given one more for the journey,
`link_remap.N` beside its old path, which the restore takes away again.

While a tree is rebuilt, all who have such a file open get it through one O_PATH descriptor of ours, so that they
share one inode however many descriptors and mappings there are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from google.protobuf.message import Message

from phaul.engine import native
from phaul.engine.state.files.base import FileBuild, FileDump, FileOptions, OpenFile, no_owner
from phaul.errors import DumpError, ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.ghost_file_pb2 import ghost_chunk_entry, ghost_file_entry
from phaul.images.pb.regfile_pb2 import reg_file_entry
from phaul.images.pb.remap_file_path_pb2 import GHOST, LINKED, remap_file_path_entry
from phaul.images.pb.time_pb2 import timeval

DELETED: Final = " (deleted)"
GHOST_LIMIT: Final = 1 << 20
"""Bytes on disk of the largest deleted file that is taken along unless the user says otherwise."""

_GHOST_BIT: Final = 1 << 31  # in remap_id of images from before there was a remap_type
_AT_SYMLINK_FOLLOW: Final = 0x400
_BLOCK: Final = 512  # unit of st_blocks
_READ: Final = os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK | os.O_CLOEXEC


def name_of(file: OpenFile) -> str:
    """The path that a file has, or had."""
    return file.link.removesuffix(DELETED)


def is_lost(file: OpenFile) -> bool:
    """Whether a file's path leads nowhere, or to another file."""
    try:
        there = os.lstat(file.link)
    except OSError:
        return True
    return (there.st_dev, there.st_ino) != (file.stat.st_dev, file.stat.st_ino)


def check(file: OpenFile, options: FileOptions | None) -> None:
    """Refuse a lost file that cannot be taken along.

    Args:
        options: None for a directory, which needs no leave.

    Raises:
        CannotMove: it is too large, has other names, or is hidden by another file or a mount.
    """
    if not file.link.endswith(DELETED):
        raise file.refuse(f"{file.link}: this path leads to another file now, cannot be moved")
    if options is None:
        return
    if file.stat.st_nlink:
        if not options.link_remap:
            reason = "has other names (hard links); with --link-remap it can be moved"
            raise file.refuse(f"deleted file {name_of(file)} {reason}")
    elif stat.S_ISREG(file.stat.st_mode) and file.stat.st_blocks * _BLOCK > options.ghost_limit:
        reason = f"{file.stat.st_blocks * _BLOCK} bytes, more than --ghost-limit {options.ghost_limit}"
        raise file.refuse(f"deleted file {name_of(file)} of {reason}, cannot be moved")


def dump(file: OpenFile, file_id: int, images: FileDump) -> None:
    """Say in remap-fpath what stands in for the path of a lost file; its content goes to the images once.

    Args:
        file_id: id of its reg_file_entry.
    """
    key = _key(file)
    kind = LINKED if file.stat.st_nlink else GHOST
    if key not in images.paths:
        images.paths[key] = images.new_id()
        if kind == GHOST:
            _dump_ghost(file, images.paths[key], images)
        else:
            _dump_link(file, images.paths[key], images)
    images.images.add(
        "remap-fpath", remap_file_path_entry(orig_id=file_id, remap_id=images.paths[key], remap_type=kind)
    )


def stand_in(file: OpenFile, images: FileDump) -> str:
    """The path that `find` knows a lost file by, once it has been dumped."""
    name = name_of(file)
    return _link_name(name, images.paths[_key(file)]) if file.stat.st_nlink else name


def _key(file: OpenFile) -> object:
    return remap_file_path_entry, file.stat.st_dev, file.stat.st_ino


def _link_name(name: str, link_id: int) -> str:
    return os.path.join(_existing(os.path.dirname(name)), f"link_remap.{link_id}")


def _dump_ghost(file: OpenFile, ghost_id: int, images: FileDump) -> None:
    status = file.stat
    entry = ghost_file_entry(
        uid=status.st_uid,
        gid=status.st_gid,
        mode=status.st_mode,
        dev=kernel_device(status.st_dev),
        ino=status.st_ino,
        atim=_time(status.st_atime_ns),
        mtim=_time(status.st_mtime_ns),
    )
    name, content = f"ghost-file-{ghost_id:x}", b""
    chunks: list[tuple[int, bytes]] = []
    if stat.S_ISREG(status.st_mode):
        entry.size = status.st_size
        chunks = list(_chunks(file))
        entry.chunks = [(offset, len(data)) for offset, data in chunks] != [(0, status.st_size)]
        if not entry.chunks:
            content = chunks.pop()[1]
    elif stat.S_ISLNK(status.st_mode):
        entry.symlnk_target = os.readlink("", dir_fd=file.dup())
    elif stat.S_ISCHR(status.st_mode):
        entry.rdev = status.st_rdev
    images.images.add(name, entry, content)
    for offset, data in chunks:
        images.images.add(name, ghost_chunk_entry(len=len(data), off=offset), data)


def _chunks(file: OpenFile) -> Iterator[tuple[int, bytes]]:
    """The parts of a file that are no holes."""
    fd = os.open(file.path, _READ)
    try:
        end = 0
        while end < file.stat.st_size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            end = os.lseek(fd, start, os.SEEK_HOLE)
            data = bytearray()
            while len(data) < end - start:
                part = os.pread(fd, end - start - len(data), start + len(data))
                if not part:
                    raise DumpError(f"{name_of(file)}: became shorter while it was read")
                data += part
            yield start, bytes(data)
    finally:
        os.close(fd)


def _dump_link(file: OpenFile, link_id: int, images: FileDump) -> None:
    """Give a file that has other names one that can be found again; `FileDump.undo` removes it."""
    name = _link_name(name_of(file), link_id)
    source, target = native.buffer(os.fsencode(file.path) + b"\0"), native.buffer(os.fsencode(name) + b"\0")
    try:
        # link(2), as os.link calls it, would link the link of /proc itself.
        native.syscall("linkat", -100, source.address, -100, target.address, _AT_SYMLINK_FOLLOW)
    except OSError as error:
        raise file.refuse(f"deleted file {name_of(file)}: {name} cannot be made: {error.strerror}") from error
    images.undo.callback(_unlink, name)
    entry = reg_file_entry(id=link_id, flags=0, pos=0, fown=no_owner(), name=name, mode=file.stat.st_mode)
    images.add(file_entry(type=fd_types.REG, id=link_id, reg=entry))


def _existing(directory: str) -> str:
    """The lowest directory on the way to this one that is there."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    return directory


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _time(nanoseconds: int) -> timeval:
    return timeval(tv_sec=nanoseconds // 10**9, tv_usec=nanoseconds // 1000 % 10**6)


def kernel_device(device: int) -> int:
    """A device number as the kernel has it inside and CRIU's images too: 20 bits for the minor."""
    return os.major(device) << 20 | os.minor(device)


def remapped(build: FileBuild) -> dict[int, tuple[bool, int]]:
    """What stands in for lost files, by the ids of their reg_file_entry: (whether it is a ghost, its id)."""
    if remapped not in build.shared:
        found: dict[int, tuple[bool, int]] = {}
        for entry in build.images.messages("remap-fpath", remap_file_path_entry):
            if entry.HasField("remap_type"):
                if entry.remap_type not in (GHOST, LINKED):
                    raise ImageError(f"remap-fpath: file {entry.orig_id} is of an ended process's /proc")
                found[entry.orig_id] = (entry.remap_type == GHOST, entry.remap_id & ~_GHOST_BIT)
            else:
                found[entry.orig_id] = (bool(entry.remap_id & _GHOST_BIT), entry.remap_id & ~_GHOST_BIT)
        build.shared[remapped] = found
    made: dict[int, tuple[bool, int]] = build.shared[remapped]
    return made


def place(entry: reg_file_entry, build: FileBuild) -> str | None:
    """A path by which a lost file can be opened from any process; None for a file that has a path.

    It is valid until the build is closed. O_NOFOLLOW must not be used with it.

    Raises:
        RestoreError: it cannot be made here. ImageError: the images do not have it.
    """
    remap = remapped(build).get(entry.id)
    if remap is None:
        return None
    made: dict[tuple[bool, int], int] = build.shared.setdefault(place, {})
    if remap not in made:
        ghost, number = remap
        try:
            made[remap] = build.keep_until_close(
                _make_ghost(number, entry, build) if ghost else _take_link(number, entry, build)
            )
        except OSError as error:
            raise RestoreError(f"{entry.name} (deleted): {error}") from error
        except (OverflowError, ValueError) as error:
            raise ImageError(f"{entry.name} (deleted): {error}") from error
    return f"/proc/{os.getpid()}/fd/{made[remap]}"


def find(device: int, inode: int, path: str, build: FileBuild) -> reg_file_entry | None:
    """A lost file, by what it was at the source.

    Args:
        device: as `kernel_device` has it.
        path: as from `stand_in`.
    """
    for file_id, (ghost, number) in remapped(build).items():
        if file_id not in build.entries:
            raise ImageError(f"files: there is no file with id {file_id}")
        if ghost:
            record = _ghost_records(number, build)[0][0]
            found = isinstance(record, ghost_file_entry) and (record.dev, record.ino) == (device, inode)
        else:
            found = number in build.entries and build.entries[number].reg.name == path
        if found:
            return build.entries[file_id].reg
    return None


def _ghost_records(number: int, build: FileBuild) -> list[tuple[Message, bytes]]:
    name = f"ghost-file-{number:x}"
    records = build.images.records(name)
    if not records or not isinstance(records[0][0], ghost_file_entry):
        raise ImageError(f"image {name} is missing")
    return records


def _take_link(number: int, entry: reg_file_entry, build: FileBuild) -> int:
    link = build.entries.get(number)
    if link is None or not link.HasField("reg"):
        raise ImageError(f"files: there is no file with id {number}")
    source = build.path(link.reg.name)
    build.later(lambda: _unlink(source))
    return _for_a_moment(build.path(entry.name), lambda path: os.link(source, path, follow_symlinks=False))


def _make_ghost(number: int, entry: reg_file_entry, build: FileBuild) -> int:
    (ghost, content), *chunks = _ghost_records(number, build)
    assert isinstance(ghost, ghost_file_entry)

    def make(path: str) -> None:
        _create(path, ghost)
        try:
            if stat.S_ISREG(ghost.mode):
                _fill(path, ghost, content, chunks)
            _set_metadata(path, ghost)
        except BaseException:
            _remove(path)
            raise

    return _for_a_moment(build.path(entry.name), make)


def _create(path: str, ghost: ghost_file_entry) -> None:
    """Make an empty file, where there must be none."""
    if stat.S_ISREG(ghost.mode):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    elif stat.S_ISDIR(ghost.mode):
        os.mkdir(path, 0o700)
    elif stat.S_ISFIFO(ghost.mode):
        os.mkfifo(path, 0o600)
    elif stat.S_ISLNK(ghost.mode):
        os.symlink(ghost.symlnk_target, path)
    elif stat.S_ISCHR(ghost.mode):
        os.mknod(path, stat.S_IFCHR | 0o600, ghost.rdev)
    else:
        raise ImageError(f"{path}: a deleted file of mode {ghost.mode:o} cannot be restored")


def _fill(path: str, ghost: ghost_file_entry, content: bytes, chunks: list[tuple[Message, bytes]]) -> None:
    with open(path, "wb", buffering=0) as file:
        parts = [(chunk.off, data) for chunk, data in chunks if isinstance(chunk, ghost_chunk_entry)]
        for offset, data in parts if ghost.chunks else [(0, content)]:
            view = memoryview(data)
            while view:
                written = os.pwrite(file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        file.truncate(ghost.size if ghost.HasField("size") else len(content))


def _set_metadata(path: str, ghost: ghost_file_entry) -> None:
    os.chown(path, ghost.uid, ghost.gid, follow_symlinks=False)
    if not stat.S_ISLNK(ghost.mode):
        os.chmod(path, stat.S_IMODE(ghost.mode))
    if ghost.HasField("atim"):
        times = [time.tv_sec * 10**9 + time.tv_usec * 1000 for time in (ghost.atim, ghost.mtim)]
        os.utime(path, ns=(times[0], times[1]), follow_symlinks=False)


def _for_a_moment(path: str, make: Callable[[str], None]) -> int:
    """Make a file, open it (O_PATH), and remove its name again, with all directories that had to be made for it.

    Args:
        path: its name, unless there is a file of that name: then a similar one.
        make: creates the file; fails if there is one.
    """
    parents = _make_parents(path)
    try:
        free, number = path, 0
        while os.path.lexists(free):
            number += 1
            free = f"{path}.{number}"
        make(free)
        try:
            return os.open(free, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        finally:
            _remove(free)
    finally:
        for parent in reversed(parents):
            with suppress(OSError):  # somebody has put something into it
                os.rmdir(parent)


def _make_parents(path: str) -> list[str]:
    missing: list[str] = []
    directory = os.path.dirname(path)
    while not os.path.isdir(directory):
        missing.insert(0, directory)
        directory = os.path.dirname(directory)
    for parent in missing:
        os.mkdir(parent, 0o700)
    return missing


def _remove(path: str) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)
