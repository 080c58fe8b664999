"""Working directory, root directory and umask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phaul.engine.source import SourceProcess
from phaul.engine.state import fds, fs
from phaul.engine.state.files.base import FileBuild, FileDump, OpenFiles
from phaul.errors import CannotMove, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.fs_pb2 import fs_entry
from tests.engine.files.holding import Options, wait_asleep
from tests.engine.files.test_install import free_pids, skeleton

pytestmark = pytest.mark.root


@contextmanager
def sleeper(cwd: Path, *wrapper: str) -> Iterator[SourceProcess]:
    """A process in a directory."""
    null = subprocess.DEVNULL
    command = [*wrapper, "sh", "-c", "umask 027; exec sleep 1000"]
    child = subprocess.Popen(command, cwd=cwd, stdin=null, stdout=null, stderr=null)
    try:
        wait_asleep(child)
        yield SourceProcess(child.pid, None)
    finally:
        child.kill()
        child.wait()


def dump(process: SourceProcess, pid: int) -> ImageSet:
    """The images of a process, as those of `pid`."""
    images, renamed = ImageSet(), ImageSet()
    fs.dump_process(process, FileDump(images, Options(), OpenFiles([])))
    for name in images.names():
        for message in images.messages(name):
            renamed.add(f"fs-{pid}" if name.startswith("fs-") else name, message)
    return renamed


def test_there_and_back(tmp_path: Path) -> None:
    pid = free_pids(1)[0]
    with sleeper(tmp_path) as process:
        images = dump(process, pid)
    assert images.one(f"fs-{pid}", fs_entry).umask == 0o027
    with skeleton(pid) as tree:
        call = tree.processes[0].batch()
        fs.restore_process(tree.processes[0], call, FileBuild(images))
        call.run()
        assert os.readlink(f"/proc/{pid}/cwd") == str(tmp_path)
        assert "Umask:\t0027" in Path(f"/proc/{pid}/status").read_text()
    tmp_path.rmdir()
    with skeleton(pid) as tree, pytest.raises(RestoreError, match=f"^{tmp_path}: No such file"):
        fs.restore_process(tree.processes[0], tree.processes[0].batch(), FileBuild(images))


def test_a_deleted_directory_comes_back_deleted(tmp_path: Path) -> None:
    pid = free_pids(1)[0]
    directory = tmp_path / "above" / "below"
    directory.mkdir(parents=True)
    with sleeper(directory) as process:
        directory.rmdir()
        directory.parent.rmdir()
        fds.preflight([process.pid], Options())
        images = dump(process, pid)
    with skeleton(pid) as tree:
        call = tree.processes[0].batch()
        build = FileBuild(images)
        fs.restore_process(tree.processes[0], call, build)
        call.run()
        build.close()
        assert os.readlink(f"/proc/{pid}/cwd") == f"{directory} (deleted)"
        assert os.listdir(tmp_path) == []


def test_a_chroot_is_refused(tmp_path: Path) -> None:
    program = f"""import os, time
os.chroot({str(tmp_path)!r})
os.chdir("/")
print("there", flush=True)
time.sleep(100)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    with child:
        assert child.stdout
        assert child.stdout.readline() == b"there\n"
        try:
            with pytest.raises(CannotMove, match=f"^root directory of PID {child.pid}: is not that of phaul"):
                fds.preflight([child.pid], Options())
        finally:
            child.kill()
