"""Locks and leases on files: reading them, and setting them in another process."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phaul.engine.dump import Dump, DumpOptions
from phaul.engine.imagedir import dump_to_directory, restore_from_directory
from phaul.engine.native import Parent
from phaul.engine.restore import RestoreOptions
from phaul.engine.state.locks import BREAKING, Kind, _entry
from phaul.engine.thread import EngineThread
from phaul.errors import CannotMove, DumpError, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.file_lock_pb2 import file_lock_entry

pytestmark = pytest.mark.root

ALLOWED = DumpOptions(file_locks=True, shell_job=True)


@contextmanager
def program(code: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has run `code` (which has `fd`, a file open for reading and writing) and sleeps."""
    head = f"import fcntl, os, signal, struct, time\nfd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)\n"
    tail = "\nos.write(1, b'ready')\nos.close(1)\nwhile True: time.sleep(1000)"
    child = subprocess.Popen(
        [sys.executable, "-Sc", head + code + tail],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        with child.stdout:
            assert child.stdout.read() == b"ready"
        yield child
    finally:
        child.kill()
        child.wait()


def dump(pid: int, directory: Path, options: DumpOptions = ALLOWED) -> ImageSet:
    """Dump a process and end it."""
    dumping = Dump(pid, options)
    dumping.freeze()
    try:
        dumping.collect()
        dump_to_directory(dumping, directory)
    except BaseException:
        dumping.thaw()
        raise
    dumping.kill()
    return dumping.images


def restore(directory: Path) -> int:
    restoring = restore_from_directory(directory, RestoreOptions(parent=Parent.CALLER))
    restoring.resume()
    return restoring.root_pid


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    with EngineThread() as thread:
        yield thread


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    return directory


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF", (Kind.FLOCK, 1, 0, 0)),
        ("2: POSIX  ADVISORY  READ 5433 08:01:7864448 128 256", (Kind.POSIX, 0, 128, 129)),
        ("1: OFDLCK ADVISORY  READ -1 fd:00:12 5 EOF", (Kind.OFDLCK, 0, 5, 0)),
        ("1: LEASE  ACTIVE    WRITE 5433 08:01:7864448 0 EOF", (Kind.LEASE, 1, 0, 0)),
        ("1: LEASE  BREAKING  UNLCK 5433 08:01:7864448 0 EOF", (Kind.LEASE, 2 | BREAKING, 0, 0)),
    ],
)
def test_lines_of_the_kernel(line: str, expected: tuple[int, int, int, int]) -> None:
    entry = _entry(line)
    assert (entry.flag, entry.type, entry.start, entry.len) == expected


def test_unknown_lines() -> None:
    with pytest.raises(DumpError, match="cannot be understood"):
        _entry("1: FLOCK  MSNFS     ACCESS 359 00:13:11691 0 EOF")


def test_the_option_is_named(engine: EngineThread, tmp_path: Path, images: Path) -> None:
    path = tmp_path / "locked"
    with program("fcntl.lockf(fd, fcntl.LOCK_EX)", path) as child:
        with pytest.raises(CannotMove, match=rf"fd 3 of PID {child.pid}: {path} with a lock \(POSIX\); with --file-l"):
            engine.call(dump, child.pid, images, DumpOptions(shell_job=True))
        assert child.poll() is None


def test_each_lock_once(engine: EngineThread, tmp_path: Path, images: Path) -> None:
    code = """
os.dup(fd)
fcntl.flock(fd, fcntl.LOCK_SH)
fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
fcntl.lockf(fd, fcntl.LOCK_EX, 10, 50)
"""
    with program(code, tmp_path / "locked") as child:
        found = engine.call(dump, child.pid, images).messages("filelocks", file_lock_entry)
    assert sorted((lock.flag, lock.type, lock.start, lock.len) for lock in found) == [
        (Kind.POSIX, 1, 5, 10),
        (Kind.POSIX, 1, 50, 10),
        (Kind.FLOCK, 0, 0, 0),
    ]
    assert {(lock.pid, lock.fd) for lock in found} == {(child.pid, 3)}


def test_a_lock_that_somebody_else_has(engine: EngineThread, tmp_path: Path, images: Path) -> None:
    path = tmp_path / "locked"
    with program("fcntl.flock(fd, fcntl.LOCK_EX)", path) as child:
        engine.call(dump, child.pid, images)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(RestoreError, match=rf"lock \(FLOCK\) on fd 3 of PID {child.pid} cannot be set: Resource"):
            engine.call(restore, images)
    assert not Path(f"/proc/{child.pid}").exists()


def test_a_lease_that_is_being_broken(engine: EngineThread, tmp_path: Path, images: Path) -> None:
    path = tmp_path / "leased"
    code = """
signals = []
signal.signal(signal.SIGUSR1, lambda *_: open("%s.signals", "a").write("x"))
fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGUSR1)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
"""
    log = Path(f"{path}.signals")
    with program(code % path, path) as child:
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        while not (log.exists() and log.read_text()):
            pass
        (lock,) = engine.call(dump, child.pid, images).messages("filelocks", file_lock_entry)
    assert (lock.flag, lock.type) == (Kind.LEASE, BREAKING | fcntl.F_UNLCK)
    pid = engine.call(restore, images)
    try:
        assert "LEASE  BREAKING  UNLCK" in Path(f"/proc/{pid}/fdinfo/3").read_text()
        assert log.read_text() == "x"
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    finally:
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([pidfd], [], [])
        os.close(pidfd)
        os.waitpid(pid, 0)
    assert log.read_text() == "x"
