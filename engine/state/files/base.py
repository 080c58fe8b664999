"""What every kind of open file has in common.

    FileKind    one kind: which files it claims, how they are read, how they are made again
    OpenFile    one open file description of a source process, and who has it open
    OpenFiles   all open file descriptions of a process tree
    FileDump    one dump: where the entries go, and the ids
    FileBuild   one restore: where the entries come from, and the descriptors made so far

A description is what open(2) makes and dup(2), fork(2) and SCM_RIGHTS share: flags, position and owner belong
to it. The kinds are found by looking through the modules of this package.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import pkgutil
import resource
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeVar

from phaul.engine import native
from phaul.errors import CannotMove, DumpError, ImageError, NoSuchProcess, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.fdinfo_pb2 import fd_types, fdinfo_entry, file_entry
from phaul.images.pb.fown_pb2 import fown_entry
from phaul.images.pb.sk_packet_pb2 import sk_packet_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.sockdiag import UnixSocket

T = TypeVar("T")

# linux/fcntl.h; the fcntl module does not have them.
F_SETSIG: Final = 10
F_GETSIG: Final = 11
F_SETOWN_EX: Final = 15
F_GETOWN_EX: Final = 16
F_GETOWNER_UIDS: Final = 17
_OWNER = struct.Struct("2i")
_UIDS = struct.Struct("2I")

# What fcntl(F_SETFL) can change.
SETTABLE_FLAGS: Final = os.O_APPEND | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME | os.O_NONBLOCK


class FileOptions(Protocol):
    """The options of a dump that kinds of files look at (`phaul.engine.dump.DumpOptions` has them)."""

    @property
    def tcp_close(self) -> bool: ...
    @property
    def link_remap(self) -> bool: ...
    @property
    def ghost_limit(self) -> int: ...
    @property
    def file_locks(self) -> bool: ...
    @property
    def ext_unix_sk(self) -> bool: ...
    @property
    def tcp_established(self) -> bool: ...
    @property
    def skip_in_flight(self) -> bool: ...
    @property
    def network_lock(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of a restore that kinds of files look at.

    Attributes:
        tcp_established: connections of TCP may be rebuilt.
        tcp_close: they come back closed.
        network_lock: their packets are dropped until the tree runs.
    """

    tcp_established: bool = False
    tcp_close: bool = False
    network_lock: bool = True


class Custody:
    """What a kind of file keeps of a stopped tree until its fate is known. Each end may come twice."""

    def hold(self) -> None:
        """The tree stays stopped even if we die, or is about to be killed."""

    def leave(self) -> None:
        """We go away from a tree that is held."""

    def kill(self) -> None:
        """The tree is gone: what it was goes on elsewhere."""


@dataclass(frozen=True, slots=True)
class User:
    """A descriptor that refers to a description, and what only it shows of the locks on the file (fdinfo)."""

    pid: int
    fd: int
    cloexec: bool
    locks: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class OpenFile:
    """One open file description, as /proc shows it.

    Attributes:
        resource: what to call it in messages to the user, after the PID `pid` ("fd 7").
        link: where /proc/PID/fd/N points ("/etc/hosts", "pipe:[1234]").
        flags: O_* as in f_flags, without O_CLOEXEC.
        info: the lines of /proc/PID/fdinfo/N behind the common ones, without those of locks.
        users: the descriptors that refer to it, in the order of the processes; none for a file that was not
            found in a descriptor table (a working directory, a mapped file).
        in_flight: it is open only in the queue of a unix socket (SCM_RIGHTS); its user is a descriptor of ours.
        sent: of a unix socket: the descriptions in its queue, in order.
    """

    pid: int
    resource: str
    path: str
    link: str
    stat: os.stat_result
    flags: int
    pos: int = 0
    mnt_id: int = -1
    info: tuple[str, ...] = ()
    users: list[User] = field(default_factory=list)
    in_flight: bool = False
    sent: list[OpenFile] = field(default_factory=list)
    _fd: int = -1
    _socket: socket.socket | None = None
    _owner: fown_entry | None = None

    def lines(self, key: str) -> Iterator[str]:
        """The values of all fdinfo lines with this key."""
        for line in self.info:
            name, _, value = line.partition(":")
            if name == key:
                yield value.strip()

    @property
    def has_descriptors(self) -> bool:
        """Whether descriptors wait in the queue of this socket (unix(7), SCM_RIGHTS)."""
        return any(int(count) for count in self.lines("scm_fds"))

    def refuse(self, reason: str) -> CannotMove:
        """The error that names this file as the reason why the tree cannot be moved."""
        return CannotMove(self.pid, self.resource, reason)

    def dup(self) -> int:
        """A descriptor of this description in our process; kept until `close`.

        Whoever changes position, flags or options through it changes them for the owner.
        """
        if self._fd < 0:
            user = self.users[0]
            pidfd = os.pidfd_open(user.pid)
            try:
                self._fd = native.syscall("pidfd_getfd", pidfd, user.fd, 0)
            except OSError as error:
                raise DumpError(f"{self.resource} of PID {self.pid}: cannot be read: {error.strerror}") from error
            finally:
                os.close(pidfd)
        return self._fd

    @property
    def socket(self) -> socket.socket:
        """`dup` as a socket object, closed by `close`. Only for sockets."""
        if self._socket is None:
            self._socket = socket.socket(fileno=self.dup())
        return self._socket

    def owner(self) -> fown_entry:
        """Who gets SIGIO (F_GETOWN_EX, F_GETOWNER_UIDS) and which signal that is (F_GETSIG)."""
        if self._owner is None:
            self._owner = no_owner() if self.flags & os.O_PATH or not self.users else self._read_owner()
        return self._owner

    def _read_owner(self) -> fown_entry:
        fd = self.dup()
        pid_type, pid = _OWNER.unpack(fcntl.fcntl(fd, F_GETOWN_EX, bytes(_OWNER.size)))
        uid, euid = 0, 0
        if pid:
            uid, euid = _UIDS.unpack(fcntl.fcntl(fd, F_GETOWNER_UIDS, bytes(_UIDS.size)))
        return fown_entry(uid=uid, euid=euid, signum=fcntl.fcntl(fd, F_GETSIG), pid_type=pid_type, pid=pid)

    def close(self) -> None:
        """Drop our descriptor, if there is one. `dup` may be called again."""
        if self._socket is not None:
            self._socket.detach()
            self._socket = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def no_owner() -> fown_entry:
    """The owner of a file that has none."""
    return fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)


def _read_table(pid: int) -> Iterator[tuple[User, OpenFile]]:
    directory = f"/proc/{pid}/fd"
    try:
        numbers = sorted(map(int, os.listdir(directory)))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"PID {pid}: no such process") from error
    for number in numbers:
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile: only while the process runs
            yield _read_descriptor(pid, number)


def _read_descriptor(pid: int, number: int) -> tuple[User, OpenFile]:
    path = f"/proc/{pid}/fd/{number}"
    link, status = os.readlink(path), os.stat(path)
    with open(f"/proc/{pid}/fdinfo/{number}", "rb") as file:
        pos, flags, mnt_id, *info = file.read().decode(errors="surrogateescape").splitlines()
    all_flags = int(flags.split()[1], 8)
    locks = tuple(line.partition(":")[2].strip() for line in info if line.startswith("lock:"))
    found = OpenFile(
        pid,
        f"fd {number}",
        path,
        link,
        status,
        all_flags & ~os.O_CLOEXEC,
        int(pos.split()[1]),
        int(mnt_id.split()[1]),
        tuple(line for line in info if not line.startswith("lock:")),
    )
    return User(pid, number, bool(all_flags & os.O_CLOEXEC), locks), found


def same_order(a: User, b: User) -> int:
    """0 if both descriptors refer to one description, else 1 or 2: an order (kcmp(2), KCMP_FILE)."""
    try:
        return native.syscall("kcmp", a.pid, b.pid, native.KCMP_FILE, a.fd, b.fd)
    except OSError as error:
        if error.errno == errno.EBADF:  # closed meanwhile: only while the process runs
            return 1
        raise


def _group(key_mates: list[OpenFile], user: User) -> OpenFile | int:
    """The file among `key_mates` (sorted by kcmp) that `user` refers to, or where a new one belongs."""
    low, high = 0, len(key_mates)
    while low < high:
        middle = (low + high) // 2
        order = same_order(user, key_mates[middle].users[0])
        if order == 0:
            return key_mates[middle]
        if order == 1:
            high = middle
        else:
            low = middle + 1
    return low


def _owners_of_tables(pids: Sequence[int]) -> dict[int, int]:
    """PID -> the first PID that has the same descriptor table (CLONE_FILES), itself as a rule."""
    ordered: list[int] = []
    owners: dict[int, int] = {}
    for pid in pids:
        low, high = 0, len(ordered)
        while low < high and pid not in owners:
            middle = (low + high) // 2
            order = native.syscall("kcmp", pid, ordered[middle], native.KCMP_FILES, 0, 0)
            if order == 0:
                owners[pid] = ordered[middle]
            low, high = (low, middle) if order == 1 else (middle + 1, high)
        if pid not in owners:
            ordered.insert(low, pid)
            owners[pid] = pid
    return owners


class OpenFiles:
    """All open file descriptions of some processes.

    Attributes:
        all: every description once, in the order of processes and numbers.
        tables: PID -> number -> description.
        owners: PID -> the first PID with the same table, itself as a rule.
        by_inode: (st_dev, st_ino) -> descriptions.
        stopped: whether the processes are; else two files may have been read at different times.
    """

    def __init__(self, pids: Sequence[int], *, stopped: bool = True) -> None:
        """Read the descriptor tables. Exact only while the processes are stopped."""
        self.stopped = stopped
        self.all: list[OpenFile] = []
        self.tables: dict[int, dict[int, OpenFile]] = {}
        self.by_inode: dict[tuple[int, int], list[OpenFile]] = {}
        self._held: list[int] = []
        mates: dict[object, list[OpenFile]] = {}
        self.owners = _owners_of_tables(pids)
        for pid, owner in self.owners.items():
            if owner != pid:
                self.tables[pid] = self.tables[owner]
                continue
            table = self.tables[pid] = {}
            for user, found in _read_table(pid):
                table[user.fd] = known = self._known(user, found, mates)
                known.users.append(user)
        for file in self.all:  # which grows
            if file.has_descriptors and stopped:
                self._look_into_queue(file, mates)

    def _known(self, user: User, found: OpenFile, mates: dict[object, list[OpenFile]]) -> OpenFile:
        """The description that a descriptor refers to: one that is known already, or `found`."""
        # kcmp only decides among files that look the same. What timerfds show changes with time.
        info = () if found.link == "anon_inode:[timerfd]" else found.info
        key = (found.link, found.stat.st_dev, found.stat.st_ino, found.flags, found.pos, found.mnt_id, info)
        group = mates.setdefault(key, [])
        known = _group(group, user)
        if isinstance(known, int):
            group.insert(known, found)
            self.all.append(found)
            self.by_inode.setdefault((found.stat.st_dev, found.stat.st_ino), []).append(found)
            known = found
        return known

    def _look_into_queue(self, file: OpenFile, mates: dict[object, list[OpenFile]]) -> None:
        """Add what waits in a unix socket: peeking gives us descriptors of our own."""
        from phaul.engine.state.files.unix_queue import peek_queue

        if file.stat.st_ino not in self.unix:
            return  # of another network namespace: refused as such
        for packet in peek_queue(file.socket, self.unix[file.stat.st_ino].rqueue):
            for fd in packet.fds:
                user, found = _read_descriptor(os.getpid(), fd)
                known = self._known(user, found, mates)
                if known is found:
                    found.pid, found.resource = file.pid, f"descriptor in the queue of {file.resource}"
                    found.in_flight = True
                    found.users.append(user)
                    self._held.append(fd)
                else:
                    os.close(fd)
                file.sent.append(known)
        file.close()

    def of_inode(self, file: OpenFile) -> list[OpenFile]:
        """All descriptions of the same inode, `file` included."""
        return self.by_inode[file.stat.st_dev, file.stat.st_ino]

    @cached_property
    def sockets(self) -> dict[int, OpenFile]:
        """Sockets by inode number (a socket has one description)."""
        return {file.stat.st_ino: file for file in self.all if stat.S_ISSOCK(file.stat.st_mode)}

    @cached_property
    def unix(self) -> dict[int, UnixSocket]:
        """What sock_diag tells of the unix sockets of our network namespace, by inode number."""
        from phaul.engine.sockdiag import unix_sockets

        return unix_sockets()

    def close(self) -> None:
        """Drop all descriptors that `OpenFile.dup` has made, and those of files in flight."""
        for file in self.all:
            file.close()
        while self._held:
            os.close(self._held.pop())


class FileDump:
    """One dump of files: gives out ids and collects entries.

    Attributes:
        files: all descriptions of the tree.
        ids, types: description -> its id in files.img, its kind's number.
        paths: ids by other keys, for what is in no descriptor table.
        undo: to be closed if the tree stays: takes back what was changed in the file system for the restore.
        custody: to be told what becomes of the tree, unless it goes on here: that closes `undo`.
    """

    def __init__(self, images: ImageSet, options: FileOptions, files: OpenFiles) -> None:
        self.images, self.options, self.files = images, options, files
        self.ids: dict[OpenFile, int] = {}
        self.types: dict[OpenFile, fd_types] = {}
        self.paths: dict[object, int] = {}
        self.undo = contextlib.ExitStack()
        self.custody: list[Custody] = []
        self._seen: set[object] = set()
        self._last_id = 0

    def new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def add(self, entry: file_entry) -> None:
        """Append to files.img."""
        self.images.add("files", entry)

    def once(self, key: object) -> bool:
        """True the first time that it is asked about a key."""
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


def _in_flight(images: ImageSet) -> Iterator[int]:
    """Ids of the files in the queues of sockets."""
    for message, _ in images.records("sk-queues"):
        if isinstance(message, sk_packet_entry):
            for control in message.scm:
                if control.type == socket.SCM_RIGHTS:
                    yield from control.rights


class FileBuild:
    """One restore of files: all open descriptions of a tree, made in our process.

    Attributes:
        entries: file_entry by id.
        fds: id -> descriptor in our process (close-on-exec), kept until `close`.
        tables: name of an fdinfo image -> descriptor number -> id of the file.
        in_flight: ids of the files that are in queues of sockets only.
        wanted: ids of all files that are in a table or in flight, ascending.
        shared: what kinds keep for the time of a restore, by a key of their own.
        cleanup: runs at `close`; for descriptors that are needed only while building.
        at_end: runs when `close` has closed everything else.
    """

    def __init__(self, images: ImageSet, root: str = "/", options: BuildOptions | None = None) -> None:
        """Raises ImageError when a table contradicts itself."""
        self.images, self.root, self.options = images, root, options or BuildOptions()
        self.entries = {entry.id: entry for entry in images.messages("files", file_entry)}
        self.fds: dict[int, int] = {}
        self.tables: dict[str, dict[int, int]] = {}
        for name in images.names():
            if name.startswith("fdinfo-"):
                descriptors = images.messages(name, fdinfo_entry)
                table = self.tables[name] = {descriptor.fd: descriptor.id for descriptor in descriptors}
                if len(table) != len(descriptors):
                    raise ImageError(f"{name}: a descriptor comes twice")
        in_tables = {file_id for table in self.tables.values() for file_id in table.values()}
        self.in_flight = set(_in_flight(images)) - in_tables
        self.wanted = sorted(in_tables | self.in_flight)
        self.shared: dict[object, Any] = {}
        self.cleanup = contextlib.ExitStack()
        self.at_end = contextlib.ExitStack()
        self._last: list[Callable[[], None]] = []
        self._on_resume: list[Callable[[], None]] = []
        self._on_abort: list[Callable[[], None]] = []

    def part(self, maker: Callable[[FileBuild], T]) -> T:
        """What `maker` makes of this build; made at the first call, kept for all others."""
        if maker not in self.shared:
            self.shared[maker] = maker(self)
        made: T = self.shared[maker]
        return made

    def path(self, name: str) -> str:
        """Where a path of the image is on this host."""
        return os.path.join(self.root, name.lstrip("/"))

    def open(self, file_id: int) -> int:
        """The descriptor of a file, which is created if it is not there yet.

        Raises:
            ImageError: there is no such file in the image.
            RestoreError: it cannot be made here.
        """
        if file_id not in self.fds:
            entry = self.entries.get(file_id)
            if entry is None:
                raise ImageError(f"files: there is no file with id {file_id}")
            kind = kind_of(entry.type)
            with naming(kind, file_id):
                self.fds.setdefault(file_id, kind.create(entry, self))
        return self.fds[file_id]

    def adopt(self, file_id: int, fd: int) -> int:
        """Set the descriptor of a file that was made together with another one. Returns it."""
        self.fds[file_id] = fd
        return fd

    def keep_until_close(self, fd: int) -> int:
        """A descriptor that is closed together with all others. Returns it."""
        self.cleanup.callback(os.close, fd)
        return fd

    def later(self, step: Callable[[], None]) -> None:
        """Have `step` called when all files have been built."""
        self._last.append(step)

    def run_last(self) -> None:
        """Make the calls that `later` has put off."""
        for step in self._last:
            step()
        self._last.clear()

    def on_resume(self, step: Callable[[], None]) -> None:
        """Have `step` called right before the tree runs. It needs descriptors of its own: `close` comes earlier."""
        self._on_resume.append(step)

    def on_abort(self, step: Callable[[], None]) -> None:
        """Have `step` called when the half-built tree has been killed."""
        self._on_abort.append(step)

    def resume(self) -> None:
        """The tree is about to run: make the calls of `on_resume`; those of `on_abort` are void."""
        while self._on_resume:
            self._on_resume.pop(0)()
        self._on_abort.clear()

    def abort(self) -> None:
        """The tree is gone: make the calls of `on_abort`, the last one first. Idempotent."""
        self._on_resume.clear()
        while self._on_abort:
            self._on_abort.pop()()

    def close(self) -> None:
        """Close all descriptors in our process; what the tree has got stays."""
        self.cleanup.close()
        while self.fds:
            os.close(self.fds.popitem()[1])
        self.at_end.close()


class FileKind:
    """One kind of open file. A subclass in a module of this package is found by itself.

    Attributes:
        name: for messages ("pipe").
        type: its number in fdinfo and files images.
        field: the member of file_entry that holds it.
    """

    name: ClassVar[str]
    type: ClassVar[fd_types]
    field: ClassVar[str]

    def claims(self, file: OpenFile) -> bool:
        """Whether a file is of this kind. Exactly one kind may say so; without side effects."""
        raise NotImplementedError

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        """Refuse a file of this kind that cannot be moved; changes nothing, the owner may be running.

        Raises:
            CannotMove: with the reason.
        """

    def begin(self, files: Sequence[OpenFile], dump: FileDump) -> None:
        """Called with all files of this kind, let through by `check`, before the first `dump`.

        Raises:
            CannotMove: one of them cannot be moved after all.
        """

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        """The entry of a file that `check` has let through; its content goes to `dump.images`.

        The processes are stopped. The file is left as it was found.
        """
        raise NotImplementedError

    def create(self, entry: file_entry, build: FileBuild) -> int:
        """Make the file anew in our process. Returns the descriptor, which is close-on-exec."""
        raise NotImplementedError

    def finish(self, entry: file_entry, fd: int, build: FileBuild) -> None:
        """What can be done only when all files of the tree have been created."""

    def attach(self, entry: file_entry, fd: int, table: str, build: FileBuild, call: Batch) -> None:
        """Add calls to be made in a process whose descriptors have all got their numbers.

        Args:
            fd: the lowest number of this file there.
            table: name of the process's fdinfo image (`build.tables`).
        """

    def helper(self, entry: file_entry, build: FileBuild) -> str | None:
        """Of a file in flight: the table of a process that gets it for the time of `attach`."""
        return None

    def parameters(self, entry: file_entry, build: FileBuild) -> tuple[int, fown_entry]:
        """Flags (O_*) and owner, which are set at the very end."""
        message = getattr(entry, self.field)
        return message.flags, message.fown


@cache
def kinds() -> tuple[FileKind, ...]:
    """One object of every kind."""
    found: list[FileKind] = []
    package = __name__.rpartition(".")[0]
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        found += [
            cls()
            for cls in vars(module).values()
            if isinstance(cls, type) and issubclass(cls, FileKind) and "name" in vars(cls)
            if cls.__module__ == module.__name__
        ]
    return tuple(found)


def kind_of(number: int) -> FileKind:
    """The kind with this number. Raises ImageError if none has it."""
    for kind in kinds():
        if kind.type == number:
            return kind
    name = fd_types.Name(fd_types.ValueType(number)) if number in fd_types.values() else str(number)
    raise ImageError(f"files: files of type {name} cannot be restored")


@contextlib.contextmanager
def naming(kind: FileKind, file_id: int) -> Iterator[None]:
    """Turn what goes wrong with a file that is being made into errors that name it."""
    try:
        yield
    except OSError as error:
        raise RestoreError(f"{kind.name} (file {file_id}): {error}") from error
    except (OverflowError, ValueError, struct.error) as error:
        raise ImageError(f"files: {kind.name} (file {file_id}) has an impossible value: {error}") from error


def set_parameters(fd: int, flags: int, owner: fown_entry) -> None:
    """Set flags that fcntl(2) can change, the signal and the owner of SIGIO.

    The owner process must exist. Its uids become ours, as F_SETOWN has it.
    """
    if flags & os.O_PATH:
        return
    if owner.signum:
        fcntl.fcntl(fd, F_SETSIG, owner.signum)
    if owner.pid:
        fcntl.fcntl(fd, F_SETOWN_EX, _OWNER.pack(owner.pid_type, owner.pid))
    # After the owner: O_ASYNC sends from now on.
    if (fcntl.fcntl(fd, fcntl.F_GETFL) ^ flags) & SETTABLE_FLAGS:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & SETTABLE_FLAGS)


def allow_many_files(count: int) -> None:
    """Raise our own limit of open files, as far as it goes, to hold `count` more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + 256 > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def inode_owners(link: str, without: Iterable[int]) -> str:
    """Who else has a pipe or socket open: "PID 12 (sleep)", or "" if nobody is found."""
    excluded = {os.getpid(), *without}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in excluded:
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{name}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(f"/proc/{name}/fd/{fd}") == link:
                        with open(f"/proc/{name}/comm") as comm:
                            return f"PID {name} ({comm.read().strip()})"
    return ""
