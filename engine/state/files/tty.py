"""Pseudo terminals: masters, slaves, /dev/tty, and whose controlling terminal they are.

Both ends of a terminal must be in the tree: the master (one description of /dev/ptmx) tells all about it, and making
it anew makes the terminal. Its slaves are then opened through it. The number (/dev/pts/N) must be free on the other
host. A session gets its controlling terminal before its leader has children (`open_session`), since they inherit it;
its foreground group when all groups exist (`set_foreground`).

Not in the image: output stopped by ^S, input of a terminal that no slave is open of, and which processes of a
session have left its terminal. `tty_queues` has what waits unread. The numbers of ids, and the terminal of /dev/tty
found by its session, are as in CRIU.

Source: pty(7), ioctl_tty(2), drivers/tty/pty.c, drivers/tty/tty_jobctrl.c.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import stat
import struct
import termios
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.engine.proc import Proc
from phaul.engine.state.files import tty_queues
from phaul.engine.state.files.base import FileBuild, FileDump, FileKind, FileOptions, OpenFile, OpenFiles, no_owner
from phaul.engine.state.files.tty_queues import TERMIOS, TIOCGLCKTRMIOS, TIOCGPTPEER, TIOCSLCKTRMIOS
from phaul.errors import CannotMove, ImageError, RestoreError
from phaul.images.pb.fdinfo_pb2 import fd_types, file_entry
from phaul.images.pb.regfile_pb2 import reg_file_entry
from phaul.images.pb.tty_pb2 import (
    CTTY,
    PTY,
    termios_entry,
    tty_data_entry,
    tty_file_entry,
    tty_info_entry,
    winsize_entry,
)

if TYPE_CHECKING:
    from phaul.engine.skeleton import SkeletonProcess

# asm-generic/ioctls.h; the termios module does not have them.
TIOCGSID: Final = 0x5429
TIOCSPTLCK: Final = 0x40045431
TIOCGPTN: Final = 0x80045430
TIOCGDEV: Final = 0x80045432
TIOCGPKT: Final = 0x80045438
TIOCGPTLCK: Final = 0x80045439
TIOCGEXCL: Final = 0x80045440

_PTMX: Final = os.makedev(5, 2)
_TTY: Final = os.makedev(5, 0)
_SLAVES: Final = 136  # major number (UNIX98_PTY_SLAVE_MAJOR); the minor number is N
_N_TTY: Final = 0
_WINSIZE: Final = struct.Struct("=4H")
_CTTY_ID: Final = 1 << 24  # beyond those of all pseudo terminals (NR_UNIX98_PTY_MAX)


def _get(fd: int, request: int) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(fd, request, value)
    return value[0]


def _get_or_zero(fd: int, request: int) -> int:
    """0 where there is no such thing: a terminal without session."""
    try:
        return _get(fd, request)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return 0
        raise


def _is_hung_up(file: OpenFile) -> bool:
    """The master is closed: everything fails, and reading ends."""
    try:
        _get(file.dup(), TIOCGDEV)
    except OSError as error:
        if error.errno == errno.EIO:
            return True
        raise
    return False


def _index(file: OpenFile) -> int:
    """N of /dev/pts/N, for any end that is not hung up."""
    return os.minor(_decode_device(_get(file.dup(), TIOCGDEV)))


def _decode_device(number: int) -> int:
    """A device number as the kernel shows it to 32-bit interfaces (new_encode_dev)."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)


def _masters(files: Iterable[OpenFile]) -> dict[int, OpenFile]:
    return {_index(file): file for file in files if stat.S_ISCHR(file.stat.st_mode) and file.stat.st_rdev == _PTMX}


# Dump.


def _check_controlling(files: OpenFiles, masters: dict[int, OpenFile]) -> None:
    for pid in files.tables:
        stat_fields = Proc(pid).stat
        if int(stat_fields[6]) not in files.tables:
            continue  # a job of a shell: it gets the terminal of the session that it joins
        device = _decode_device(int(stat_fields[7]) & 0xFFFFFFFF)
        if device and (os.major(device) != _SLAVES or os.minor(device) not in masters):
            raise CannotMove(
                pid, "controlling terminal", f"{_device_name(device)} is outside the tree, cannot be moved"
            )


def _device_name(device: int) -> str:
    if os.major(device) == _SLAVES:
        return f"/dev/pts/{os.minor(device)}"
    return f"{os.major(device)}:{os.minor(device)}"


def _termios(fd: int, request: int) -> termios_entry:
    iflag, oflag, cflag, lflag, line, cc = TERMIOS.unpack(fcntl.ioctl(fd, request, bytes(TERMIOS.size)))
    return termios_entry(
        c_iflag=iflag, c_oflag=oflag, c_cflag=cflag, c_lflag=lflag, c_line=line, c_ispeed=0, c_ospeed=0, c_cc=cc
    )


def _add_info(info: tty_info_entry, file: OpenFile, master: OpenFile | None, dump: FileDump) -> int:
    """Complete a terminal's entry and add it, unless it is there already. Returns its id."""
    if dump.once((tty_info_entry, info.id)):
        status = file.stat
        info.rdev, info.dev, info.uid, info.gid = status.st_rdev, status.st_dev, status.st_uid, status.st_gid
        info.locked = info.exclusive = info.packet_mode = False
        info.sid = info.pgrp = 0
        if master is not None:
            fd, end = master.dup(), file.dup()
            info.locked = bool(_get(fd, TIOCGPTLCK))
            info.packet_mode = bool(_get(fd, TIOCGPKT))
            info.exclusive = bool(_get(end, TIOCGEXCL))
            info.sid = _get_or_zero(fd, TIOCGSID)
            info.pgrp = _get_or_zero(fd, termios.TIOCGPGRP) if info.sid else 0
            info.termios.CopyFrom(_termios(fd, termios.TCGETS))
            info.termios_locked.CopyFrom(_termios(fd, TIOCGLCKTRMIOS))
            row, col, xpixel, ypixel = _WINSIZE.unpack(fcntl.ioctl(end, termios.TIOCGWINSZ, bytes(_WINSIZE.size)))
            info.winsize.CopyFrom(winsize_entry(ws_row=row, ws_col=col, ws_xpixel=xpixel, ws_ypixel=ypixel))
        dump.images.add("tty-info", info)
    return info.id


def _check_unread(file: OpenFile, master: OpenFile) -> None:
    """Refuse what cannot be taken out and put back."""
    size = tty_queues.unread(file.dup())
    output = tty_queues.unread(master.dup())
    if output and file is not master and not tty_queues.takes_output(file.dup()):
        raise file.refuse(f"terminal with stopped and unread output ({output} bytes), cannot be moved")
    if not size:
        return
    if _get(master.dup(), TIOCGPTLCK):
        raise file.refuse(f"locked terminal with unread data ({size} bytes), cannot be moved")
    if file.stat.st_rdev == _PTMX and _get(file.dup(), TIOCGPKT):
        raise file.refuse(f"terminal in packet mode with unread data ({size} bytes), cannot be moved")
    if size > tty_queues.MOST:
        raise file.refuse(f"terminal with so much unread data ({size} bytes), cannot be moved")


def _add_queues(index: int, queues: tty_queues.Queues, dump: FileDump) -> None:
    for tty_id, data in ((index * 2, queues.input), (index * 2 + 1, queues.output)):
        if data:
            dump.images.add("tty-data", tty_data_entry(tty_id=tty_id, data=data))


class Terminals(FileKind):
    """Both ends of pseudo terminals, and /dev/tty."""

    name = "terminal"
    type = fd_types.TTY
    field = "tty"

    def claims(self, file: OpenFile) -> bool:
        if not stat.S_ISCHR(file.stat.st_mode) or file.flags & os.O_PATH:
            return False
        return file.stat.st_rdev in (_PTMX, _TTY) or os.major(file.stat.st_rdev) == _SLAVES

    def check(self, file: OpenFile, files: OpenFiles, options: FileOptions) -> None:
        if _is_hung_up(file):
            return
        end = file.link
        device = _decode_device(_get(file.dup(), TIOCGDEV))
        if os.major(device) != _SLAVES:
            raise file.refuse(f"terminal {end} ({_device_name(device)}), cannot be moved")
        master = _masters(files.all).get(os.minor(device))
        if master is None:
            raise file.refuse(f"terminal {_device_name(device)} whose master is outside the tree, cannot be moved")
        if _get(file.dup(), termios.TIOCGETD) != _N_TTY:
            raise file.refuse(f"terminal {end} with a line discipline of its own, cannot be moved")
        session = _get_or_zero(master.dup(), TIOCGSID)
        if session and session not in files.tables:
            raise file.refuse(f"controlling terminal of session {session} outside the tree, cannot be moved")
        if file.stat.st_rdev == _TTY and not session:
            raise file.refuse("/dev/tty that is no session's terminal any more, cannot be moved")
        # A running program reads what it gets: the stop will tell.
        if files.stopped:
            _check_unread(file, master)

    def begin(self, files: Sequence[OpenFile], dump: FileDump) -> None:
        masters = _masters(files)
        _check_controlling(dump.files, masters)
        slaves = {_index(file) for file in files if file.stat.st_rdev != _PTMX and not _is_hung_up(file)}
        for index, master in masters.items():
            if (waiting := tty_queues.unread(master.dup())) and index not in slaves:
                raise master.refuse(f"terminal with {waiting} bytes unread and no slave open, cannot be moved")
            if index in slaves and not _get(master.dup(), TIOCGPTLCK):
                _add_queues(index, tty_queues.take(master.dup()), dump)

    def dump(self, file: OpenFile, file_id: int, dump: FileDump) -> file_entry:
        device = file.stat.st_rdev
        if device == _TTY:
            info = self._controlling(file, dump)
        elif device == _PTMX:
            info = self._pseudo(file, _index(file), file, dump)
        else:
            index = os.minor(device)
            master = None if _is_hung_up(file) else _masters(dump.files.all)[index]
            info = self._pseudo(file, index, master, dump)
        # The description has a flag of its own if TIOCGPTPEER opened it so.
        flags = file.flags | fcntl.fcntl(file.dup(), fcntl.F_GETFL) & os.O_CLOEXEC
        entry = tty_file_entry(id=file_id, tty_info_id=info, flags=flags, fown=file.owner(), regf_id=dump.new_id())
        node = reg_file_entry(
            id=entry.regf_id, flags=file.flags, pos=0, fown=no_owner(), name=file.link, mode=file.stat.st_mode
        )
        dump.add(file_entry(type=fd_types.REG, id=entry.regf_id, reg=node))
        return file_entry(type=self.type, id=file_id, tty=entry)

    @staticmethod
    def _pseudo(file: OpenFile, index: int, master: OpenFile | None, dump: FileDump) -> int:
        info = tty_info_entry(id=index * 2 + (file is master), type=PTY)
        if master is None:
            info.id += 2 * _CTTY_ID  # a living terminal may have the number now
        info.pty.index = index
        return _add_info(info, file, master, dump)

    @staticmethod
    def _controlling(file: OpenFile, dump: FileDump) -> int:
        if _is_hung_up(file):
            return _add_info(tty_info_entry(id=_CTTY_ID - 2, type=CTTY), file, None, dump)
        index = _index(file)
        master = _masters(dump.files.all)[index]
        return _add_info(tty_info_entry(id=_CTTY_ID + index * 2, type=CTTY), file, master, dump)

    def create(self, entry: file_entry, build: FileBuild) -> int:
        info = _info(entry, build)
        if not info.HasField("termios"):
            return _open_hung_up(entry.tty.flags)
        if info.type == CTTY:
            raise ImageError(f"files: /dev/tty (file {entry.id}) of session {info.sid}, which has no terminal")
        if info.type != PTY:
            raise ImageError(f"files: terminals of type {info.type} cannot be restored")
        if info.rdev == _PTMX:
            return _make_master(entry, info, build)
        master = build.open(_master_of(build, info.pty.index))
        fd = build.adopt(entry.id, _open_slave(master, entry.tty.flags))
        os.fchown(fd, info.uid, info.gid)
        node = build.entries.get(entry.tty.regf_id)
        if node is not None and node.reg.HasField("mode"):
            os.fchmod(fd, stat.S_IMODE(node.reg.mode))
        if info.exclusive:
            build.later(lambda: _set(fd, termios.TIOCEXCL))
        return fd


# Restore.


def _set(fd: int, request: int, value: int = 0) -> None:
    fcntl.ioctl(fd, request, value)


def _set_by_pointer(fd: int, request: int, value: int) -> None:
    fcntl.ioctl(fd, request, struct.pack("i", value))


def _info(entry: file_entry, build: FileBuild) -> tty_info_entry:
    infos: dict[int, tty_info_entry] | None = build.shared.get(tty_info_entry)
    if infos is None:
        infos = {info.id: info for info in build.images.messages("tty-info", tty_info_entry)}
        build.shared[tty_info_entry] = infos
    if entry.tty.tty_info_id not in infos:
        raise ImageError(f"tty-info: there is no terminal with id {entry.tty.tty_info_id}")
    return infos[entry.tty.tty_info_id]


def _terminals(build: FileBuild) -> list[tuple[file_entry, tty_info_entry]]:
    entries = (build.entries.get(file_id) for file_id in build.wanted)
    return [(entry, _info(entry, build)) for entry in entries if entry is not None and entry.type == fd_types.TTY]


def _master_of(build: FileBuild, index: int) -> int:
    for entry, info in _terminals(build):
        if info.rdev == _PTMX and info.pty.index == index:
            return entry.id
    raise ImageError(f"files: the master of terminal /dev/pts/{index} is missing")


def _open_slave(master: int, flags: int) -> int:
    # O_CLOEXEC among the flags would show in the description for ever; some have it so.
    fd: int = fcntl.ioctl(master, TIOCGPTPEER, flags | os.O_NOCTTY)
    os.set_inheritable(fd, False)
    return fd


def _open_hung_up(flags: int) -> int:
    """A slave whose master is closed; its number does not matter any more."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _set_by_pointer(master, TIOCSPTLCK, 0)
        return _open_slave(master, flags)
    finally:
        os.close(master)


def _open_master(path: str, flags: int, index: int) -> int:
    """The kernel gives out the lowest free number: those below are held until ours comes."""
    with contextlib.ExitStack() as held:
        while True:
            fd = os.open(path, flags)
            found = _get(fd, TIOCGPTN)
            if found == index:
                return fd
            held.callback(os.close, fd)
            if found > index:
                raise RestoreError(f"terminal /dev/pts/{index} is taken on this host")


def _make_master(entry: file_entry, info: tty_info_entry, build: FileBuild) -> int:
    flags = entry.tty.flags | os.O_NOCTTY | os.O_CLOEXEC
    fd = build.adopt(entry.id, _open_master("/dev/ptmx", flags, info.pty.index))
    _set_by_pointer(fd, TIOCSPTLCK, 0)
    for request, saved in ((termios.TCSETS, info.termios), (TIOCSLCKTRMIOS, info.termios_locked)):
        fcntl.ioctl(fd, request, TERMIOS.pack(
            saved.c_iflag, saved.c_oflag, saved.c_cflag, saved.c_lflag, saved.c_line, bytes(saved.c_cc)
        ))  # fmt: skip
    size = info.winsize
    fcntl.ioctl(fd, termios.TIOCSWINSZ, _WINSIZE.pack(size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel))

    def close_doors() -> None:
        # When all slaves are open.
        data = {item.tty_id: item.data for item in build.images.messages("tty-data", tty_data_entry)}
        waiting = [data.get(info.pty.index * 2 + end, b"") for end in (0, 1)]
        if any(waiting):
            canonical = bool(info.termios.c_lflag & termios.ICANON)
            tty_queues.put(fd, tty_queues.from_image(*waiting, canonical=canonical))
        if info.packet_mode:
            _set_by_pointer(fd, termios.TIOCPKT, 1)
        if info.exclusive:
            _set(fd, termios.TIOCEXCL)
        if info.locked:
            _set_by_pointer(fd, TIOCSPTLCK, 1)

    build.later(close_doors)
    return fd


def open_session(process: SkeletonProcess, build: FileBuild) -> None:
    """Give a new session its controlling terminal; what is open as /dev/tty is opened here, in the session.

    Args:
        process: the leader, which has no children in the session yet.

    Raises:
        RestoreError: the terminal's number is taken. BatchError: a call failed.
    """
    controlling = [both for both in _terminals(build) if both[1].rdev == _PTMX and both[1].sid == process.pid]
    if not controlling:
        return
    entry, info = controlling[0]
    build.open(entry.id)
    call = process.batch()
    slave = call.openat(-1, f"/dev/pts/{info.pty.index}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    call.ioctl(slave, termios.TIOCSCTTY, 0)
    opened = {
        user.id: call.openat(-1, "/dev/tty", user.tty.flags | os.O_CLOEXEC)
        for user, its in _terminals(build)
        if its.type == CTTY and its.HasField("termios") and its.sid == process.pid
    }
    call.run()
    for file_id, fd in opened.items():
        build.adopt(file_id, native.syscall("pidfd_getfd", process.pidfd, fd.value, 0))
    call = process.batch()
    for fd in (slave, *opened.values()):
        call.close(fd.value)
    call.run()


def set_foreground(processes: Sequence[SkeletonProcess], build: FileBuild) -> None:
    """Set the foreground group of every terminal, from within its session; the groups exist.

    A group without members cannot be set: the leader's own stays.
    """
    groups = {process.entry.pgid for process in processes}
    wanted = {info.sid: info.pgrp for _, info in _terminals(build) if info.rdev == _PTMX and info.sid}
    for process in processes:
        group = wanted.get(process.pid)
        if group in groups and group != process.pid:
            call = process.batch()
            fd = call.openat(-1, "/dev/tty", os.O_RDWR | os.O_CLOEXEC)
            call.ioctl(fd, termios.TIOCSPGRP, call.data(struct.pack("i", group)))
            call.close(fd)
            call.run()
