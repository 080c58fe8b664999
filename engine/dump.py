"""From a process tree to an image set.

    dump = Dump(pid, options)
    dump.freeze()
    images = dump.collect()
    for target in dump.page_targets(): dump.read_pages(target, ranges, buffer)
    dump.kill()  or  dump.thaw()

One path for all uses: a directory, a stream, a live migration. Pages are read while the tree is stopped, straight
into the caller's buffer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from phaul.engine import clocks, pstree
from phaul.engine.batch import BatchError, run_steps
from phaul.engine.memory import ProcessPages, SharedObject, private_pages, shared_objects, shmem_id
from phaul.engine.needed import NeededFile, build_id, needed_by, words
from phaul.engine.proc import Mapping, Proc
from phaul.engine.source import SourceProcess, SourceTree, check_process, tree_pids
from phaul.engine.state import fds, fs, mm, registry, zombie
from phaul.engine.state.files import memfd, regular
from phaul.engine.state.files.base import Custody, FileDump
from phaul.engine.state.files.ghost import GHOST_LIMIT
from phaul.engine.vmas import Status, check, entry_of, guard_entry, is_anonymous_shared, is_memfd
from phaul.errors import DumpError, NoSuchProcess, PhaulError
from phaul.images.imageset import ImageSet
from phaul.images.pagemap import PageEntry, PageRange, build_pagemap
from phaul.images.pb.core_pb2 import core_entry, task_kobj_ids_entry
from phaul.images.pb.fdinfo_pb2 import file_entry
from phaul.images.pb.inventory_pb2 import NO_LSM, inventory_entry
from phaul.images.pb.mm_pb2 import mm_entry
from phaul.images.pb.remap_file_path_pb2 import remap_file_path_entry

log = logging.getLogger(__name__)

PREFLIGHT_ATTEMPTS = 5
IMAGE_VERSION = 2  # records behind a common magic


@dataclass(frozen=True)
class DumpOptions:
    """What the user allows, named as CRIU's options.

    Attributes:
        shell_job: the tree may belong to a session or process group from outside.
        tcp_established: connections of TCP are moved.
        tcp_close: established TCP connections come back closed.
        skip_in_flight: connections that were not yet accepted are left behind.
        network_lock: packets of the connections are dropped while the tree is stopped.
        link_remap: deleted files that have other hard links get one more, until the restore.
        ghost_limit: bytes on disk of the largest deleted file that is taken along.
        file_locks: take locks and leases on files along.
        ext_unix_sk: datagram sockets may be connected to a name outside the tree, and are again at the restore.
    """

    shell_job: bool = False
    tcp_established: bool = False
    tcp_close: bool = False
    skip_in_flight: bool = False
    network_lock: bool = True
    link_remap: bool = False
    ghost_limit: int = GHOST_LIMIT
    file_locks: bool = False
    ext_unix_sk: bool = False


@dataclass(frozen=True)
class Preflight:
    """What a look at the running tree has told.

    Attributes:
        bytes: resident memory, an upper estimate of what must be sent.
    """

    pids: list[int]
    tids: list[int]
    files: list[NeededFile]
    bytes: int


def preflight(pid: int, options: DumpOptions) -> Preflight:
    """Look for what cannot be moved, without stopping anything.

    A tree that forks and exits all the time may escape the look; `Dump.collect` looks again, at a stopped one.

    Raises:
        CannotMove, NoSuchProcess, NotPermitted: the first reason found.
    """
    for _ in range(PREFLIGHT_ATTEMPTS):
        check_process(pid)
        try:
            return _preflight(pid, options)
        except NoSuchProcess:
            continue
    check_process(pid)
    log.info("PID %d: its tree changes too fast to be looked at while it runs", pid)
    return Preflight(tree_pids(pid), [], needed_by(pid, Proc(pid).maps()), 0)


def _preflight(pid: int, options: DumpOptions) -> Preflight:
    pids = tree_pids(pid)
    pstree.check(pids, options.shell_job)
    pids = [member for member in pids if not zombie.is_zombie(member)]
    for member in pids:
        registry.preflight(member)
    fds.preflight(pids, options)
    tids, files, size = [], dict[bytes, NeededFile](), 0
    for member in pids:
        maps = Proc(member).smaps()
        for mapping in maps:
            check(member, mapping)
            if mapping.inode and mapping.deleted and not is_memfd(mapping) and not is_anonymous_shared(mapping):
                link = f"/proc/{member}/map_files/{mapping.start:x}-{mapping.end:x}"
                with contextlib.suppress(FileNotFoundError):  # unmapped meanwhile
                    resource = f"mapping at {mapping.start:x}"
                    regular.check_path(regular.behind_link(member, resource, link), options)
        files |= {file.path: file for file in needed_by(member, maps)}
        proc = Proc(member)
        tids += proc.tids()
        size += int(proc.status.get("VmRSS", "0 kB").split()[0]) * 1024
    return Preflight(pids, tids, list(files.values()), size)


@dataclass(eq=False)
class Dump:
    """A tree that is being dumped. All but `read_pages` must be called on one thread."""

    pid: int
    options: DumpOptions = field(default_factory=DumpOptions)

    def __post_init__(self) -> None:
        self.tree = SourceTree(self.pid)
        self.images = ImageSet()
        self._undo = contextlib.ExitStack()
        self._custody: list[Custody] = []
        self._targets: dict[str, tuple[list[PageRange], ProcessPages | SharedObject]] = {}

    def freeze(self) -> None:
        """Stop all tasks. On any error everything goes on as before; see `SourceTree.freeze`."""
        self.tree.freeze()

    def collect(self) -> ImageSet:
        """Read all state but page contents. On an error the caller must `thaw`.

        Raises:
            CannotMove: something in the tree, named. DumpError: reading failed.
        """
        try:
            self._collect()
        except PhaulError:
            raise
        except OSError as error:
            raise DumpError(f"PID {self.pid}: {error}") from error
        return self.images

    def _collect(self) -> None:
        processes = self.tree.processes
        pstree.check([*(process.pid for process in processes), *self.tree.zombies], self.options.shell_job)
        for process in processes:
            for mapping in process.maps:
                check(process.pid, mapping)
        pstree.dump(processes, self.tree.zombies, self.images)
        for pid in self.tree.zombies:
            self.images.add(f"core-{pid}", zombie.dump(pid))
        for process in processes:
            self._collect_state(process)
        files = fds.collect(processes, self.images, self.options)
        self._undo.push(files.undo)
        self._custody = files.custody
        objects = shared_objects([(process.pid, process.maps) for process in processes])
        for process in processes:
            self._collect_memory(process, files)
            fs.dump_process(process, files)
        for number, shared in objects.items():
            self._add_target(f"pagemap-shmem-{number}", shared.pages, shared)
        self._add_build_ids()
        root = processes[0]
        if root.ids.HasField("time_ns_id"):
            clocks.dump(root.pid, root.ids.time_ns_id, self.images)
        self._add_inventory()

    def _collect_state(self, process: SourceProcess) -> None:
        """One round trip a thread: every kind of state adds its calls to one batch."""
        process.core.mtype = core_entry.X86_64
        process.core.ids.CopyFrom(process.ids)
        for thread in process.threads:
            call = thread.batch()
            thread.core.mtype = core_entry.X86_64
            steps: list[Iterator[None]] = []
            if thread is process.threads[0]:
                modules = [module for module in (*registry.PROCESS, mm) if hasattr(module, "dump_process")]
                steps += [module.dump_process(process, call, self.images) for module in modules]
            modules = [module for module in registry.THREAD if hasattr(module, "dump_thread")]
            steps += [module.dump_thread(thread, call, thread.core) for module in modules]
            try:
                run_steps(call, steps)
            except BatchError as error:
                raise DumpError(str(error)) from error
            self.images.add(f"core-{thread.tid}", thread.core)

    def _collect_memory(self, process: SourceProcess, files: FileDump) -> None:
        entry = self.images.one(f"mm-{process.pid}", mm_entry)

        def object_id(mapping: Mapping, flags: int) -> int:
            if is_anonymous_shared(mapping):
                return shmem_id(mapping.device, mapping.inode)
            link = f"/proc/{process.pid}/map_files/{mapping.start:x}-{mapping.end:x}"
            add = memfd.add_mapping if is_memfd(mapping) else regular.add_path
            return add(files, process.pid, f"mapping at {mapping.start:x}", link, flags)

        entry.vmas.extend(entry_of(mapping, object_id) for mapping in process.maps)
        entry.exe_file_id = regular.add_path(files, process.pid, "program", f"/proc/{process.pid}/exe")
        pages, guards = private_pages(process.pid, process.maps, entry.vmas)
        entry.vmas.extend(guard_entry(item.vaddr, item.end) for item in guards)
        self._add_target(f"pagemap-{process.pid}", pages, ProcessPages(process.pid, process.mem_fd))

    def _add_target(self, name: str, pages: list[PageRange], source: ProcessPages | SharedObject) -> None:
        self._targets[name] = (pages, source)
        for message in build_pagemap(len(self._targets), map(PageEntry, pages)):
            self.images.add(name, message)

    def _add_build_ids(self) -> None:
        """Of everything that is mapped: the restore compares them."""
        mapped = {
            vma.shmid
            for process in self.tree.processes
            for vma in self.images.one(f"mm-{process.pid}", mm_entry).vmas
            if vma.status & (Status.FILE_PRIVATE | Status.FILE_SHARED)
        }
        deleted = {entry.orig_id for entry in self.images.messages("remap-fpath", remap_file_path_entry)}
        for file in self.images.messages("files", file_entry):
            if file.id in mapped - deleted and file.HasField("reg"):
                file.reg.build_id.extend(words(build_id(os.fsencode(file.reg.name))))

    def _add_inventory(self) -> None:
        ours = pstree.namespace_ids(os.getpid(), {})
        inventory = inventory_entry(
            img_version=IMAGE_VERSION,
            fdinfo_per_id=True,
            root_ids=task_kobj_ids_entry(vm_id=0, files_id=0, fs_id=0, sighand_id=0, **ours),
            ns_per_id=True,
            lsmtype=NO_LSM,
            dump_uptime=time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000,
            tcp_close=self.options.tcp_close,
        )
        self.images.add("inventory", inventory)

    def page_targets(self) -> list[str]:
        """Names of all page maps, in the order of their pages files."""
        return list(self._targets)

    def pages_of(self, target: str) -> list[PageRange]:
        """Page ranges of a target, ascending."""
        return self._targets[target][0]

    def read_pages(self, target: str, ranges: Sequence[PageRange], buffer: memoryview) -> None:
        """Fill a buffer with the contents of ranges, one after the other. From any thread.

        Raises:
            DumpError: a page cannot be read.
        """
        try:
            self._targets[target][1].read(ranges, buffer)
        except OSError as error:
            raise DumpError(f"{target}: {error}") from error

    def hold(self) -> None:
        """Also stop the tree in a way that outlives us, before the other side may run it."""
        self.tree.hold()
        for each in self._custody:
            each.hold()

    def leave_held(self) -> None:
        """After `hold`: go away and leave the tree stopped."""
        self.tree.leave_held()
        for each in self._custody:
            each.leave()
        self._close()

    def thaw(self) -> None:
        """Let the tree go on as if nothing had been. Idempotent."""
        self._undo.close()
        self.tree.thaw()
        self._close()

    def kill(self) -> None:
        """End the tree: it lives elsewhere now, or in its images. Waits until it is gone."""
        for each in self._custody:
            each.hold()
        self.tree.kill()
        for each in self._custody:
            each.kill()
        self._close()

    def _close(self) -> None:
        for _, source in self._targets.values():
            if isinstance(source, SharedObject):
                source.close()
        self._targets.clear()
