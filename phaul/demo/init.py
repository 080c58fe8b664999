"""PID 1 of a demo host: starts processes on request and reaps every orphan.

A program of its own, run by path with `python -I -S` (standard library only): see `hosts.py`,
which speaks the other end of the control socket.

    init.py CONTROL_FD CREATOR_PIDFD NAME FIRST_PID

The control socket is a SOCK_SEQPACKET pair; a message is one JSON object. Init speaks first,
``{"pid": 1}``; from then on it answers one request at a time:

    {"spawn": {argv, stdin, stdout, stderr, env, cwd, uid, setsid}}
                              -> {"pid": PID} or {"errno": N, "what": TEXT}
    {"status": PID}           -> {"status": exit code, minus signal, or null while it is alive}

With a PID go a pidfd (SCM_RIGHTS) and credentials of that PID (SCM_CREDENTIALS), which the kernel
translates into the pid namespace of the creator (unix(7)).

Init ends, and the kernel then kills whatever lives in its pid namespace (pid_namespaces(7)),
when the creator is gone, by whatever death: its pidfd becomes readable.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
from typing import Any

_MAX_MESSAGE = 1 << 20
_NR_RT_SIGACTION = 13
_SIGACTION_SIZE = 32
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def _become(spec: dict[str, Any]) -> None:
    """Turn this fresh child into the program of the request. Returns only by an exception."""
    if spec["setsid"]:
        os.setsid()
    # An ignored signal stays ignored over exec: Python ignores SIGPIPE and SIGXFSZ in itself,
    # a shell's background job SIGINT and SIGQUIT.
    for caught in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(caught, signal.SIG_DFL)
    # posix_spawn(3) of glibc, as make uses it, leaves glibc's own signals ignored, and signal(2) hides them.
    for own in (32, 33):
        ctypes.CDLL(None).syscall(_NR_RT_SIGACTION, own, bytes(_SIGACTION_SIZE), None, 8)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir(spec["cwd"])
    stdin = os.open(spec["stdin"], os.O_RDONLY)
    stdout = os.open(spec["stdout"], _CREATE, 0o666)
    stderr = stdout if spec["stderr"] is None else os.open(spec["stderr"], _CREATE, 0o666)
    for number, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, number)
    if spec["uid"] is not None:
        os.setgroups([])
        os.setgid(spec["uid"])
        os.setuid(spec["uid"])
    os.execvpe(spec["argv"][0], spec["argv"], spec["env"])


def _spawn(spec: dict[str, Any]) -> dict[str, Any]:
    """Fork and exec; the answer to the request."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _become(spec)
        except OSError as error:
            what = os.fsdecode(error.filename or spec["argv"][0])
            failure = {"errno": error.errno, "what": what}
            os.write(writer, json.dumps(failure).encode())
        finally:
            os._exit(127)
    os.close(writer)
    with open(reader, "rb") as pipe:
        failure_text = pipe.read()  # nothing: the exec closed it
    return json.loads(failure_text) if failure_text else {"pid": pid}


def _reap(statuses: dict[int, int | None]) -> None:
    """Collect all dead children; keep the exit codes of those that were asked for."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in statuses:
            statuses[pid] = os.waitstatus_to_exitcode(status)


def _send(control: socket.socket, reply: dict[str, Any]) -> None:
    """Send an answer. If it has a PID, that child has not been reaped yet: only we do."""
    message = [json.dumps(reply).encode()]
    if "pid" not in reply:
        control.sendmsg(message)
        return
    pidfd = os.pidfd_open(reply["pid"])
    control.sendmsg(
        message,
        [
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", pidfd)),
            (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("3i", reply["pid"], 0, 0)),
        ],
    )
    os.close(pidfd)


def _answer(control: socket.socket, statuses: dict[int, int | None]) -> None:
    """Read one request and answer it."""
    message = control.recv(_MAX_MESSAGE)
    if not message:
        sys.exit(0)
    request = json.loads(message)
    if "spawn" in request:
        reply = _spawn(request["spawn"])
        if "pid" in reply:
            statuses[reply["pid"]] = None
    else:
        _reap(statuses)
        reply = {"status": statuses[request["status"]]}
    _send(control, reply)


def main(control_fd: int, creator: int, name: str, first_pid: int) -> None:
    """Serve until the creator closes the socket or dies.

    Args:
        control_fd: our end of the control socket.
        creator: a pidfd of the creator.
        name: the host name.
        first_pid: what the first process gets as PID.
    """
    os.set_inheritable(control_fd, False)
    os.set_inheritable(creator, False)
    control = socket.socket(fileno=control_fd)
    socket.sethostname(name)

    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_reader, False)
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    with open("/proc/sys/kernel/ns_last_pid", "w") as last_pid:
        last_pid.write(str(first_pid - 1))
    _send(control, {"pid": os.getpid()})

    poll = select.poll()
    for fd in (control_fd, creator, wake_reader):
        poll.register(fd, select.POLLIN)
    statuses: dict[int, int | None] = {}
    while True:
        ready = {fd for fd, _events in poll.poll()}
        if creator in ready:
            return
        if wake_reader in ready:
            os.read(wake_reader, 4096)
            _reap(statuses)
        if control_fd in ready:
            _answer(control, statuses)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
