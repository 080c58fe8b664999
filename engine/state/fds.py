"""Descriptor tables: which descriptors lead to which open files, for a whole tree.

At dump the tables of all processes are read, descriptors of one description are recognised, and each description is
given to the kind of file that claims it (phaul.engine.state.files). At restore all files are made in our process,
sent to the skeletons, and moved to their numbers there.
"""

from __future__ import annotations

import array
import os
import resource
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from phaul.engine.state import fs, locks
from phaul.engine.state.files.base import (
    FileBuild,
    FileDump,
    FileKind,
    FileOptions,
    OpenFile,
    OpenFiles,
    allow_many_files,
    kind_of,
    kinds,
    naming,
    set_parameters,
)
from phaul.errors import CannotMove, DumpError, ImageError, NoSuchProcess, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.fdinfo_pb2 import fdinfo_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess

FD_CLOEXEC: Final = 1
F_GETFD: Final = 1
F_SETFD: Final = 2
SCM_MAX_FD: Final = 253  # include/net/scm.h
_ATTEMPTS: Final = 3
_MESSAGES_IN_FLIGHT: Final = 8  # fewer than net.unix.max_dgram_qlen, which limits seqpacket queues too
_MSGHDR: Final = struct.Struct("=QI4xQQQQi4x")
_IOVEC: Final = struct.Struct("=QQ")
_CMSG: Final = struct.Struct("=Qii")

# How to call files that no kind claims, by the start of their link.
_UNCLAIMED: Final = {
    "anon_inode:[io_uring]": "io_uring",
    "anon_inode:[userfaultfd]": "userfaultfd",
    "anon_inode:[perf_event]": "perf event",
    "anon_inode:[fanotify]": "fanotify",
    "anon_inode:[pidfd]": "pidfd",
    "pidfd:": "pidfd",
    "anon_inode:[landlock": "Landlock rules",
    "anon_inode:bpf-map": "bpf map",
    "anon_inode:bpf-prog": "bpf program",
    "anon_inode:bpf_link": "bpf link",
    "anon_inode:bpf-link": "bpf link",
    "anon_inode:seccomp notify": "seccomp notifier",
    "anon_inode:kvm": "virtual machine (KVM)",
    "anon_inode:[fscontext]": "mount context",
    "/memfd:secretmem": "secret memory",
    "/dev/tty": "terminal",
    "/dev/fuse": "FUSE connection",
    "/dev/net/tun": "network tunnel",
    "mnt:[": "mount namespace",
    "net:[": "network namespace",
}
_FAMILIES: Final = {
    socket.AF_NETLINK: "netlink socket",
    socket.AF_PACKET: "packet socket",
    socket.AF_VSOCK: "vsock socket",
    socket.AF_ALG: "kernel crypto socket",
    socket.AF_CAN: "CAN socket",
}


def _describe(file: OpenFile) -> str:
    """What a file is that nobody claims."""
    mode = file.stat.st_mode
    if stat.S_ISSOCK(mode) and file.link.startswith("socket:"):
        sock = file.socket
        if sock.proto == 262:
            return "multipath TCP socket"
        if sock.type == socket.SOCK_RAW and sock.family in (socket.AF_INET, socket.AF_INET6):
            return "raw IP socket"
        return _FAMILIES.get(sock.family, f"socket of family {int(sock.family)}, type {int(sock.type)}")
    for start, name in _UNCLAIMED.items():
        if file.link.startswith(start):
            return f"{name} {file.link}" if file.link.startswith("/dev/") else name
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return f"device {file.link} ({os.major(file.stat.st_rdev)}:{os.minor(file.stat.st_rdev)})"
    return file.link.removeprefix("anon_inode:").strip("[]")


def _classify(file: OpenFile, files: OpenFiles, options: FileOptions) -> FileKind:
    """The kind of a file that can be moved.

    Raises:
        CannotMove: it cannot.
    """
    locks.check(file, options)
    for kind in kinds():
        if kind.claims(file):
            if file.in_flight and file.users[0].locks:
                raise file.refuse(f"{file.link} with a lock and open nowhere else, cannot be moved")
            kind.check(file, files, options)
            owner = file.owner()
            # A process group (2) is the tree's if it is named after one of its processes.
            if owner.pid and owner.pid not in files.tables:
                raise file.refuse(f"{kind.name} that signals PID {owner.pid} outside the tree, cannot be moved")
            return kind
    raise file.refuse(f"{_describe(file)}, cannot be moved")


def preflight(pids: Sequence[int], options: FileOptions) -> None:
    """Look for open files that cannot be moved, without stopping anything.

    Raises:
        CannotMove: the first one found, named.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            _preflight(pids, options)
        except CannotMove:
            continue  # it may be that the tables were read while they changed
        return
    _preflight(pids, options)


def _preflight(pids: Sequence[int], options: FileOptions) -> None:
    try:
        for pid in pids:
            fs.preflight(pid)
        files = OpenFiles(pids, stopped=False)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"PID {pids[0]}: a process of the tree has just ended") from error
    try:
        for file in files.all:
            try:
                _classify(file, files, options)
            except (DumpError, OSError):
                continue  # closed meanwhile
            except CannotMove:
                # Queues are not looked into while the processes run: the other end may be in one.
                if not any(other.has_descriptors for other in files.all):
                    raise
            finally:
                file.close()
    finally:
        files.close()


def collect(processes: Sequence[SourceProcess], images: ImageSet, options: FileOptions) -> FileDump:
    """Read all open files of stopped processes into the images; `ids.files_id` of each must be known.

    Returns:
        The dump, for what else has to be in files.img.

    Raises:
        CannotMove: a file that cannot be moved, named. DumpError: reading failed.
    """
    files = OpenFiles([process.pid for process in processes])
    dump = FileDump(images, options, files)
    try:
        _collect(files, dump)
        locks.dump(files, images)
    except BaseException:
        dump.undo.close()
        raise
    finally:
        files.close()
    cloexec = {(user.pid, user.fd) for file in files.all for user in file.users if user.cloexec}
    for process in processes:
        cloexec -= _not_cloexec(process, files)
        if files.owners[process.pid] != process.pid:
            continue
        for number, file in files.tables[process.pid].items():
            flags = FD_CLOEXEC if (process.pid, number) in cloexec else 0
            entry = fdinfo_entry(id=dump.ids[file], flags=flags, type=dump.types[file], fd=number)
            images.add(f"fdinfo-{process.ids.files_id}", entry)
    return dump


def _not_cloexec(process: SourceProcess, files: OpenFiles) -> set[tuple[int, int]]:
    """Descriptors that only seem to be close-on-exec: a terminal opened by TIOCGPTPEER keeps the flag that it got."""
    seeming = [
        user.fd
        for file in files.tables[process.pid].values()
        for user in file.users
        if user.pid == process.pid and user.cloexec and file.link.startswith("/dev/pts/")
    ]
    if not seeming:
        return set()
    call = process.threads[0].batch()
    found = {fd: call.fcntl(fd, F_GETFD) for fd in seeming}
    call.run()
    return {(process.pid, fd) for fd, flags in found.items() if not flags.value & FD_CLOEXEC}


def _collect(files: OpenFiles, dump: FileDump) -> None:
    found = []
    for file in files.all:
        kind = _classify(file, files, dump.options)
        found.append((file, kind))
        dump.ids[file], dump.types[file] = dump.new_id(), kind.type
        file.close()
    for each in kinds():
        each.begin([file for file, kind in found if kind is each], dump)
    for file, kind in found:
        try:
            dump.add(kind.dump(file, dump.ids[file], dump))
        except OSError as error:
            raise DumpError(f"{file.resource} of PID {file.pid} ({kind.name}): {error}") from error
        finally:
            file.close()


def build(made: FileBuild) -> None:
    """Make all open files of a tree in our process; those that are there already are kept.

    Owners of SIGIO must exist, so the skeletons must. Pages of memfds must have been written, since they are sealed.
    On an error the caller must `close` what has been made.

    Raises:
        ImageError: the images contradict each other. RestoreError: something cannot be made here.
    """
    allow_many_files(2 * len(made.wanted))
    for file_id in made.wanted:
        made.open(file_id)
    for file_id in made.wanted:
        _finish(made, file_id)
    made.run_last()


def _finish(made: FileBuild, file_id: int) -> None:
    entry, fd = made.entries[file_id], made.fds[file_id]
    kind = kind_of(entry.type)
    with naming(kind, file_id):
        kind.finish(entry, fd, made)

    def set_flags_and_owner() -> None:
        with naming(kind, file_id):
            set_parameters(fd, *kind.parameters(entry, made))

    # Sockets wait for each other: the parameters of all come after the last of them.
    made.later(set_flags_and_owner)


@dataclass(frozen=True, slots=True)
class Move:
    """One step of putting descriptors at their numbers: dup3(source, target), or only the flag where both are one."""

    source: int
    target: int
    cloexec: bool


def plan_moves(received: Sequence[int], wanted: Sequence[dict[int, bool]]) -> tuple[list[Move], list[int]]:
    """How to get from received descriptors to wanted numbers without overwriting one that is still needed.

    Args:
        received: distinct numbers, all close-on-exec.
        wanted: for each of them the numbers that it shall have, with their close-on-exec flag; no number twice.

    Returns:
        The moves in order, and then what is to be closed.
    """
    source_of: dict[int, int] = {}
    flag: dict[int, bool] = {}
    moves: list[Move] = []
    uses: dict[int, int] = {}
    for source, numbers in zip(received, wanted, strict=True):
        for number, cloexec in numbers.items():
            if number != source:
                source_of[number], flag[number] = source, cloexec
                uses[source] = uses.get(source, 0) + 1
            elif not cloexec:
                moves.append(Move(source, source, cloexec))
    stays = {source for source, numbers in zip(received, wanted, strict=True) if source in numbers}
    ready = [number for number in source_of if not uses.get(number)]
    spare = 1  # not 0: that is the socket, until the end
    occupied = set(received).union(source_of)
    while source_of:
        if not ready:
            # Only cycles are left: move one of them out of the way.
            number = next(iter(source_of))
            while spare in occupied:
                spare += 1
            occupied.add(spare)
            moves.append(Move(number, spare, True))
            for target, source in source_of.items():
                if source == number:
                    source_of[target] = spare
            uses[spare] = uses.pop(number)
            ready.append(number)
        number = ready.pop()
        source = source_of.pop(number)
        moves.append(Move(source, number, flag[number]))
        uses[source] -= 1
        if not uses[source] and source in source_of:
            ready.append(source)
    kept = stays.union(flag)
    return moves, sorted((set(received) | {spare for spare in uses if spare not in received}) - kept)


def install(process: SkeletonProcess, made: FileBuild, comm: socket.socket) -> None:
    """Give a skeleton its descriptors. Its own end of `comm` is its descriptor 0, and gone afterwards.

    Raises:
        RestoreError: the host's limits are too low. BatchError: a call failed.
    """
    ids = made.images.one(f"core-{process.pid}", core_entry).ids
    name = f"fdinfo-{ids.files_id}"
    if made.shared.setdefault((install, name), process.pid) != process.pid:
        return  # it shares the table of another process, which has got it already
    numbers: dict[int, dict[int, bool]] = {}
    for entry in made.images.messages(name, fdinfo_entry):
        numbers.setdefault(entry.id, {})[entry.fd] = bool(entry.flags & FD_CLOEXEC)
    highest = max((number for found in numbers.values() for number in found), default=0)
    helped = [i for i in sorted(made.in_flight) if kind_of(made.entries[i].type).helper(made.entries[i], made) == name]
    for file_id in helped:
        highest += 1
        numbers[file_id] = {highest: True}
    # In the order of the numbers most come to lie where they belong; whoever replaces the socket comes last.
    order = sorted(numbers, key=lambda file_id: (0 in numbers[file_id], min(numbers[file_id])))
    limits = _allow_number(process.pid, max(highest, len(order)) + 2)
    try:
        received = _send(process, [made.fds[file_id] for file_id in order], comm)
        moves, closes = plan_moves(received, [numbers[file_id] for file_id in order])
        call = process.batch()
        for move in moves:
            if move.source == move.target:
                call.fcntl(move.target, F_SETFD, 0)
            else:
                call.dup3(move.source, move.target, os.O_CLOEXEC if move.cloexec else 0)
        for number in closes if any(0 in found for found in numbers.values()) else [*closes, 0]:
            call.close(number)
        _attach(made, name, numbers, call)
        for file_id in helped:
            call.close(min(numbers[file_id]))
        call.run()
    finally:
        if limits is not None:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)


def _allow_number(pid: int, count: int) -> tuple[int, int] | None:
    """Raise a process's limit so that it can have `count` descriptors. Returns the old one if it was too low."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    if count <= soft:
        return None
    if hard != resource.RLIM_INFINITY and count > hard:
        raise RestoreError(f"PID {pid} needs {count} descriptors, the limit here is {hard} (ulimit -Hn)")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def _send(process: SkeletonProcess, fds: Sequence[int], comm: socket.socket) -> list[int]:
    """Send descriptors to a skeleton. Returns their numbers there, in the same order."""
    received: list[int] = []
    parts = [fds[i : i + SCM_MAX_FD] for i in range(0, len(fds), SCM_MAX_FD)]
    for i in range(0, max(1, len(parts)), _MESSAGES_IN_FLIGHT):
        call = process.batch()
        if i == 0:
            call.close_range(1, 0xFFFFFFFF, 0)
        buffers = []
        for part in parts[i : i + _MESSAGES_IN_FLIGHT]:
            socket.send_fds(comm, [b"f"], list(part))
            iov = call.data(_IOVEC.pack(call.space(8), 1))
            buffer = call.space(_CMSG.size + 4 * SCM_MAX_FD + 4)
            header = _MSGHDR.pack(0, 0, iov, 1, buffer, buffer.size, 0)
            call.recvmsg(0, call.space(len(header), header), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
            buffers.append((buffer, len(part)))
        call.run()
        for buffer, count in buffers:
            data = buffer.bytes()
            length, *_ = _CMSG.unpack_from(data)
            got = array.array("i", data[_CMSG.size : length])
            if len(got) != count:
                raise RestoreError(f"PID {process.pid} got {len(got)} of {count} descriptors")
            received += got
    return received


def _attach(made: FileBuild, name: str, numbers: dict[int, dict[int, bool]], call: Batch) -> None:
    for file_id, found in numbers.items():
        entry = made.entries.get(file_id)
        if entry is None:
            raise ImageError(f"{name}: there is no file with id {file_id}")
        kind_of(entry.type).attach(entry, min(found), name, made, call)
