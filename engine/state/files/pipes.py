"""pipe(2) and named pipes: both ends, or one when the other is closed, with their content.

The content is copied by tee(2), which leaves it where it is. A packet pipe (O_DIRECT) has one pipes-data record for
each packet; an ordinary pipe has one record in all.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from phaul.engine import native
from phaul.engine.state.files.base import (
    FileBuild,
    FileDump,
    FileKind,
    FileOptions,
    OpenFile,
    OpenFiles,
    inode_owners,
)
from phaul.engine.state.files.regular import check_path, locate, make_entry
from phaul.errors import ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.fifo_pb2 import fifo_entry
from phaul.images.pb.fown_pb2 import fown_entry
from phaul.images.pb.pipe_data_pb2 import pipe_data_entry
from phaul.images.pb.pipe_pb2 import pipe_entry

SPLICE_F_NONBLOCK: Final = 2


def _reads(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_WRONLY


def _writes(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


def check_ends(file: OpenFile, files: OpenFiles) -> None:
    """Refuse a pipe whose other end is open, but not in the tree."""
    ends = files.of_inode(file)
    if any(_reads(end.flags) for end in ends) and any(_writes(end.flags) for end in ends):
        return
    poll = select.poll()
    poll.register(file.dup(), 0)
    closed = select.POLLHUP if _reads(file.flags) else select.POLLERR
    if not any(events & closed for _, events in poll.poll(0)):
        other = inode_owners(file.link, files.tables) or "a process that cannot be seen"
        what = "pipe" if file.link.startswith("pipe:") else f"named pipe {file.link}"
        raise file.refuse(f"{what} whose other end belongs to {other}, outside the tree, cannot be moved")


def _read_all(fd: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(fd, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            return
        yield data


def dump_content(file: OpenFile, name: str, dump: FileDump) -> None:
    """Write what is in a pipe to an image, once for all its ends that can be read from."""
    number = file.stat.st_ino
    if not _reads(file.flags) or not dump.once((name, file.stat.st_dev, number)):
        return
    fd = file.dup()
    size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    out, into = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, size)
        try:
            native.syscall("tee", fd, into, size, SPLICE_F_NONBLOCK)
        except BlockingIOError:
            packets = []
        else:
            # A read ends where a packet ends: the copied buffers still know.
            packets = list(_read_all(out))
    finally:
        os.close(out)
        os.close(into)
    if not any(end.flags & os.O_DIRECT for end in dump.files.of_inode(file)):
        packets = [b"".join(packets)]
    for packet in packets or [b""]:
        dump.images.add(name, pipe_data_entry(pipe_id=number, bytes=len(packet), size=size), packet)


@dataclass
class _Pipe:
    """A pipe under construction: ends not yet given away, and one descriptor to open more of them."""

    anchor: int
    ends: dict[int, int] = field(default_factory=dict)

    def close_rest(self) -> None:
        """What nobody has taken is an end that was closed."""
        for end in self.ends.values():
            os.close(end)


def _contents(name: str, build: FileBuild) -> dict[int, list[tuple[pipe_data_entry, bytes]]]:
    """The records of a content image by pipe."""
    if name not in build.shared:
        found: dict[int, list[tuple[pipe_data_entry, bytes]]] = {}
        for message, data in build.images.records(name):
            if isinstance(message, pipe_data_entry):
                found.setdefault(message.pipe_id, []).append((message, data))
        build.shared[name] = found
    contents: dict[int, list[tuple[pipe_data_entry, bytes]]] = build.shared[name]
    return contents


def _fill(fd: int, records: list[tuple[pipe_data_entry, bytes]], packets: bool) -> None:
    """Give a new pipe its size and content."""
    size = records[0][0].size if records else 0
    if size and fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) != size:
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
        except PermissionError as error:
            limits = "/proc/sys/fs/pipe-max-size and pipe-user-pages-soft"
            raise RestoreError(f"pipe of {size} bytes: more than {limits} allow here") from error
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK | (os.O_DIRECT if packets else 0))
    for _, data in records:
        if data and os.write(fd, data) != len(data):
            raise RestoreError(f"{len(data)} bytes do not fit into a pipe of {size}")
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _reopen(fd: int, flags: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", flags & os.O_ACCMODE | os.O_NONBLOCK | os.O_CLOEXEC)


class Pipes(FileKind):
    """pipe(2)."""

    name = "pipe"
    type = fd_types.PIPE
    field = "pipe"

    def claims(self, file: OpenFile) -> bool:
        return file.link.startswith("pipe:[") and stat.S_ISFIFO(file.stat.st_mode)

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        check_ends(file, files)

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        dump_content(file, "pipes-data", dump)
        entry = pipe_entry(id=file_id, pipe_id=file.stat.st_ino, flags=file.flags, fown=file.owner())
        return file_entry(type=self.type, id=file_id, pipe=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        made = build.shared.setdefault(pipe_entry, {})
        pipe = made.get(entry.pipe.pipe_id)
        if pipe is None:
            out, into = os.pipe2(os.O_CLOEXEC)
            pipe = _Pipe(build.keep_until_close(os.dup(into)), {os.O_RDONLY: out, os.O_WRONLY: into})
            made[entry.pipe.pipe_id] = pipe
            build.cleanup.callback(pipe.close_rest)
            records = _contents("pipes-data", build).get(entry.pipe.pipe_id, [])
            _fill(into, records, entry.pipe.pipe_id in self._packet_pipes(build))
        end = pipe.ends.pop(entry.pipe.flags & os.O_ACCMODE, None)
        return _reopen(pipe.anchor, entry.pipe.flags) if end is None else end

    @staticmethod
    def _packet_pipes(build: FileBuild) -> set[int]:
        key = "packet pipes"
        if key not in build.shared:
            ends = [entry.pipe for entry in build.entries.values() if entry.HasField("pipe")]
            build.shared[key] = {end.pipe_id for end in ends if end.flags & os.O_DIRECT}
        found: set[int] = build.shared[key]
        return found


class Fifos(FileKind):
    """Named pipes: the path is that of a regular file, the content that of a pipe."""

    name = "named pipe"
    type = fd_types.FIFO
    field = "fifo"

    def claims(self, file: OpenFile) -> bool:
        named = file.link.startswith("/") and stat.S_ISFIFO(file.stat.st_mode)
        return named and not file.flags & os.O_PATH

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        check_path(file, options)
        check_ends(file, files)

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        node = dump.new_id()
        dump.add(make_entry(file, node, file.owner(), dump))
        dump_content(file, "fifo-data", dump)
        entry = fifo_entry(id=file_id, pipe_id=file.stat.st_ino, regf_id=node)
        return file_entry(type=self.type, id=file_id, fifo=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        made = build.shared.setdefault(fifo_entry, {})
        if entry.fifo.pipe_id not in made:
            # Open for both: opening one end alone would wait for the other.
            path = locate(self._node(entry, build).reg, build)
            both = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            made[entry.fifo.pipe_id] = build.keep_until_close(both)
            _fill(both, _contents("fifo-data", build).get(entry.fifo.pipe_id, []), packets=False)
        return _reopen(made[entry.fifo.pipe_id], self._node(entry, build).reg.flags)

    def parameters(self, entry: file_entry, build: FileBuild) -> tuple[int, fown_entry]:
        reg = self._node(entry, build).reg
        return reg.flags, reg.fown

    @staticmethod
    def _node(entry: file_entry, build: FileBuild) -> file_entry:
        node = build.entries.get(entry.fifo.regf_id)
        if node is None or not node.HasField("reg"):
            raise ImageError(f"files: named pipe {entry.id} has no path")
        return node
