"""Two hosts on one machine: sets of namespaces joined by a veth pair.

A host has network, pid, mount, ipc and uts namespaces of its own, with its own /proc, /dev/shm,
/dev/pts and /run; the rest of the file system is the machine's, as if both hosts had it on a shared
disk. Its init (`init.py`) starts processes on request and reaps every orphan.

Nothing of a host is ever visible in the namespaces of the creator but its processes, and those
end with the creator, however it ends: init watches the creator's pidfd, the kernel kills a pid
namespace with its init, and takes a network namespace down with its last process. So there is
nothing to clean up by name, and any number of pairs can live side by side.

    with TwoHosts() as (source, destination):
        server = source.popen(["redis-server", "--port", "6379"], stdout="/tmp/redis.log")
        destination.run(["ping", "-c", "1", source.address], check=True)
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from phaul.errors import NotPermitted, PhaulError, UsageError

_MAX_MESSAGE = 1 << 20
_INTERFACE = "eth0"
_SECONDS_TO_DIE = 20.0
_INT = struct.calcsize("i")

# Runs as PID 1 of the new namespaces, then becomes init.
_PREPARE = """set -e
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t devpts -o newinstance,mode=620,ptmxmode=666 devpts /dev/pts
ip link set lo up
exec "$@"
"""


class HostProcess:
    """A process that was started in a host.

    Attributes:
        pid: its PID inside the host.
        outer_pid: its PID in the pid namespace of the caller.
    """

    def __init__(self, host: Host, pid: int, outer_pid: int, pidfd: int) -> None:
        self._host = host
        self._pidfd = pidfd
        self._returncode: int | None = None
        self.pid, self.outer_pid = pid, outer_pid

    @property
    def returncode(self) -> int | None:
        """Exit code, minus the signal that killed it, or None while it lives."""
        if self._returncode is None and self._exited(0):
            self._returncode = self._host._status(self.pid)
        return self._returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit code as in `returncode`.

        Raises:
            subprocess.TimeoutExpired: it lives on after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.returncode) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                assert timeout is not None
                raise subprocess.TimeoutExpired([f"PID {self.pid}"], timeout)
            if self._exited(left):
                # Dead, but its status is still its tracer's: init gets it after that.
                time.sleep(0.001)
        return code

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; nothing happens when the process is gone."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return

    def _exited(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(None if seconds is None else max(seconds, 0) * 1000))

    def __del__(self) -> None:
        os.close(self._pidfd)


class Host:
    """One host. Made by `TwoHosts`; `close()` (or the end of the creator) ends all in it.

    Args:
        name: its host name.
        address, address6: what its interface `eth0` gets, without the prefix length.
        first_pid: where the PIDs of its processes start.
        clock_offset: seconds that its monotonic and boot clocks are ahead of the machine's.

    Attributes:
        init_pid: PID of the init, in the pid namespace of the caller.

    Raises:
        PhaulError: the namespaces cannot be made; the message says what the kernel said.
    """

    def __init__(
        self,
        name: str,
        address: str,
        address6: str,
        *,
        first_pid: int = 300,
        clock_offset: int = 0,
    ) -> None:
        self.name, self.address, self.address6 = name, address, address6
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        creator = os.pidfd_open(os.getpid())
        unshare = ["unshare", "--net", "--pid", "--mount", "--ipc", "--uts", "--mount-proc"]
        if clock_offset:
            unshare += ["--time", f"--monotonic={clock_offset}", f"--boottime={clock_offset}"]
        unshare += ["--fork", "--kill-child"]
        init = [sys.executable, "-I", "-S", str(Path(__file__).with_name("init.py"))]
        arguments = [str(theirs.fileno()), str(creator), name, str(first_pid)]
        try:
            self._process = subprocess.Popen(
                [*unshare, "sh", "-c", _PREPARE, "init", *init, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), creator),
                start_new_session=True,  # a Ctrl-C is for the creator alone
            )
        finally:
            theirs.close()
            os.close(creator)
        try:
            _ready, self.init_pid, self._init = self._receive()
        except BaseException:
            self._control.close()
            self._process.kill()
            self._process.wait()
            self._close_stderr()
            raise

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: str | os.PathLike[str] | None = None,
        stdout: str | os.PathLike[str] | None = None,
        stderr: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        uid: int | None = None,
        setsid: bool = True,
    ) -> HostProcess:
        """Start a program as a child of the host's init, with no fd but 0, 1 and 2.

        Args:
            argv: program (looked up in PATH) and arguments.
            stdin, stdout: paths, opened inside the host; None is /dev/null. Output files are
                made or emptied.
            stderr: the same; None is where stdout goes, as one open file.
            env: the environment; None is the caller's.
            cwd: working directory; None is the caller's.
            uid: user and group to become, without further groups; None stays root.
            setsid: make it a session leader.

        Raises:
            OSError: it cannot be started (no such program, file or directory).
        """
        spec = {
            "argv": [os.fspath(arg) for arg in argv],
            "stdin": os.fspath(stdin or os.devnull),
            "stdout": os.fspath(stdout or os.devnull),
            "stderr": None if stderr is None else os.fspath(stderr),
            "env": dict(os.environ if env is None else env),
            "cwd": os.fspath(cwd or os.getcwd()),
            "uid": uid,
            "setsid": setsid,
        }
        reply, outer_pid, pidfd = self._ask({"spawn": spec})
        if "errno" in reply:
            raise OSError(reply["errno"], os.strerror(reply["errno"]), reply["what"])
        return HostProcess(self, reply["pid"], outer_pid, pidfd)

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        uid: int | None = None,
        timeout: float | None = 60,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end and capture its output.

        Raises:
            OSError: it cannot be started.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds and was killed.
            subprocess.CalledProcessError: with `check`, it did not exit with 0.
        """
        with tempfile.TemporaryDirectory(prefix="phaul-run-") as directory:
            out, err = Path(directory, "stdout"), Path(directory, "stderr")
            if uid is not None:
                os.chmod(directory, 0o711)
            process = self.popen(argv, stdout=out, stderr=err, env=env, cwd=cwd, uid=uid)
            try:
                code = process.wait(timeout)
            except BaseException as error:
                process.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    error.output, error.stderr = out.read_bytes(), err.read_bytes()
                raise
            done = subprocess.CompletedProcess(
                [os.fspath(arg) for arg in argv],
                code,
                out.read_text(errors="replace"),
                err.read_text(errors="replace"),
            )
        if check:
            done.check_returncode()
        return done

    def open_socket(
        self,
        family: socket.AddressFamily = socket.AF_INET,
        kind: socket.SocketKind = socket.SOCK_STREAM,
    ) -> socket.socket:
        """A socket of the caller that lives in the host's network namespace."""
        made: list[socket.socket | OSError] = []

        def make() -> None:
            # setns(2) with CLONE_NEWNET moves one thread only: this one, which ends here.
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/proc/{self.init_pid}/ns/net", "rb") as namespace:
                if libc.setns(namespace.fileno(), 0) == 0:
                    made.append(socket.socket(family, kind))
                else:
                    number = ctypes.get_errno()
                    made.append(OSError(number, os.strerror(number), namespace.name))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def connect(self, address: str, port: int, timeout: float = 10) -> socket.socket:
        """A TCP connection from this host; every call on it has the timeout (seconds)."""
        sock = self.open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            sock.settimeout(timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    @property
    def proc(self) -> Path:
        """The host's own /proc, in which processes have their PIDs inside the host."""
        return Path("/proc", str(self.init_pid), "root", "proc")

    def pids(self) -> list[int]:
        """All PIDs that are taken in the host, zombies too; without init's own."""
        names = os.listdir(self.proc)
        return sorted(int(name) for name in names if name.isdigit() and name != "1")

    def shape(self, rate_bits: int | None) -> None:
        """Limit what the host sends to so many bits per second; None takes the limit away."""
        if rate_bits is None:
            self._ip(f"qdisc del dev {_INTERFACE} root", program="tc")
            return
        # A bucket of 2 ms, but at least one GSO packet, which tbf cannot cut below its burst.
        burst = max(rate_bits // 8 // 500, 1 << 16)
        limit = f"tbf rate {rate_bits}bit burst {burst} latency 50ms"
        self._ip(f"qdisc replace dev {_INTERFACE} root {limit}", program="tc")

    def join(self, other: Host) -> None:
        """Lay a cable between two hosts: `eth0` at both ends, with their addresses."""
        peer = f"peer name {_INTERFACE} netns {other.init_pid}"
        self._ip(f"link add {_INTERFACE} type veth {peer}")
        for end in (self, other):
            end._ip(
                f"addr add {end.address}/24 dev {_INTERFACE}\n"
                f"addr add {end.address6}/64 dev {_INTERFACE} nodad\n"
                f"link set {_INTERFACE} up"
            )

    def close(self) -> None:
        """Kill everything in the host and wait until it is gone. May be called twice.

        Raises:
            PhaulError: something in it does not die (a tracer outside holds it).
        """
        if self._process.stderr is None or self._process.stderr.closed:
            return
        signal.pidfd_send_signal(self._init, signal.SIGKILL)
        try:
            self._process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            raise PhaulError(f"host {self.name} does not end: is a process of it being traced from outside?") from None
        finally:
            os.close(self._init)
            self._control.close()
            self._close_stderr()

    def _ip(self, commands: str, program: str = "ip") -> None:
        # Only the network namespace is entered: PIDs in the commands are the caller's.
        enter = ["nsenter", f"--net=/proc/{self.init_pid}/ns/net", program, "-batch", "-"]
        done = subprocess.run(enter, input=commands, capture_output=True, text=True)
        if done.returncode:
            raise PhaulError(f"host {self.name}: {program}: {done.stderr.strip()}")

    def _status(self, pid: int) -> int | None:
        status: int | None = self._ask({"status": pid})[0]["status"]
        return status

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
        with self._lock:
            try:
                self._control.send(json.dumps(request).encode())
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                    raise
            return self._receive()

    def _receive(self) -> tuple[dict[str, Any], int, int]:
        # The answer; with a PID in it also that PID as seen from here, and its pidfd.
        space = socket.CMSG_SPACE(3 * _INT) + socket.CMSG_SPACE(_INT)
        message, ancillary, _flags, _address = self._control.recvmsg(_MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
        if not message:
            assert self._process.stderr is not None
            text = self._process.stderr.read().decode(errors="replace").strip()
            raise PhaulError(f"host {self.name} cannot be made or has died: {text}")
        pid, pidfd = 0, -1
        for _level, kind, data in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                (pid,) = struct.unpack_from("i", data)
            elif kind == socket.SCM_RIGHTS:
                (pidfd,) = struct.unpack("i", data)
        return json.loads(message), pid, pidfd

    def _close_stderr(self) -> None:
        assert self._process.stderr is not None
        self._process.stderr.close()


class TwoHosts:
    """A source and a destination host, joined by a veth pair.

    PIDs of the source start at 1000, those of the destination at 300, so that the PIDs of a
    tree that moves are free there.

    Args:
        clock_offset: seconds that CLOCK_MONOTONIC and CLOCK_BOOTTIME of the source are ahead of
            those of the destination, as if it had been booted so much earlier; or behind.

    Raises:
        NotPermitted: the caller is not root.
        UsageError: unshare, nsenter or ip is not installed.
        PhaulError: the kernel refuses; its words are in the message.
    """

    source: Host
    destination: Host

    def __init__(self, *, clock_offset: int = 0) -> None:
        self._clock_offset = clock_offset
        self._stack = ExitStack()

    def __enter__(self) -> TwoHosts:
        if os.geteuid() != 0:
            raise NotPermitted("two hosts on this machine: only root can make namespaces")
        try:
            with ExitStack() as stack:
                self.source = Host(
                    "source",
                    "10.77.0.1",
                    "fd70:6861:756c::1",
                    first_pid=1000,
                    clock_offset=max(self._clock_offset, 0),
                )
                stack.callback(self.source.close)
                self.destination = Host(
                    "destination",
                    "10.77.0.2",
                    "fd70:6861:756c::2",
                    first_pid=300,
                    clock_offset=max(-self._clock_offset, 0),
                )
                stack.callback(self.destination.close)
                self.source.join(self.destination)
                self._stack = stack.pop_all()
        except FileNotFoundError as error:
            raise UsageError(f"{error.filename} is not installed (Debian: util-linux, iproute2)") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Host]:
        return iter((self.source, self.destination))

    def shape(self, rate_bits: int | None) -> None:
        """Limit both directions to so many bits per second; None takes the limit away."""
        for host in self:
            host.shape(rate_bits)
