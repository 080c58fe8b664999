"""Regular files, directories, devices: position, flags, and what is refused."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul.engine.state.files.base import OpenFiles
from phaul.errors import CannotMove, RestoreError
from phaul.images.pb.fdinfo_pb2 import file_entry
from tests.engine.files.holding import Holder

pytestmark = pytest.mark.root
Info = Callable[[int], dict[str, str]]


def test_position_and_flags(holder: Holder, tmp_path: Path, fdinfo: Info) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    read = os.open(path, os.O_RDONLY)
    append = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    only_path = os.open(path, os.O_PATH)
    null = os.open("/dev/null", os.O_RDWR)
    os.lseek(read, 4, os.SEEK_SET)
    opened = [read, append, directory, only_path, null]
    before = {fd: fdinfo(fd) for fd in opened}
    inodes = {fd: os.fstat(fd).st_ino for fd in opened}
    holder.give(*opened)

    copy = holder.copy()

    assert {fd: fdinfo(copy[fd]) for fd in opened} == before
    assert {fd: os.fstat(copy[fd]).st_ino for fd in opened} == inodes
    assert os.read(copy[read], 100) == b"456789"
    os.write(copy[append], b"end")
    assert path.read_bytes() == b"0123456789end"


def test_shared_descriptions_stay_shared(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    one, other = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    twin = os.dup(one)
    holder.start(one, other, twin)
    holder.give(one, other, twin)

    copy = holder.copy()

    first, second = copy.built.tables["fdinfo-1"], copy.built.tables["fdinfo-2"]
    assert [first[fd] for fd in (one, other, twin)] == [second[fd] for fd in (one, other, twin)]
    assert first[one] == first[twin] != first[other]
    os.lseek(copy[one], 7, os.SEEK_SET)
    assert os.lseek(copy[twin], 0, os.SEEK_CUR) == 7
    assert os.lseek(copy[other], 0, os.SEEK_CUR) == 0


def test_the_owner_of_sigio(holder: Holder, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    pid = holder.start(fd)
    fcntl.fcntl(fd, fcntl.F_SETOWN, pid)
    fcntl.fcntl(fd, 10, signal.SIGRTMIN + 1)
    os.close(fd)

    copy = holder.copy(keep=True)

    assert fcntl.fcntl(copy[fd], fcntl.F_GETOWN) == pid
    assert fcntl.fcntl(copy[fd], 11) == signal.SIGRTMIN + 1


def test_an_owner_outside_is_refused(holder: Holder, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    pid = holder.give(fd)

    with pytest.raises(CannotMove, match=f"fd {fd} of PID {pid}: file that signals PID {os.getpid()}"):
        holder.preflight()


def test_close_on_exec(holder: Holder, tmp_path: Path) -> None:
    # `sleep` cannot have such a descriptor; we can, and are refused only for what else we hold.
    keep = os.open(tmp_path, os.O_RDONLY)
    table = dict(OpenFiles([os.getpid()]).tables[os.getpid()])
    assert [user.cloexec for user in table[keep].users] == [True]
    os.set_inheritable(keep, True)
    table = OpenFiles([os.getpid()]).tables[os.getpid()]
    assert [user.cloexec for user in table[keep].users] == [False]
    os.close(keep)


@pytest.mark.parametrize("lock", ["flock", "posix"])
def test_a_lock_is_refused(holder: Holder, tmp_path: Path, lock: str) -> None:
    fd = os.open(tmp_path / "locked", os.O_RDWR | os.O_CREAT)
    if lock == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX)
    else:
        # Of the open file, as a POSIX lock would be the test's: F_OFD_SETLK, struct flock.
        fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    holder.give(fd)
    with pytest.raises(CannotMove, match=r"locked with a lock \((FLOCK|OFDLCK)\); with --file-locks"):
        holder.preflight()


def test_missing_and_changed_files_are_named(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"12345")
    holder.give(os.open(path, os.O_RDONLY))
    images, _ = holder.dump()
    path.write_bytes(b"123")
    with pytest.raises(RestoreError, match=f"{path}: has 3 bytes here, but had 5 at the source"):
        holder.build(images)
    path.unlink()
    with pytest.raises(RestoreError, match=f"{path}: No such file"):
        holder.build(images)
    path.mkdir()
    with pytest.raises(RestoreError, match=f"{path}: another type of file"):
        holder.build(images)


def test_an_image_cannot_create_or_cut_files(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"12345")
    fd = os.open(path, os.O_RDWR)
    holder.give(fd)
    images, dump = holder.dump()
    holder.stop()
    for entry in (message for message in images.messages("files", file_entry) if message.reg.name == str(path)):
        entry.reg.flags |= os.O_TRUNC | os.O_CREAT
    holder.build(images)
    assert path.read_bytes() == b"12345"
    assert dump.ids
