"""The destination side's view of a tree: empty processes under the right PIDs, which are then filled.

A skeleton is a process that runs nothing but our injected code. Its address space holds only that code and
scratch memory, in a gap of all address spaces of the tree, until the layout of the source is made in it. It is
traced with PTRACE_O_EXITKILL: if we die, it dies. See docs/architecture.md for the order of the steps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from phaul.engine import native
from phaul.engine.batch import Batch, BatchError
from phaul.engine.inject import CODE, SkeletonRunner, find_vdso, vdso_tail
from phaul.engine.native import Registers
from phaul.engine.proc import PAGE_SIZE, Mapping, Proc, find_gap
from phaul.engine.vmas import Status
from phaul.errors import RestoreError
from phaul.images.pb.mm_pb2 import mm_entry
from phaul.images.pb.pstree_pb2 import pstree_entry

# Up to 65,530 mappings (vm.max_map_count) must fit into one batch: 64 bytes a record. Untouched pages cost nothing.
SCRATCH: Final = 16 << 20
_OPTIONS: Final = (
    native.O_TRACESYSGOOD | native.O_TRACEFORK | native.O_TRACEVFORK | native.O_TRACECLONE
    | native.O_EXITKILL | native.O_SUSPEND_SECCOMP
)  # fmt: skip
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_THREAD_FLAGS: Final = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000  # VM FS FILES SIGHAND THREAD SYSVSEM
_CLONE_ARGS: Final = struct.Struct("<11Q")


def _clone_args(flags: int, exit_signal: int, set_tid: int) -> bytes:
    """struct clone_args (linux/sched.h) up to cgroup."""
    return _CLONE_ARGS.pack(flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid, 1, 0)


@dataclass(eq=False)
class SkeletonThread:
    """A stopped thread of a skeleton."""

    tid: int
    process: SkeletonProcess

    @cached_property
    def runner(self) -> SkeletonRunner:
        tree = self.process.tree
        return SkeletonRunner(self.process.pid, self.tid, tree.stop_signal, tree.code, tree.code + PAGE_SIZE, SCRATCH)

    def batch(self) -> Batch:
        """A batch of system calls for this thread. One at a time in a process: they share the scratch."""
        return Batch(self.runner)


@dataclass(eq=False)
class SkeletonProcess:
    """An empty process; `threads[0]` is its leader."""

    entry: pstree_entry
    tree: SkeletonTree
    parent: SkeletonProcess | None
    mm: mm_entry
    threads: list[SkeletonThread] = field(default_factory=list)
    children: list[SkeletonProcess] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.entry.pid

    @cached_property
    def pidfd(self) -> int:
        return os.pidfd_open(self.pid)

    @cached_property
    def mem_fd(self) -> int:
        return Proc(self.pid).open("mem", os.O_RDWR)

    def batch(self) -> Batch:
        """A batch of system calls for the leader."""
        return self.threads[0].batch()

    def vmas_of(self, status: Status) -> list[Mapping]:
        """Mappings of the image with this status bit, as bare mappings."""
        return [Mapping(vma.start, vma.end, "----", 0, (0, 0), 0, b"") for vma in self.mm.vmas if vma.status & status]


class SkeletonTree:
    """All skeletons of a tree. Every method must be called on one thread: their tracer.

    Args:
        entries: the tree, parents before children.
        mms: the address space of each living process; the others are zombies.
        path_of_file: for a file id, a path by which the skeletons can open it.
        sharing: flags of clone(2) by which a process shares descriptors or working directory with its parent, by PID.
        stop_signal: ends batches; must not be pending anywhere in the tree, or 0 (see `native.run`).
        keep_session: the root stays in the session and process group of our process.
        on_session: called with the leader of every new session, before it has children there.
    """

    def __init__(
        self,
        entries: list[pstree_entry],
        mms: dict[int, mm_entry],
        path_of_file: Callable[[int], str],
        *,
        sharing: dict[int, int],
        stop_signal: int,
        keep_session: bool = False,
        on_session: Callable[[SkeletonProcess], None] = lambda leader: None,
    ) -> None:
        self.path_of_file, self.stop_signal, self._keep_session = path_of_file, stop_signal, keep_session
        self._on_session = on_session
        self._sharing = sharing
        by_pid: dict[int, SkeletonProcess] = {}
        for entry in entries:
            process = SkeletonProcess(entry, self, by_pid.get(entry.ppid), mms.get(entry.pid, mm_entry()))
            by_pid[entry.pid] = process
            if process.parent:
                process.parent.children.append(process)
        self.processes = [process for pid, process in by_pid.items() if pid in mms]
        self.zombies = [process for pid, process in by_pid.items() if pid not in mms]
        taken = [(vma.start, vma.end) for mm in mms.values() for vma in mm.vmas]
        self._stub_base = find_gap(taken, 2 * PAGE_SIZE + SCRATCH)
        self.code = self._stub_base + PAGE_SIZE
        self._taken = taken
        self.comm, self._their_comm = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    @property
    def root(self) -> SkeletonProcess:
        return self.processes[0]

    @property
    def threads(self) -> list[SkeletonThread]:
        return [thread for process in self.processes for thread in process.threads]

    # Making the processes

    def create(self, *, parent: native.Parent, clocks: tuple[int, int] | None) -> None:
        """Start all processes, with their sessions and groups, in bare address spaces.

        Args:
            parent: whose child the root becomes.
            clocks: see `native.spawn_skeleton`.

        Raises:
            RestoreError: a PID is taken, or a step failed. `abort` must be called.
        """
        root = self.root
        stub = self._stub()
        try:
            native.spawn_skeleton(root.pid, stub, self._their_comm.fileno(), parent=parent, clocks=clocks)
        except OSError as error:
            raise self._failed(root.pid, error.errno or 0, f"{error.filename}") from error
        finally:
            os.close(stub)
            self._their_comm.close()
        status = native.stop([root.pid], _OPTIONS)[0]
        if status < 0:
            raise RestoreError(f"PID {root.pid} cannot be traced: {os.strerror(-status)}")
        root.threads.append(SkeletonThread(root.pid, root))
        with self._naming():
            self._move_code(root)
            self._grow(root, os.getsid(0))
            self._set_groups()
            for process in self.processes:
                self._strip(process)

    def _stub(self) -> int:
        """The stub program, as a descriptor that nobody can write to (else ETXTBSY)."""
        fd = os.memfd_create("phaul-skeleton", os.MFD_CLOEXEC)
        try:
            os.write(fd, native.build_stub(self._stub_base, PAGE_SIZE + SCRATCH))
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)

    def _move_code(self, root: SkeletonProcess) -> None:
        """Run from an anonymous page: while the stub's file is mapped, the exe link cannot be changed (EBUSY)."""
        native.write_memory(root.pid, self.code, CODE.code)
        call = Batch(
            SkeletonRunner(root.pid, root.pid, self.stop_signal, self._stub_base, self.code + PAGE_SIZE, SCRATCH)
        )
        call.mprotect(self.code, PAGE_SIZE, 5)  # PROT_READ|PROT_EXEC
        call.run()

    @staticmethod
    def _failed(pid: int, error: int, step: str) -> RestoreError:
        if error == errno.EEXIST:
            return RestoreError(f"PID {pid} is taken on this host")
        if error == errno.EINVAL and step == "clone3":
            return RestoreError(f"PID {pid} is beyond pid_max of this host")
        return RestoreError(f"PID {pid} cannot be made ({step}): {os.strerror(error)}")

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except BatchError as error:
            raise RestoreError(f"cannot be rebuilt: {error}") from error

    def _grow(self, process: SkeletonProcess, session: int) -> None:
        """Make the children of a process, recursively: those of its old session before it starts its own."""
        wanted = process.entry.sid
        own = wanted == process.pid
        if process.parent is None and not own and self._keep_session:
            wanted = session
        if not own and wanted != session:
            raise RestoreError(f"session {wanted} of PID {process.pid} is not led by one of its ancestors")
        before = [child for child in process.children if own and child.entry.sid not in (wanted, child.pid)]
        for child in before:
            self._fork(child, session)
        if own:
            process.batch().run_one("setsid")
            self._on_session(process)
        for child in process.children:
            if child not in before:
                self._fork(child, process.pid if own else session)

    def _fork(self, child: SkeletonProcess, session: int) -> None:
        assert child.parent is not None
        self._clone(child.parent, child, [child.pid], self._sharing.get(child.pid, 0), signal.SIGCHLD)
        self._grow(child, session)

    def _clone(
        self, maker: SkeletonProcess, owner: SkeletonProcess, tids: list[int], flags: int, exit_signal: int
    ) -> None:
        """Let `maker` create tasks with these ids, one clone3 each; they become threads of `owner`."""
        call = maker.batch()
        for tid in tids:
            set_tid = call.data(struct.pack("<i", tid))
            call.clone3(call.data(_clone_args(flags, exit_signal, set_tid)), _CLONE_ARGS.size)
        try:
            call.run()
        except BatchError as error:
            raise self._failed(tids[len(maker.threads[0].runner.new_tids)], error.errno or 0, "clone3") from error
        finally:
            runner = maker.threads[0].runner
            for tid in runner.new_tids:
                native.wait(tid)
                owner.threads.append(SkeletonThread(tid, owner))
            runner.new_tids.clear()

    def _set_groups(self) -> None:
        """Process groups: leaders first, since a group must exist before others join it."""
        everyone = [*self.processes, *self.zombies]
        existing = {process.entry.sid for process in everyone}
        for leaders in (True, False):
            for process in everyone:
                group = process.entry.pgid
                if (group == process.pid) != leaders or process.entry.sid == process.pid:
                    continue
                if group == process.pid or group in existing:
                    process.batch().run_one("setpgid", 0, group)
                elif not self._keep_session:
                    self._join_orphaned_group(process, group)
                existing.add(group)

    def _join_orphaned_group(self, process: SkeletonProcess, group: int) -> None:
        """Join a group whose leader has ended: somebody must lead it until the first member is there."""
        helper = SkeletonProcess(pstree_entry(pid=group), self, process, mm_entry())
        self._clone(process, helper, [group], 0, signal.SIGCHLD)
        helper.batch().run_one("setpgid", 0, 0)
        process.batch().run_one("setpgid", 0, group)
        call = helper.batch()
        call.exit_group(0)
        with contextlib.suppress(ProcessLookupError):
            call.run()
        # Its parent reaps it, and forgets that it was told so.
        call = process.batch()
        call.wait4(group, 0, 0, 0)
        call.rt_sigaction(signal.SIGCHLD, call.data(bytes(32)), 0, 8)
        call.run()

    # Address spaces

    def _strip(self, process: SkeletonProcess) -> None:
        """Leave nothing in the address space but our code, the scratch, and the vDSO at its final place."""
        maps = Proc(process.pid).maps()
        vdso = [m for m in maps if m.path in (b"[vdso]", b"[vvar]", b"[vvar_vclock]")]
        wanted = process.vmas_of(Status.VDSO | Status.VVAR)
        if [m.size for m in vdso] != [m.size for m in wanted]:
            raise RestoreError("the vDSO has another layout on this kernel")
        ours = range(self.code, self.code + PAGE_SIZE + SCRATCH)
        call = process.batch()
        for mapping in maps:
            if mapping not in vdso and mapping.path != b"[vsyscall]" and mapping.start not in ours:
                call.munmap(mapping.start, mapping.size)
        # By way of a place that is free before and after: old and new places may overlap.
        total = sum(m.size for m in vdso)
        halfway = find_gap([*self._taken, *((m.start, m.end) for m in maps)], total)
        for mapping in vdso:
            call.mremap(mapping.start, mapping.size, mapping.size, _MREMAP_MAYMOVE | _MREMAP_FIXED, halfway)
            halfway += mapping.size
        for mapping, place in reversed(list(zip(vdso, wanted, strict=True))):
            halfway -= mapping.size
            call.mremap(halfway, mapping.size, mapping.size, _MREMAP_MAYMOVE | _MREMAP_FIXED, place.start)
        call.run()

    # Threads and the end

    def add_threads(self, process: SkeletonProcess) -> None:
        """Make the other threads of a process, under their TIDs."""
        tids = [tid for tid in process.entry.threads if tid != process.pid]
        with self._naming():
            # Fewer a batch than native.LIST_MAX new tasks.
            for i in range(0, len(tids), 512):
                self._clone(process, process, tids[i : i + 512], _THREAD_FLAGS, 0)

    def set_registers(self, process: SkeletonProcess, registers: dict[int, Registers]) -> None:
        """Remove the scratch and set the final registers of all threads (by TID): nothing can be injected any more."""
        vdso = find_vdso(process.pid, Proc(process.pid).maps())
        code = native.read_memory(process.pid, vdso.start, vdso.size)
        leader = process.threads[0]
        last = native.get_registers(leader.tid)
        last.gpr |= {
            "ip": vdso.start + code.index(b"\x0f\x05"), "ax": native.syscall_number("munmap"), "orig_ax": -1,
            "di": self.code, "si": PAGE_SIZE + SCRATCH, "sp": vdso.start,
        }  # fmt: skip
        native.leave(leader.tid, last)
        for thread in process.threads:
            native.set_registers(thread.tid, registers[thread.tid])

    def detach(self) -> None:
        """Let everything run; leaders last. The tree is not ours any more: `abort` will not touch it."""
        for process in self.processes:
            for thread in reversed(process.threads):
                # A thread that runs already may end the whole process.
                with contextlib.suppress(ProcessLookupError):
                    native.ptrace(native.PTRACE_DETACH, thread.tid)
        for process in (*self.processes, *self.zombies):
            process.threads.clear()
        self.close()

    def abort(self) -> None:
        """Kill all skeletons and wait until they are gone. Idempotent."""
        everyone = [*self.processes, *self.zombies]
        for process in everyone:
            if process.threads:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for thread in reversed([thread for process in everyone for thread in process.threads]):
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                while os.WIFSTOPPED(native.wait(thread.tid)):
                    pass
        for process in everyone:
            process.threads.clear()
        self.close()

    def close(self) -> None:
        """Give back our descriptors."""
        self.comm.close()
        self._their_comm.close()
        for process in self.processes:
            for name in ("pidfd", "mem_fd"):
                if name in process.__dict__:
                    os.close(process.__dict__.pop(name))


def local_vdso() -> bytes:
    """The content of this kernel's vDSO, without the unused tail of its last page."""
    vdso = find_vdso(os.getpid(), Proc(os.getpid()).maps())
    return native.read_memory(os.getpid(), vdso.start, vdso.size - vdso_tail()[1])
