"""From an image set to a process tree.

    restore = Restore(images, options)
    restore.stage()                            skeletons with their address spaces, still empty
    restore.write_pages(target, ranges, data)  any number of times, from any thread
    restore.finish()                           everything else; the tree is whole, and stopped
    restore.resume()                           it runs

Until `resume`, `abort` leaves nothing behind, and so does our death.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from phaul.engine import clocks, native, pstree
from phaul.engine.batch import Batch, BatchError, run_steps
from phaul.engine.dump import IMAGE_VERSION
from phaul.engine.inject import stop_signal
from phaul.engine.memory import Bounds, ProcessPages, SharedObject
from phaul.engine.needed import build_id, words
from phaul.engine.skeleton import SkeletonProcess, SkeletonThread, SkeletonTree, local_vdso
from phaul.engine.state import fds, fs, locks, mm, registers, registry, signals, task, zombie
from phaul.engine.state.files import memfd, tty
from phaul.engine.state.files.base import BuildOptions, FileBuild
from phaul.engine.vmas import KERNEL_OWNED, Status, guard_all, lock_all, map_all
from phaul.errors import ImageError, NotPermitted, PhaulError, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pagemap import PageRange, parse_pagemap
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.inventory_pb2 import inventory_entry
from phaul.images.pb.memfd_pb2 import memfd_inode_entry
from phaul.images.pb.mm_pb2 import mm_entry
from phaul.images.pb.pstree_pb2 import pstree_entry
from phaul.images.pb.vma_pb2 import vma_entry


@dataclass(frozen=True)
class RestoreOptions:
    """Named as CRIU's options.

    Attributes:
        shell_job: sessions and groups from outside the tree become ours.
        parent: whose child the root becomes.
        tcp_established: connections of TCP may be rebuilt.
        tcp_close: they come back closed instead.
        network_lock: their packets are dropped until the tree runs.
    """

    shell_job: bool = False
    parent: native.Parent = native.Parent.INIT
    tcp_established: bool = False
    tcp_close: bool = False
    network_lock: bool = True


class _PrivateTarget:
    """Pages of one skeleton. What comes for the vDSO is compared, not written: it belongs to the kernel."""

    def __init__(self, process: SkeletonProcess) -> None:
        self._pages = ProcessPages(process.pid, process.mem_fd)
        vmas = process.mm.vmas
        closed = KERNEL_OWNED & ~Status.VDSO | Status.GUARD
        self._bounds = Bounds((v.start, v.end) for v in vmas if not v.status & closed)
        self._vdso = [(v.start, v.end) for v in vmas if v.status & Status.VDSO]

    def write(self, target: str, ranges: Sequence[PageRange], data: memoryview) -> None:
        self._bounds.check(target, ranges)
        if any(item.vaddr < end and start < item.end for item in ranges for start, end in self._vdso):
            for item in ranges:
                self._write_around_vdso(item, data[: item.size])
                data = data[item.size :]
        else:
            self._pages.write(ranges, data)

    def _write_around_vdso(self, item: PageRange, data: memoryview) -> None:
        for start, end in self._vdso:
            low, high = max(start, item.vaddr), min(end, item.end)
            if low < high:
                here = local_vdso()[low - start : high - start]
                if data[low - item.vaddr : low - item.vaddr + len(here)] != here:
                    raise RestoreError("the vDSO is another one: the source runs another kernel")
                for a, b in ((item.vaddr, low), (high, item.end)):
                    if a < b:
                        rest = PageRange(a, (b - a) // 4096)
                        self._write_around_vdso(rest, data[a - item.vaddr : b - item.vaddr])
                return
        self._pages.write([item], data)


class _SharedTarget:
    def __init__(self, fd: int) -> None:
        self._object = SharedObject(fd)
        size = (self._object.size + 4095) & -4096
        self._bounds = Bounds([(0, size)] if size else [])

    def write(self, target: str, ranges: Sequence[PageRange], data: memoryview) -> None:
        self._bounds.check(target, ranges)
        self._object.write(ranges, data)


class Restore:
    """A tree that is being rebuilt. All but `write_pages` must be called on one thread."""

    def __init__(self, images: ImageSet, options: RestoreOptions | None = None) -> None:
        self.images, self.options = images, options or RestoreOptions()
        self._entries = images.messages("pstree", pstree_entry)
        self._tree: SkeletonTree | None = None
        self._files: FileBuild | None = None
        self._targets: dict[str, _PrivateTarget | _SharedTarget] = {}
        self._shared_fds: dict[int, int] = {}

    @property
    def root_pid(self) -> int:
        return self._entries[0].pid

    @property
    def pids(self) -> list[int]:
        return [entry.pid for entry in self._entries]

    def stage(self) -> None:
        """Make the skeletons and lay out their address spaces. On any error nothing is left.

        Raises:
            RestoreError: a PID is taken, a file is missing or another build, ... ImageError: the images are not
            a whole set.
        """
        if os.geteuid() != 0:
            raise NotPermitted("phaul must run as root")
        self._guarded(self._stage)

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError) and not isinstance(error, PhaulError):
                raise RestoreError(f"cannot be rebuilt: {error}") from error
            raise

    def _check_images(self) -> dict[int, mm_entry]:
        inventory = self.images.one("inventory", inventory_entry)
        if inventory.img_version not in (1, IMAGE_VERSION):
            raise ImageError(f"inventory: image version {inventory.img_version} is unknown")
        if not self._entries:
            raise ImageError("image pstree is missing")
        mms = {}
        for entry in self._entries:
            if not entry.threads or entry.threads[0] != entry.pid:
                raise ImageError(f"pstree: PID {entry.pid} is not the first of its threads")
            for tid in entry.threads:
                self.images.one(f"core-{tid}", core_entry)
            if zombie.is_zombie_image(self.images.one(f"core-{entry.pid}", core_entry)):
                continue
            mms[entry.pid] = self.images.one(f"mm-{entry.pid}", mm_entry)
        return mms

    def _stage(self) -> None:
        mms = self._check_images()
        allowed = BuildOptions(self.options.tcp_established, self.options.tcp_close, self.options.network_lock)
        files = self._files = FileBuild(self.images, options=allowed)
        self._check_builds(self._files, mms)
        self._open_shared(self._files, mms)
        tree = self._tree = SkeletonTree(
            self._entries,
            mms,
            self._path_of_file,
            sharing=self._sharing(),
            stop_signal=stop_signal(signals.pending_anywhere(self.images)),
            keep_session=self.options.shell_job,
            on_session=lambda leader: tty.open_session(leader, files),
        )
        tree.create(
            parent=self.options.parent,
            clocks=clocks.restore_offsets(self.root_pid, self.images),
        )
        tty.set_foreground(tree.processes, files)
        for process in tree.processes:
            call = process.batch()
            map_all(call, process.mm.vmas, self._path_of_vma)
            mm.restore_process(process, call, self.images)
            call.run()
            self._targets[f"pagemap-{process.pid}"] = _PrivateTarget(process)
        for number, fd in self._shared_fds.items():
            self._targets[f"pagemap-shmem-{number}"] = _SharedTarget(fd)
        for name in self.images.names():
            if name.startswith("pagemap-"):
                parse_pagemap(name, self.images.messages(name))
                if name not in self._targets:
                    raise ImageError(f"{name}: no process or shared memory of this number")

    def _sharing(self) -> dict[int, int]:
        ids = {pid: self.images.one(f"core-{pid}", core_entry).ids for pid in self.pids}
        parents = {entry.pid: entry.ppid for entry in self._entries if entry.ppid in ids}
        return {pid: pstree.sharing_flags(ids[parent], ids[pid]) for pid, parent in parents.items()}

    def _path_of_file(self, file_id: int) -> str:
        assert self._files is not None
        return f"/proc/{os.getpid()}/fd/{self._files.open(file_id)}"

    def _path_of_vma(self, vma: vma_entry) -> str | None:
        if vma.status & Status.ANON_SHARED:
            return f"/proc/{os.getpid()}/fd/{self._shared_fds[vma.shmid]}"
        if vma.status & (Status.FILE_PRIVATE | Status.FILE_SHARED):
            return self._path_of_file(vma.shmid)
        return None

    def _check_builds(self, files: FileBuild, mms: dict[int, mm_entry]) -> None:
        """Programs and libraries must be those of the source: their clean pages are not in the images."""
        mapped = {vma.shmid for entry in mms.values() for vma in entry.vmas if vma.HasField("fdflags")}
        for number in mapped:
            entry = files.entries.get(number)
            if entry is None:
                raise ImageError(f"files: there is no file with id {number}")
            if entry.HasField("reg") and entry.reg.build_id:
                files.open(number)
                if words(build_id(os.fsencode(files.path(entry.reg.name)))) != list(entry.reg.build_id):
                    raise RestoreError(f"{entry.reg.name}: another build than at the source")

    def _open_shared(self, files: FileBuild, mms: dict[int, mm_entry]) -> None:
        """Make all shared memory objects, of full size and empty."""
        for inode in self.images.messages("memfd", memfd_inode_entry):
            self._shared_fds[inode.shmid] = memfd.open_inode(inode.inode_id, files)
        sizes: dict[int, int] = {}
        for entry in mms.values():
            for vma in entry.vmas:
                if vma.status & Status.ANON_SHARED:
                    end = vma.pgoff + vma.end - vma.start
                    sizes[vma.shmid] = max(sizes.get(vma.shmid, 0), end)
        for number, size in sizes.items():
            self._shared_fds[number] = files.keep_until_close(_anonymous_object(size))

    def write_pages(self, target: str, ranges: Sequence[PageRange], data: memoryview) -> None:
        """Put page contents into the skeletons. From any thread.

        Raises:
            ImageError: the target is unknown, or a range lies outside of its mappings.
            RestoreError: writing failed (out of memory), or the vDSO differs.
        """
        place = self._targets.get(target)
        if place is None:
            raise ImageError(f"{target}: no process or shared memory of this number")
        try:
            place.write(target, ranges, data)
        except OSError as error:
            raise RestoreError(f"{target}: {error}") from error

    def finish(self) -> None:
        """Put back all state but memory. The tree is whole afterwards, and stopped. On an error nothing is left."""
        self._guarded(self._finish)

    def _finish(self) -> None:
        assert self._tree is not None
        assert self._files is not None
        for process in self._tree.zombies:
            zombie.restore(process, self.images.one(f"core-{process.pid}", core_entry))
        fds.build(self._files)
        for process in self._tree.processes:
            fds.install(process, self._files, self._tree.comm)
            self._finish_process(process, self._files)
        self._files.close()
        for process in self._tree.processes:
            saved = {
                thread.tid: registers.decode(self.images.one(f"core-{thread.tid}", core_entry), thread.tid)
                for thread in process.threads
            }
            self._tree.set_registers(process, saved)

    def _finish_process(self, process: SkeletonProcess, files: FileBuild) -> None:
        assert self._tree is not None
        call = process.batch()
        fs.restore_process(process, call, files)
        guard_all(call, process.mm.vmas)
        lock_all(call, process.mm.vmas)
        self._run(call, [locks.restore_process(process, call, self.images)])
        self._tree.add_threads(process)
        call = process.batch()
        modules = [module for module in registry.PROCESS if hasattr(module, "restore_process")]
        self._run(call, (module.restore_process(process, call, self.images) for module in modules))
        for thread in process.threads:
            self._finish_thread(thread)
        call = process.batch()
        mm.restore_dumpable(process, call, self.images)
        self._run(call, [])

    def _finish_thread(self, thread: SkeletonThread) -> None:
        core = self.images.one(f"core-{thread.tid}", core_entry)
        call = thread.batch()
        modules = [module for module in registry.THREAD if hasattr(module, "restore_thread")]
        self._run(call, (module.restore_thread(thread, call, core) for module in modules))

    def _run(self, call: Batch, steps: Iterable[Iterator[None] | None]) -> None:
        try:
            run_steps(call, steps)
        except BatchError as error:
            raise RestoreError(f"cannot be rebuilt: {error}") from error

    def resume(self) -> None:
        """Let the tree run. From here on it is not ours any more."""
        assert self._tree is not None
        assert self._files is not None
        for process in self._tree.processes:
            task.restore_stop(process, self.images)
        self._files.resume()
        self._tree.detach()

    def abort(self) -> None:
        """Kill what has been made. Idempotent; does nothing after `resume`."""
        if self._tree is not None:
            self._tree.abort()
        if self._files is not None:
            self._files.close()
            self._files.abort()


def _anonymous_object(size: int) -> int:
    """A new MAP_SHARED|MAP_ANONYMOUS object that nothing maps yet, as a descriptor."""
    address = native.syscall("mmap", 0, size, 3, 0x21, -1, 0)  # PROT_READ|WRITE, MAP_SHARED|MAP_ANONYMOUS
    try:
        path = f"/proc/self/map_files/{address:x}-{address + (size + 4095 & -4096):x}"
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    finally:
        native.syscall("munmap", address, size)
