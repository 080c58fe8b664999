"""A process that holds files, and the way from its files to ours."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from phaul.engine.source import SourceProcess
from phaul.engine.state import fds
from phaul.engine.state.files.base import BuildOptions, FileBuild, FileDump
from phaul.images.imageset import ImageSet
from phaul.images.pb.core_pb2 import task_kobj_ids_entry

CLOCK_NANOSLEEP = 230


@dataclass(frozen=True)
class Options:
    """As `DumpOptions`."""

    shell_job: bool = False
    tcp_close: bool = False
    tcp_established: bool = False
    skip_in_flight: bool = False
    network_lock: bool = True
    link_remap: bool = False
    ghost_limit: int = 1 << 20
    file_locks: bool = False
    ext_unix_sk: bool = False


@dataclass
class Copy:
    """Files of a holder, dumped and made again here."""

    images: ImageSet
    built: FileBuild
    numbers: dict[int, int]

    def __getitem__(self, number: int) -> int:
        """Our descriptor for what was `number` in the first process."""
        return self.built.fds[self.numbers[number]]


def wait_asleep(process: subprocess.Popen[bytes]) -> None:
    """Wait until `sleep` sleeps: before, it loads its libraries."""
    while system_call(process.pid) != CLOCK_NANOSLEEP:
        assert process.poll() is None


def system_call(pid: int) -> int:
    """The number of the system call that a process waits in; -1 if it runs."""
    number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return -1 if number == "running" else int(number)


class Holder:
    """Processes (`sleep`) that have nothing open but what they were given."""

    allowed = BuildOptions(tcp_established=True)

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.copies: list[FileBuild] = []

    def start(self, *fds: int) -> int:
        """Start a process with these descriptors, under their numbers. Returns its PID."""
        null = subprocess.DEVNULL
        process = subprocess.Popen(["sleep", "1000"], stdin=null, stdout=null, stderr=null, pass_fds=fds, cwd="/")
        self.processes.append(process)
        wait_asleep(process)
        return process.pid

    def give(self, *fds: int) -> int:
        """As `start`; the test has them no longer."""
        pid = self.start(*fds)
        for fd in fds:
            os.close(fd)
        return pid

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def preflight(self, options: Options | None = None) -> None:
        fds.preflight(self.pids, options or Options())

    def dump(self, options: Options | None = None) -> tuple[ImageSet, FileDump]:
        """Collect the files of all processes."""
        images = ImageSet()
        sources = []
        for number, pid in enumerate(self.pids, start=1):
            ids = task_kobj_ids_entry(vm_id=number, files_id=number, fs_id=number, sighand_id=number)
            sources.append(SourceProcess(pid, None, ids=ids))
        return images, fds.collect(sources, images, options or Options())

    def copy(self, options: Options | None = None, keep: bool = False) -> Copy:
        """Dump, end the processes (unless `keep`), send the images through bytes, and build."""
        images, _ = self.dump(options)
        arrived = ImageSet()
        for name in images.names():
            arrived.decode_file(name, images.encode_file(name))
        if not keep:
            self.stop()
        built = self.build(arrived)
        return Copy(arrived, built, built.tables["fdinfo-1"])

    def build(self, images: ImageSet) -> FileBuild:
        """Build all files of the images."""
        built = FileBuild(images)
        self.copies.append(built)
        fds.build(built)
        return built

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()
