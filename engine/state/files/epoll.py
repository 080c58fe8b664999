"""epoll(7): which files are watched, for what.

A watch belongs to a description *and* to the number that the descriptor had when it was added. The image holds a
number that leads to the description now, so that the watches can be added again by the process itself, when
all its descriptors are in place (epoll files may watch each other).
"""

from __future__ import annotations

import array
import errno
import os
import re
import select
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, FileOptions, OpenFile, OpenFiles, User
from phaul.errors import ImageError
from phaul.images.pb.eventpoll_pb2 import eventpoll_file_entry, eventpoll_tfd_entry
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch

_WATCH = re.compile(
    r"tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)\s+data:\s*([0-9a-f]+)\s+pos:\s*(-?\d+)\s+ino:([0-9a-f]+)\s+sdev:([0-9a-f]+)"
)
_EPOLL_EVENT = struct.Struct("<IQ")  # packed on x86-64
EPOLL_CTL_ADD: Final = 1
_EVENTS: Final = 0x3FFF  # EPOLLIN to EPOLLRDHUP; above are the flags of the watch (EP_PRIVATE_BITS)


@dataclass(frozen=True, slots=True)
class Watch:
    """One line of an epoll's fdinfo.

    Attributes:
        tfd: the number when it was added.
        nth: how many watches with the same number come before it (kcmp(2), struct kcmp_epoll_slot).
        device: s_dev of the file system, as the kernel has it (major << 20 | minor).
    """

    tfd: int
    nth: int
    events: int
    data: int
    pos: int
    inode: int
    device: int


def watches(file: OpenFile) -> list[Watch]:
    """The watches of an epoll, as it was read."""
    found: list[Watch] = []
    seen: dict[int, int] = {}
    for line in file.info:
        match = _WATCH.match(line)
        if match:
            tfd, nth = int(match[1]), seen.get(int(match[1]), 0)
            seen[tfd] = nth + 1
            events, data, inode, device = (int(match[i], 16) for i in (2, 3, 5, 6))
            found.append(Watch(tfd, nth, events, data, int(match[4]), inode, device))
    return found


def _kernel_device(status_dev: int) -> int:
    """st_dev (glibc's encoding) as the kernel's dev_t."""
    return os.major(status_dev) << 20 | os.minor(status_dev)


def _watches(epoll: User, watch: Watch, target: User) -> bool:
    """Whether a watch is for the description of `target` (kcmp(2), KCMP_EPOLL_TFD)."""
    slot = array.array("I", [epoll.fd, watch.tfd, watch.nth])
    arguments = (target.pid, epoll.pid, native.KCMP_EPOLL_TFD, target.fd, slot.buffer_info()[0])
    try:
        return native.syscall("kcmp", *arguments) == 0
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOENT):  # changed meanwhile: only while the process runs
            return False
        raise


def _find(epoll: User, watch: Watch, pid: int, table: dict[int, OpenFile]) -> tuple[int, ...]:
    """The numbers in a process's table that lead to the watched description; the original one first."""

    def fits(number: int, file: OpenFile) -> bool:
        status = file.stat
        if status.st_ino != watch.inode or _kernel_device(status.st_dev) != watch.device:
            return False
        # A socket has but one description.
        return file.link.startswith("socket:") or _watches(epoll, watch, User(pid, number, False))

    original = table.get(watch.tfd)
    if original is not None and fits(watch.tfd, original):
        return (watch.tfd,)
    return tuple(number for number, file in table.items() if fits(number, file))


def resolve(file: OpenFile, files: OpenFiles) -> dict[Watch, int]:
    """For every watch a number that leads to its file, in the first process that has numbers for all.

    Raises:
        CannotMove: a watched file is open in no process that has the epoll.
    """
    wanted = watches(file)
    missing = 0
    tried: set[int] = set()
    # Of an epoll in flight nobody knows whose numbers those are.
    users = [(file.users[0], pid) for pid in files.tables] if file.in_flight else [(u, u.pid) for u in file.users]
    for user, pid in users:
        if pid in tried:
            continue
        tried.add(pid)
        table = files.tables[pid]
        found: dict[Watch, int] = {}
        taken: set[int] = set()
        for watch in wanted:
            free = [number for number in _find(user, watch, pid, table) if number not in taken]
            if not free:
                missing = watch.tfd
                break
            found[watch] = free[0]
            taken.add(free[0])
        else:
            return found
    raise file.refuse(f"epoll that watches a file which was fd {missing} but is not open there now, cannot be moved")


class Epolls(FileKind):
    """epoll_create(2)."""

    name = "epoll"
    type = fd_types.EVENTPOLL
    field = "epfd"

    def claims(self, file: OpenFile) -> bool:
        return file.link == "anon_inode:[eventpoll]"

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        # A running program may have closed a file since: the stop will tell.
        if files.stopped:
            resolve(file, files)

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        entry = eventpoll_file_entry(id=file_id, flags=file.flags, fown=file.owner())
        for watch, number in resolve(file, dump.files).items():
            entry.tfd.append(
                eventpoll_tfd_entry(
                    id=file_id,
                    tfd=number,
                    events=watch.events,
                    data=watch.data,
                    dev=watch.device,
                    inode=watch.inode,
                    pos=max(watch.pos, 0),
                )
            )
        return file_entry(type=self.type, id=file_id, epfd=entry)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        return native.syscall("epoll_create1", os.O_CLOEXEC)

    def finish(self, entry: file_entry, fd: int, build: FileBuild) -> None:
        # The process that adds the watches: the first that has the epoll and all the numbers.
        for name, table in build.tables.items():
            has_it = entry.id in table.values() or entry.id in build.in_flight
            if has_it and all(watch.tfd in table for watch in entry.epfd.tfd):
                build.shared[eventpoll_file_entry, entry.id] = name
                return
        raise ImageError(f"files: epoll {entry.id} watches descriptors that no process has")

    def helper(self, entry: file_entry, build: FileBuild) -> str | None:
        name: str = build.shared[eventpoll_file_entry, entry.id]
        return name

    def attach(self, entry: file_entry, fd: int, table: str, build: FileBuild, call: Batch) -> None:
        if build.shared[eventpoll_file_entry, entry.id] != table:
            return
        # First those that fire now, to become as they were; the events of the others must not be taken.
        ready = {watch.tfd: self._refires(watch, table, build) for watch in entry.epfd.tfd}
        first = [watch for watch in entry.epfd.tfd if ready[watch.tfd]]
        for watch in first:
            self._add(call, fd, watch, ready[watch.tfd])
        if first:
            call.epoll_wait(fd, call.space(_EPOLL_EVENT.size * len(first)), len(first), 0)
        for watch in entry.epfd.tfd:
            if not ready[watch.tfd]:
                self._add(call, fd, watch)

    @staticmethod
    def _add(call: Batch, fd: int, watch: eventpoll_tfd_entry, more: int = 0) -> None:
        event = call.data(_EPOLL_EVENT.pack(watch.events | more, watch.data))
        call.epoll_ctl(fd, EPOLL_CTL_ADD, watch.tfd, event)

    @staticmethod
    def _refires(watch: eventpoll_tfd_entry, table: str, build: FileBuild) -> int:
        """Of a one-shot watch that has fired: events that its file is ready for.

        Such a watch has no events left, but epoll_ctl(2) always adds EPOLLERR and EPOLLHUP. Letting it fire once more
        removes them; a file that is ready for nothing keeps them.
        """
        if not watch.events & select.EPOLLONESHOT or watch.events & _EVENTS:
            return 0
        poll = select.poll()
        poll.register(build.fds[build.tables[table][watch.tfd]], _EVENTS)
        return sum(events & _EVENTS for _, events in poll.poll(0))
