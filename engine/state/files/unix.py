"""unix(7) sockets: pairs and connections inside the tree with what is queued in them, listeners, datagrams.

sock_diag tells who is connected with whom. Queues are read by peeking (unix_queue), on a duplicate of the socket, and
are filled again by sending from the other end. What is connected to a process outside the tree is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from phaul.engine.sockdiag import TCP_CLOSE, TCP_ESTABLISHED, TCP_LISTEN, UnixSocket
from phaul.engine.state.files import sockopts
from phaul.engine.state.files.base import (
    FileBuild,
    FileDump,
    FileKind,
    FileOptions,
    OpenFile,
    OpenFiles,
    inode_owners,
    no_owner,
)
from phaul.engine.state.files.unix_name import StagedName
from phaul.engine.state.files.unix_queue import SCM_CREDENTIALS, UCRED, peek_queue, send
from phaul.errors import ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.sk_opts_pb2 import sk_opts_entry
from phaul.images.pb.sk_packet_pb2 import scm_entry, sk_packet_entry
from phaul.images.pb.sk_unix_pb2 import file_perms_entry, unix_sk_entry

SIOCUNIXFILE: Final = 0x89E0  # linux/un.h: an O_PATH descriptor of the node that a socket is bound to
USK_EXTERN: Final = 1  # unix_sk_entry.uflags: a server outside the tree
TYPES: Final = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
_SHUT_READ, _SHUT_WRITE = 1, 2


def show_name(name: bytes) -> str:
    """The name of a socket for people: abstract ones with an @."""
    return name.replace(b"\0", b"@", 1).decode(errors="replace") if name[:1] == b"\0" else os.fsdecode(name)


# Dump.


@dataclass(frozen=True)
class _Node:
    """Where in the file system a socket is bound."""

    status: os.stat_result
    path: str
    deleted: bool


def _node(file: OpenFile) -> _Node:
    fd = fcntl.ioctl(file.dup(), SIOCUNIXFILE)
    try:
        status, path = os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    try:
        there = os.lstat(path)
        deleted = (there.st_dev, there.st_ino) != (status.st_dev, status.st_ino)
    except OSError:
        deleted = True
    return _Node(status, path.removesuffix(" (deleted)") if deleted else path, deleted)


def _directory(file: OpenFile, name: str, path: str) -> str:
    """The working directory in which a relative name was bound; the kernel does not tell."""
    below = os.path.normpath(name)
    if path.endswith(f"/{below}"):
        return path.removesuffix(f"/{below}") or "/"
    directory = os.readlink(f"/proc/{file.pid}/cwd")
    if os.path.normpath(os.path.join(directory, name)) == path:
        return directory
    raise file.refuse(f"unix socket {name}, whose name is relative to an unknown directory, cannot be moved")


def _is_path(name: bytes) -> bool:
    return bool(name) and not name.startswith(b"\0")


def _in_image(name: bytes) -> bytes:
    """A name as the image has it: paths end with a NUL."""
    return name + b"\0" if _is_path(name) else name


def _name(usk: unix_sk_entry) -> bytes:
    """A name of the image as bind(2) and connect(2) of Python take it."""
    return usk.name.rstrip(b"\0") if _is_path(usk.name) else usk.name


def _has_error(sock: socket.socket) -> bool:
    """Whether the next call on a socket fails with an error of the past; SO_ERROR would take it away."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _listener_of(client: UnixSocket, files: OpenFiles) -> UnixSocket | None:
    """The listener in whose queue a connection waits, of which the client knows no peer."""
    for sock in files.unix.values():
        if client.inode in sock.icons:
            return sock
    return None


class UnixSockets(FileKind):
    """AF_UNIX."""

    name = "unix socket"
    type = fd_types.UNIXSK
    field = "usk"

    def claims(self, file: OpenFile) -> bool:
        return sockopts.is_socket(file, socket.AF_UNIX) and file.socket.type in TYPES

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        here = files.unix.get(file.stat.st_ino)
        if here is None:
            raise file.refuse("unix socket of another network namespace, cannot be moved")
        if here.state == TCP_LISTEN:
            self._check_waiting(file, here, files)
        elif here.peer:
            self._check_peer(file, here, files, options)
        elif here.type != socket.SOCK_DGRAM and here.state == TCP_ESTABLISHED:
            listener = _listener_of(here, files)
            if listener is not None and listener.inode not in files.sockets:
                to = f"that waits for {show_name(listener.name)}, outside the tree, to accept it"
                raise file.refuse(f"unix socket {to}, cannot be moved")
            if listener is not None and here.wqueue:
                raise file.refuse("unix socket with data on a connection not yet accepted, cannot be moved")
        if here.type != socket.SOCK_STREAM and _has_error(file.socket):
            raise file.refuse("unix socket with an error that is still to be told, cannot be moved")
        unreachable = not here.peer and not here.name and here.state == TCP_CLOSE
        if here.type == socket.SOCK_DGRAM and here.rqueue and unreachable:
            raise file.refuse("unix socket with datagrams that nobody can send again, cannot be moved")

    @staticmethod
    def _check_waiting(file: OpenFile, here: UnixSocket, files: OpenFiles) -> None:
        if not here.icons:
            return
        what = f"unix socket {show_name(here.name)} with a connection that is not yet accepted"
        if any(client not in files.sockets for client in here.icons):
            raise file.refuse(f"{what} and comes from outside the tree, cannot be moved")

    @staticmethod
    def _check_peer(file: OpenFile, here: UnixSocket, files: OpenFiles, options: FileOptions) -> None:
        peer = files.unix.get(here.peer)
        if peer is None or here.peer not in files.sockets:
            can_stay = peer and here.type == socket.SOCK_DGRAM and peer.name[:1] in (b"\0", b"/") and not here.rqueue
            if can_stay and options.ext_unix_sk:
                return
            owner = inode_owners(f"socket:[{here.peer}]", files.tables)
            name = show_name(peer.name) if peer and peer.name else ""
            to = " of ".join(text for text in (name, owner) if text) or "a process"
            way_out = "; with --ext-unix-sk it is connected to that name again" if can_stay else ", cannot be moved"
            raise file.refuse(f"unix socket connected to {to}, outside the tree{way_out}")
        if peer.peer == here.inode:
            return
        if not peer.name:
            raise file.refuse("unix socket connected to one that has no name, cannot be moved")

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        here = dump.files.unix[file.stat.st_ino]
        listener = None if here.peer or here.state != TCP_ESTABLISHED else _listener_of(here, dump.files)
        entry = unix_sk_entry(
            id=file_id,
            ino=here.inode,
            type=here.type,
            state=here.state,
            flags=file.flags,
            uflags=0,
            backlog=here.wqueue if here.state == TCP_LISTEN else 0,
            peer=listener.inode if listener else here.peer,
            fown=file.owner(),
            opts=sockopts.dump_options(file),
            name=_in_image(here.name),
        )
        if here.shutdown:
            entry.shutdown = here.shutdown  # type: ignore[assignment]  # the kernel's bits are CRIU's numbers
        if _is_path(here.name):
            node = _node(file)
            status = node.status
            entry.file_perms.CopyFrom(file_perms_entry(mode=status.st_mode, uid=status.st_uid, gid=status.st_gid))
            entry.deleted = node.deleted
            if not here.name.startswith(b"/"):
                entry.name_dir = _directory(file, os.fsdecode(here.name), node.path)
        if here.type == socket.SOCK_DGRAM or here.state == TCP_ESTABLISHED:
            self._dump_queue(file, file_id, here.rqueue, dump)
        if here.peer and here.peer not in dump.files.sockets and dump.once((UnixSockets, here.peer)):
            self._dump_external(dump.files.unix[here.peer], dump)
        return file_entry(type=self.type, id=file_id, usk=entry)

    def _dump_external(self, sock: UnixSocket, dump: FileDump) -> None:
        """Add a server outside the tree: what counts is its name."""
        entry = unix_sk_entry(
            id=dump.new_id(),
            ino=sock.inode,
            type=sock.type,
            state=TCP_LISTEN,
            flags=0,
            uflags=USK_EXTERN,
            backlog=0,
            peer=0,
            fown=no_owner(),
            opts=sk_opts_entry(
                so_sndbuf=0, so_rcvbuf=0, so_snd_tmo_sec=0, so_snd_tmo_usec=0, so_rcv_tmo_sec=0, so_rcv_tmo_usec=0
            ),
            name=_in_image(sock.name),
        )
        dump.add(file_entry(type=self.type, id=entry.id, usk=entry))

    @staticmethod
    def _dump_queue(file: OpenFile, file_id: int, rqueue: int, dump: FileDump) -> None:
        sent = iter(file.sent)
        for queued in peek_queue(file.socket, rqueue):
            packet = sk_packet_entry(id_for=file_id, length=len(queued.data))
            if queued.sender:
                packet.scm.append(scm_entry(type=SCM_CREDENTIALS, rights=queued.sender))
            if queued.fds:
                for fd in queued.fds:
                    os.close(fd)
                rights = [dump.ids[next(sent)] for _ in queued.fds]
                packet.scm.append(scm_entry(type=socket.SCM_RIGHTS, rights=rights))
            dump.images.add("sk-queues", packet, queued.data)

    # Restore.

    def create(self, entry: file_entry, build: FileBuild) -> int:
        return build.part(_Build).create(entry.usk)

    def finish(self, entry: file_entry, fd: int, build: FileBuild) -> None:
        build.part(_Build).finish(entry.usk)


class _Build:
    """All unix sockets of one restore.

    Pairs are made at once, the others as plain sockets. When all are there: names, listen, connections that wait in
    a listener, datagram connections; then queues, options, and what is shut down.
    """

    def __init__(self, build: FileBuild) -> None:
        self.build = build
        self.by_inode = {entry.usk.ino: entry.usk for entry in build.entries.values() if entry.HasField("usk")}
        self.queues: dict[int, list[tuple[sk_packet_entry, bytes]]] = {}
        for message, data in build.images.records("sk-queues"):
            if isinstance(message, sk_packet_entry):
                self.queues.setdefault(message.id_for, []).append((message, data))
        self.others: dict[int, int] = {}  # id -> our descriptor of an end that the tree has closed
        self.bound: set[int] = set()
        self.staged: dict[int, StagedName] = {}
        self.connected: set[int] = set()
        self.unfinished = {usk.id for usk in self.by_inode.values()}.intersection(build.wanted)

    def peer(self, usk: unix_sk_entry) -> unix_sk_entry | None:
        return self.by_inode.get(usk.peer) if usk.peer else None

    def create(self, usk: unix_sk_entry) -> int:
        if usk.uflags & USK_EXTERN:
            raise ImageError(f"files: unix socket {usk.id} is outside the tree, but a process has it")
        if usk.type not in TYPES:
            raise ImageError(f"files: unix socket of type {usk.type}")
        peer = self.peer(usk)
        if usk.peer and peer is None:
            raise ImageError(f"files: unix socket {usk.id} is connected to one that is not in the image")
        # A datagram socket also gets this state from those who connect to its name.
        named = usk.type == socket.SOCK_DGRAM and usk.name
        lost_peer = not usk.peer and usk.state == TCP_ESTABLISHED and not named
        mutual = peer is not None and peer.peer == usk.ino and peer.id != usk.id
        if not lost_peer and not mutual:
            fd = socket.socket(socket.AF_UNIX, usk.type | socket.SOCK_CLOEXEC).detach()
            return self.build.adopt(usk.id, fd)
        if peer is not None and usk.type != socket.SOCK_DGRAM and usk.name[:1] == b"\0":
            ends = _accepted(usk.type, usk.name)
            self.bound.add(usk.id)
        elif peer is not None and usk.type != socket.SOCK_DGRAM and peer.name[:1] == b"\0":
            ends = _accepted(usk.type, peer.name)[::-1]
            self.bound.add(peer.id)
        else:
            one, two = socket.socketpair(socket.AF_UNIX, usk.type | socket.SOCK_CLOEXEC)
            ends = one.detach(), two.detach()
        if peer is None:
            self.others[usk.id] = self.build.keep_until_close(os.dup(ends[1]))
            os.close(ends[1])
        else:
            self.build.adopt(peer.id, ends[1])
            self.connected |= {usk.id, peer.id}
        return self.build.adopt(usk.id, ends[0])

    def finish(self, usk: unix_sk_entry) -> None:
        """Finishes all sockets with the last one; sockets need each other in too many orders."""
        self.unfinished.discard(usk.id)
        if self.unfinished:
            return
        opened = [usk for usk in self.by_inode.values() if usk.id in self.build.fds]
        # A connection has the name of its listener; if that is gone, the first one gets the node.
        taken = {(usk.name, usk.name_dir) for usk in opened if usk.state == TCP_LISTEN and not usk.deleted}
        for usk in opened:
            if _is_path(usk.name) and (usk.state != TCP_LISTEN or usk.deleted):
                place = usk.name, usk.name_dir
                if usk.deleted or place in taken:
                    self.bind(usk, keep=False)
                else:
                    taken.add(place)
        for usk in opened:
            if usk.name:
                self.bind(usk, keep=True)
        for usk in opened:
            if usk.state == TCP_LISTEN:
                with self.borrow(usk) as sock:
                    sock.listen(usk.backlog)
        for usk in opened:
            self.connect(usk)
        for usk in opened:
            with self.borrow(usk) as sock:
                sockopts.set_number(sock, socket.SOL_SOCKET, socket.SO_PASSCRED, int(usk.opts.so_passcred))
        for usk in opened:
            self.fill(usk)
        for usk in opened:
            with self.borrow(usk) as sock:
                sockopts.apply_options(sock, usk.opts)
                if usk.shutdown and usk.id not in self.others:
                    sock.shutdown(usk.shutdown - 1)

    def borrow(self, usk: unix_sk_entry) -> contextlib.AbstractContextManager[socket.socket]:
        return sockopts.borrowed(self.build.fds[usk.id])

    def bind(self, usk: unix_sk_entry, keep: bool) -> None:
        """Give a socket its name, once; without `keep` its node is not seen."""
        if usk.id in self.bound:
            return
        self.bound.add(usk.id)
        name = _name(usk)
        try:
            with self.borrow(usk) as sock:
                if _is_path(name):
                    staged = self.staged[usk.id] = StagedName(self.build, name, usk.name_dir, keep=keep)
                    staged.bind(sock.bind, usk.file_perms)
                else:
                    sock.bind(name)
        except OSError as error:
            taken = "another process of this host has this name"
            reason = taken if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
            raise RestoreError(f"unix socket {show_name(name)}: {reason}") from error

    def connect(self, usk: unix_sk_entry) -> None:
        """Connect a socket that was not made as one of a pair."""
        peer = self.peer(usk)
        if peer is None or usk.id in self.connected:
            return
        self.connected.add(usk.id)
        # Who is connected takes datagrams from its peer only, and connections only from it.
        for other in self.by_inode.values():
            if other.peer == usk.ino and other.id in self.build.fds:
                self.connect(other)
        with self.borrow(usk) as sock:
            sock.setblocking(False)
            try:
                sock.connect(self.address(peer))
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                name = show_name(_name(peer))
                raise RestoreError(f"unix socket {name}: cannot be connected to: {reason}") from error
            sock.setblocking(True)

    def address(self, usk: unix_sk_entry) -> str | bytes:
        """How a socket that has a name can be reached by now."""
        staged = self.staged.get(usk.id)
        return staged.address if staged else _name(usk)

    def fill(self, usk: unix_sk_entry) -> None:
        """Send what was queued for a socket."""
        packets = self.queues.get(usk.id)
        if not packets:
            return
        peer = self.peer(usk)
        if usk.id in self.others:
            source = self.others[usk.id]
        elif peer is not None and peer.peer == usk.ino:
            source = self.build.fds[peer.id]
        elif usk.type == socket.SOCK_DGRAM and usk.name:
            source = -1
        else:
            raise ImageError(f"files: unix socket {usk.id} has a queue but nobody who can have filled it")
        for packet, data in packets:
            if source >= 0:
                with sockopts.borrowed(source) as sock:
                    send(sock, data, *self.control(packet))
            elif peer is not None:
                with self.borrow(peer) as sock:
                    send(sock, data, *self.control(packet), self.address(usk))
            else:
                # A new sender each time: what it has sent is charged to its send buffer.
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                    send(sock, data, *self.control(packet), self.address(usk))

    def control(self, packet: sk_packet_entry) -> tuple[Sequence[int], list[int]]:
        """The sender of a message and the descriptors that go with it."""
        sender: Sequence[int] = ()
        fds: list[int] = []
        for entry in packet.scm:
            if entry.type == SCM_CREDENTIALS:
                sender = entry.rights
            elif entry.type == socket.SCM_RIGHTS:
                fds += [self.build.open(file_id) for file_id in entry.rights]
            else:
                raise ImageError(f"sk-queues: control message of type {entry.type} is unknown")
        return sender, fds


def _accepted(kind: int, name: bytes) -> tuple[int, int]:
    """A connection to an abstract name: the accepted end, which has the name, and the other one."""
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as listener:
        try:
            listener.bind(name)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise RestoreError(f"unix socket {show_name(name)}: {reason}") from error
        listener.listen(1)
        client = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
        client.connect(name)
        while True:
            end, _ = listener.accept()
            peer, _, _ = UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
            # Somebody else of this host may know the name too.
            if peer == os.getpid():
                return end.detach(), client.detach()
            end.close()
