"""Builds and runs the target programs of `tests/programs`.

    with Target.start("timers") as target:
        ...dump, restore, migrate PID target.pid...
        target.moved()      # it runs again under the same PID: take hold of the new process
        target.finish()     # SIGTERM; the program checks itself and must say PASS

`target.h` describes what a program does; `CASES` lists how each is started.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from phaul.demo.hosts import Host, HostProcess
from phaul.engine.dump import DumpOptions

SOURCES = Path(__file__).parent.parent / "programs"
BUILD = SOURCES / "build"
COMPILE = "cc -std=c11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror -pthread".split()

CASES: tuple[tuple[str, ...], ...] = (
    ("beat", "16", "4000", "3"),
    ("blocked",),
    ("creds",),
    ("eventfds",),
    ("files",),
    ("file_leases",),
    ("file_locks",),
    ("files_deleted",),
    ("inotify",),
    ("guard_pages",),
    ("mem_kinds",),
    ("mem_shared",),
    ("mem_vmas",),
    ("orphaned_group",),
    ("pidfds",),
    ("pipes",),
    ("proc_attrs",),
    ("regs",),
    ("seccomp",),
    ("shared_tables",),
    ("rseq_robust_tid",),
    ("signals",),
    ("sock_listen",),
    ("sock_tcp",),
    ("sock_scm",),
    ("sock_unix",),
    ("threads",),
    ("timers",),
    ("tree",),
    ("tree", "zombie"),
    ("tty_pty",),
    ("vdso",),
)
"""Every program that can be moved, as arguments for `Target.start`."""

OPTIONS: dict[str, DumpOptions] = {
    "file_leases": DumpOptions(file_locks=True),
    "file_locks": DumpOptions(file_locks=True),
    "sock_tcp": DumpOptions(tcp_established=True),
}
"""What has to be allowed before a program can be moved."""

REFUSED: tuple[tuple[str, ...], ...] = (("refuse_iouring",), ("refuse_tcp_established",))
"""Every program that phaul must refuse, and leave unharmed."""

RESTLESS: dict[str, tuple[str, ...]] = {
    "creds": ("*fds.[45]", "*fds.[45].*"),
    "eventfds": ("*.eventfd-count",),
    "files_deleted": ("*fds.23.link",),  # its name belongs to another file
    "files": ("*fds.23.pos", "*fds.27.pos"),
    "proc_attrs": ("*fds.4", "*fds.4.*"),
    "rseq_robust_tid": ("*.Cpus_allowed_list",),
    "pidfds": ("*.Pid", "*.NSpid"),  # as the observer numbers them
    "refuse_iouring": ("*.Sq*", "*.Cq*", "*.Cached*"),
    "shared_tables": ("*.fds.5*", "*mask*"),
    "timers": ("*ShdPnd", "*.SigPnd", "*.SigBlk"),  # sigtimedwait(2) unblocks what it waits for
}
"""What a program changes of its visible state by working: `ignore` for `visible.difference`."""

COUNTING = """
import threading, time
from itertools import count
lock, numbers = threading.Lock(), count()
def work():
    while True:
        with lock:
            print(next(numbers), flush=True)
        time.sleep(0.002)
for _ in range(4):
    threading.Thread(target=work).start()
"""
"""A program of Python: four threads that write 0, 1, 2 ... to standard output, a line each."""

_POLL = 0.002
_SECONDS_TO_GO = 10
_MARK = "PHAUL_TARGET"


class TargetError(AssertionError):
    """A target failed, ended or kept silent; the message holds its output."""


def build(program: str) -> Path:
    """Compile a program unless that is done already; the path of the executable.

    Safe in parallel runs: one compiles, the others wait.

    Raises:
        subprocess.CalledProcessError: the compiler complained (on stderr).
    """
    source, executable = SOURCES / f"{program}.c", BUILD / program
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f"{program}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in (source, SOURCES / "target.h"))
        if not executable.exists() or executable.stat().st_mtime < newest:
            fresh = BUILD / f"{program}.new"
            subprocess.run([*COMPILE, "-o", str(fresh), str(source)], check=True)
            fresh.replace(executable)
    return executable


class Target:
    """A running target program. Leaves nothing behind when used in a `with` statement.

    Attributes:
        program: its name.
        pid: its PID where it was started: inside the host if there is one. This is what
            `phaul` gets to see, before and after a move.
        outer_pid: its PID in the pid namespace of the caller.
        directory: its working directory, made for it.
        output: the file that it reports to.
    """

    def __init__(
        self, program: str, directory: Path, mark: str, process: subprocess.Popen[bytes] | HostProcess
    ) -> None:
        self.program, self.directory, self._mark = program, directory, mark
        self.output = directory / "output"
        self._process: subprocess.Popen[bytes] | HostProcess | None = process
        self.pid, self._pidfd = process.pid, -1
        self._hold(process.outer_pid if isinstance(process, HostProcess) else process.pid)

    @classmethod
    def start(cls, program: str, *args: str, host: Host | None = None, timeout: float = 30) -> Target:
        """Start a program as a session leader and wait until it is ready.

        Args:
            program: name of a source in `tests/programs`, without `.c`.
            args: what the program takes after its output file.
            host: where it runs; None is this very machine.
            timeout: seconds until it must be ready.

        Raises:
            TargetError: it failed, ended or was not ready in time.
        """
        executable = build(program)
        directory = Path(tempfile.mkdtemp(prefix=f"phaul-{program}-"))
        directory.chmod(0o711)
        mark = uuid.uuid4().hex
        argv = [str(executable), str(directory / "output"), *args]
        environment = {"PATH": os.defpath, _MARK: mark}
        process: subprocess.Popen[bytes] | HostProcess
        if host is not None:
            process = host.popen(argv, cwd=directory, env=environment)
        else:
            null = subprocess.DEVNULL
            process = subprocess.Popen(
                argv, cwd=directory, env=environment, stdin=null, stdout=null, stderr=null, start_new_session=True
            )
        target = cls(program, directory, mark, process)
        try:
            target._wait(lambda: "ready" in target.lines() or not target.alive, timeout, "it is ready")
            if target.lines() != ["ready"]:
                raise target._error("did not become ready")
        except BaseException:
            target.close()
            raise
        return target

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def lines(self) -> list[str]:
        """What the program has reported so far, whole lines only."""
        if not self.output.exists():
            return []
        return self.output.read_text().rpartition("\n")[0].split("\n")

    @property
    def alive(self) -> bool:
        """The process runs, or is stopped; a zombie does not."""
        return not self._ended(0)

    def copies(self) -> list[int]:
        """PIDs (as the caller sees them) of all living processes that are this target, or of its
        tree: wherever they are, and whoever made them."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and mark in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended, or has capabilities that we lack: none of ours
        return found

    def reap(self, timeout: float = 10) -> None:
        """Wait for the end of the process that was started, so that its PID is free again.

        For a restore into the same pid namespace: without a host the program is our child, and
        its zombie would keep the PID.

        Raises:
            subprocess.TimeoutExpired: it lives on.
        """
        if self._process is not None:
            self._process.wait(timeout)
            self._process = None

    def moved(self, host: Host | None = None) -> None:
        """Take hold of the process that has this target's PID now.

        Args:
            host: where it is now; None is this very machine.

        Raises:
            TargetError: there is none, or the one that was held so far lives on beside it.
        """
        outer_pid = self.pid if host is None else outer_pid_of(host, self.pid)
        if outer_pid is None or not Path("/proc", str(outer_pid)).exists():
            raise self._error(f"has no process with PID {self.pid} where it should be")
        if outer_pid != self.outer_pid:
            if not self._ended(_SECONDS_TO_GO):
                raise self._error("runs elsewhere too, but the original did not end")
            if isinstance(self._process, subprocess.Popen):
                self._process.wait()
            self._process = None
        os.close(self._pidfd)
        self._hold(outer_pid)

    def finish(self, timeout: float = 30) -> str:
        """End the program with SIGTERM; what it reports behind `PASS` (mostly nothing).

        Raises:
            TargetError: it did not end in time, or did not pass.
        """
        with suppress(ProcessLookupError):  # it may have failed, and told so, already
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        if not self._ended(timeout):
            raise self._error("does not end on SIGTERM")
        # Only the parent is told the exit code: after a move that is not us.
        code = self._process.wait(timeout) if self._process is not None else None
        lines = self.lines()
        verdict, _space, report = lines[-1].partition(" ") if lines else ("", "", "")
        if verdict != "PASS" or code not in (0, None) or any(line.startswith("FAIL") for line in lines):
            raise self._error(f"did not pass (exit code {code})")
        return report

    def kill(self) -> None:
        """SIGKILL to every copy, until there is none."""
        while copies := self.copies():
            for pid in copies:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL)
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """Kill what is left and remove the directory. May be called twice."""
        self.kill()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        shutil.rmtree(self.directory, ignore_errors=True)

    def _hold(self, outer_pid: int) -> None:
        self.outer_pid = outer_pid
        self._pidfd = os.pidfd_open(outer_pid)

    def _ended(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise self._error(f"not so after {seconds} s: {what}")
            time.sleep(_POLL)

    def _error(self, what: str) -> TargetError:
        output = "".join(f"\n    {line}" for line in self.lines()) or " nothing"
        return TargetError(f"{self.program} (PID {self.pid}) {what}; it reported:{output}")


def outer_pid_of(host: Host, pid: int) -> int | None:
    """The PID, as the caller sees it, of a process of a host; None if there is none.

    Source: NSpid in proc_pid_status(5); the last one is the PID in the process's own namespace.
    """
    namespace = os.readlink(f"/proc/{host.init_pid}/ns/pid")
    for entry in os.listdir("/proc"):
        try:
            if not entry.isdigit() or os.readlink(f"/proc/{entry}/ns/pid") != namespace:
                continue
            status = Path("/proc", entry, "status").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended, or has capabilities that we lack: none of a host's
        if int(status.partition("NSpid:")[2].partition("\n")[0].split()[-1]) == pid:
            return int(entry)
    return None
