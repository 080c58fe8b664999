"""The source side's view of a tree: find its tasks, stop them, let them go on as if nothing had been."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from phaul.engine import native
from phaul.engine.batch import Batch
from phaul.engine.describe import describe
from phaul.engine.inject import EINTR, Place, SourceRunner, deliverable, find_place, resumed, signed
from phaul.engine.native import Registers
from phaul.engine.proc import Mapping, Proc
from phaul.engine.state import rseq
from phaul.engine.state.zombie import is_zombie
from phaul.errors import CannotMove, DumpError, NoSuchProcess, NotPermitted
from phaul.images.pb.core_pb2 import core_entry, task_kobj_ids_entry

log = logging.getLogger(__name__)

SEIZE_OPTIONS = native.O_TRACESYSGOOD | native.O_SUSPEND_SECCOMP
KILL_TIMEOUT = 30.0
REAP_TIMEOUT = 2.0


@dataclass(eq=False)
class SourceThread:
    """A stopped thread. `regs` are as it was stopped; batches leave them alone."""

    tid: int
    process: SourceProcess
    regs: Registers
    core: core_entry = field(default_factory=core_entry)

    @cached_property
    def proc(self) -> Proc:
        """/proc/PID/task/TID as of the stop: its status is read once for all kinds of state."""
        return Proc(self.process.pid, self.tid)

    def batch(self) -> Batch:
        """A batch of system calls for this thread, crash-safe (phaul.engine.inject)."""
        process = self.process
        return Batch(SourceRunner(process.pid, self.tid, self.regs, process.place, process.mem_fd))

    @property
    def signal_waits(self) -> bool:
        """Whether a signal is pending that the thread does not block."""
        return deliverable(Proc(self.process.pid, self.tid), self.regs.sigmask)


@dataclass(eq=False)
class SourceProcess:
    """A process of a stopped tree; `threads[0]` is its leader.

    Attributes:
        stop_signal: of job control, that had stopped it before we did; 0 if it ran.
    """

    pid: int
    parent: SourceProcess | None
    threads: list[SourceThread] = field(default_factory=list)
    ids: task_kobj_ids_entry = field(default_factory=task_kobj_ids_entry)
    stop_signal: int = 0

    @cached_property
    def proc(self) -> Proc:
        """/proc/PID as of the stop."""
        return Proc(self.pid)

    @cached_property
    def maps(self) -> list[Mapping]:
        """All mappings, with VmFlags."""
        return self.proc.smaps()

    @cached_property
    def place(self) -> Place:
        """Where batches run."""
        return find_place(self.pid, self.maps)

    @cached_property
    def mem_fd(self) -> int:
        return self.proc.open("mem", os.O_RDWR)

    @cached_property
    def pidfd(self) -> int:
        return os.pidfd_open(self.pid)

    @property
    def core(self) -> core_entry:
        return self.threads[0].core

    def close(self) -> None:
        for name in ("mem_fd", "pidfd"):
            if name in self.__dict__:
                os.close(self.__dict__.pop(name))


def check_process(pid: int) -> Proc:
    """The process, if it is one that can be looked at at all.

    Raises:
        NotPermitted: we are not root. NoSuchProcess: no such PID, or a kernel thread, or a zombie.
    """
    if os.geteuid() != 0:
        raise NotPermitted("phaul must run as root")
    proc = Proc(pid)
    if not proc.root.exists():
        raise NoSuchProcess(f"PID {pid}: no such process")
    if proc.status.get("Tgid") != str(pid):
        raise NoSuchProcess(f"PID {pid}: is a thread of PID {proc.status.get('Tgid')}, not a process")
    if proc.is_kernel_thread():
        raise NoSuchProcess(f"PID {pid}: is a kernel thread ({proc.comm.decode(errors='replace')})")
    if pid == os.getpid():
        raise NoSuchProcess(f"PID {pid}: is phaul itself")
    return proc


def _registers(pid: int, tid: int) -> Registers:
    """Registers of a stopped thread; out of a restartable sequence, which injected code would make it forget."""
    return rseq.aborted(pid, tid, native.get_registers(tid))


def tree_pids(root: int) -> list[int]:
    """The PIDs of a running tree, parents first: a snapshot that may be stale at once."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop(0)
        with contextlib.suppress(NoSuchProcess):
            todo += Proc(pid).children()
            found.append(pid)
    return found


class SourceTree:
    """All tasks of a process and its descendants.

    `freeze` must be called, and everything else done, on one thread: only that thread is their tracer.

    Attributes:
        processes: the living, parents first.
        zombies: PIDs of those that have ended but were not waited for, and their parents' PIDs.
    """

    def __init__(self, root: int) -> None:
        self.root_pid = root
        self.processes: list[SourceProcess] = []
        self.zombies: dict[int, int] = {}
        self.frozen_at = 0.0
        self._seized: dict[int, int] = {}  # tid -> pid
        self._stop_signals: dict[int, int] = {}  # by pid
        self._held = False

    @property
    def root(self) -> SourceProcess:
        return self.processes[0]

    @property
    def threads(self) -> list[SourceThread]:
        return [thread for process in self.processes for thread in process.threads]

    def freeze(self) -> None:
        """Stop every task. On any error all go on as before.

        Raises:
            CannotMove: a task is traced by somebody else.
            NoSuchProcess, NotPermitted: see `check_process`.
        """
        check_process(self.root_pid)
        self.frozen_at = time.monotonic()
        try:
            tree = self._stop_all()
            self._describe(tree)
            if log.isEnabledFor(logging.DEBUG):
                for thread in self.threads:
                    log.debug("stopped task %d of PID %d %s", thread.tid, thread.process.pid, describe(thread.regs))
        except BaseException:
            self.thaw()
            raise

    def _stop_all(self) -> dict[int, tuple[int, list[int]]]:
        """Stop tasks until no new one is found. Returns pid -> (parent pid, tids)."""
        while True:
            tree: dict[int, tuple[int, list[int]]] = {}
            self.zombies = {}
            todo = [(self.root_pid, 0)]
            while todo:
                pid, parent = todo.pop(0)
                try:
                    if is_zombie(pid):
                        self.zombies[pid] = parent
                        continue
                    tree[pid] = (parent, Proc(pid).tids())
                    todo += [(child, pid) for child in Proc(pid).children()]
                except NoSuchProcess:
                    if pid == self.root_pid:
                        raise
            new = {tid: pid for pid, (_, tids) in tree.items() for tid in tids if tid not in self._seized}
            if not new:
                return tree
            self._stop(new)

    def _stop(self, tids: dict[int, int]) -> None:
        statuses = native.stop(list(tids), SEIZE_OPTIONS)
        stopped = dict(zip(tids, statuses, strict=True))
        self._seized |= {tid: tids[tid] for tid, status in stopped.items() if status > 0}
        for tid, status in stopped.items():
            if status > 0 and (number := os.WSTOPSIG(status & 0xFFFF)) != signal.SIGTRAP:
                self._stop_signals[tids[tid]] = number
            if status < 0:
                self._explain(tids[tid], tid, -status)

    @staticmethod
    def _explain(pid: int, tid: int, error: int) -> None:
        """Say why a task could not be stopped; returns if it has ended by itself."""
        try:
            status = Proc(pid, tid).status
        except NoSuchProcess:
            return
        tracer = status.get("TracerPid", "0")
        if tracer != "0":
            raise CannotMove(pid, f"task {tid}", f"is traced by PID {tracer}")
        if status["State"][0] in "ZX":
            if tid == pid and len(Proc(pid).tids()) > 1:
                raise CannotMove(pid, "process", "its main thread has ended while others run, cannot be moved")
            return
        raise NotPermitted(f"task {tid} of PID {pid} cannot be stopped: {os.strerror(error)}")

    def _describe(self, tree: dict[int, tuple[int, list[int]]]) -> None:
        found: dict[int, SourceProcess] = {}
        for pid, (parent, tids) in tree.items():
            process = SourceProcess(pid, found.get(parent), stop_signal=self._stop_signals.get(pid, 0))
            process.threads = [SourceThread(tid, process, _registers(pid, tid)) for tid in tids]
            found[pid] = process
        self.processes = list(found.values())

    def thaw(self) -> None:
        """Let every task go on as if it had never been stopped. Idempotent."""
        for thread in self.threads:
            regs = thread.regs
            # The kernel restarts other calls by itself; this one it would let fail because of us.
            if signed(regs.gpr["ax"]) == EINTR and signed(regs.gpr["orig_ax"]) >= 0:
                with contextlib.suppress(OSError):
                    native.set_general_registers(thread.tid, resumed(regs, thread.signal_waits))
        if self._held:
            for process in self.processes:
                if not process.stop_signal:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGCONT)
            self._held = False
        for tid in self._seized:
            with contextlib.suppress(ProcessLookupError):
                native.ptrace(native.PTRACE_DETACH, tid)
        self._forget()

    def hold(self) -> None:
        """Also stop the tree by SIGSTOP, pending under our stop: it stays stopped if we die."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGSTOP)
        self._held = True

    def leave_held(self) -> None:
        """Go away without waking the tree (after `hold`)."""
        for tid in self._seized:
            with contextlib.suppress(ProcessLookupError):
                native.ptrace(native.PTRACE_DETACH, tid)
        self._forget()

    def kill(self) -> None:
        """SIGKILL every process and wait until all are gone.

        Raises:
            DumpError: a process is still there after 30 s.
        """
        for process in self.processes:
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        # A tracee's end is reported to us first, then to its parent; a leader's not before its threads'.
        for tid in reversed(self._seized):
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                while os.WIFSTOPPED(native.wait(tid)):
                    pass
        deadline = time.monotonic() + KILL_TIMEOUT
        for process in self.processes:
            poll = select.poll()
            poll.register(process.pidfd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise DumpError(f"PID {process.pid} does not end")
        self._await_reapers()
        self._forget()

    def _await_reapers(self) -> None:
        """Give init (or a subreaper) a moment to reap the descendants, so that their PIDs are free.

        The root's parent is somebody's program, which may never call wait(2).
        """
        deadline = time.monotonic() + REAP_TIMEOUT
        for pid in [*(process.pid for process in self.processes[1:]), *self.zombies]:
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.001)

    def _forget(self) -> None:
        self._seized.clear()
        for process in self.processes:
            process.close()
