"""A program that was deleted, or has another name by now, while it runs: its mappings and its exe link."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phaul.engine.dump import DumpOptions
from phaul.engine.thread import EngineThread
from phaul.errors import CannotMove
from tests.engine.files.holding import wait_asleep
from tests.engine.test_dump_restore import dump_tree, restore_tree

pytestmark = pytest.mark.root


@pytest.fixture
def engine() -> Iterator[EngineThread]:
    with EngineThread() as thread:
        yield thread


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of our own that sleeps."""
    found = shutil.which("sleep")
    assert found
    return Path(shutil.copy(found, tmp_path / "program"))


@contextmanager
def running(program: Path) -> Iterator[subprocess.Popen[bytes]]:
    null = subprocess.DEVNULL
    process = subprocess.Popen([program, "1000"], stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        wait_asleep(process)
        yield process
    finally:
        process.kill()
        process.wait()


def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    return directory


def mapped(pid: int) -> set[str]:
    """Paths of the file mappings, by what the kernel says."""
    return {line.split(maxsplit=5)[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line}


def check_restored(engine: EngineThread, directory: Path, pid: int, before: set[str]) -> None:
    assert engine.call(restore_tree, directory) == pid
    try:
        assert mapped(pid) == before
        assert os.readlink(f"/proc/{pid}/exe") in before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_deleted_program(engine: EngineThread, program: Path, tmp_path: Path) -> None:
    directory = images(tmp_path)
    with running(program) as process:
        program.unlink()
        before = mapped(process.pid)
        assert f"{program} (deleted)" in before
        engine.call(dump_tree, process.pid, directory)
    assert len(list(directory.glob("ghost-file-*.img"))) == 1
    check_restored(engine, directory, process.pid, before)
    assert os.listdir(tmp_path) == ["images"]


def test_a_program_with_another_name(engine: EngineThread, program: Path, tmp_path: Path) -> None:
    directory, allowed = images(tmp_path), DumpOptions(link_remap=True)
    with running(program) as process:
        os.link(program, tmp_path / "other")
        program.unlink()
        before = mapped(process.pid)
        with pytest.raises(CannotMove, match=r"has other names \(hard links\); with --link-remap"):
            engine.call(dump_tree, process.pid, directory)
        engine.call(dump_tree, process.pid, directory, allowed, leave_running=True)
        assert sorted(os.listdir(tmp_path)) == ["images", "other"]
        engine.call(dump_tree, process.pid, directory, allowed)
        assert len(os.listdir(tmp_path)) == 3
    check_restored(engine, directory, process.pid, before)
    assert sorted(os.listdir(tmp_path)) == ["images", "other"]


def test_a_deleted_program_beyond_the_limit(engine: EngineThread, program: Path, tmp_path: Path) -> None:
    with running(program) as process:
        program.unlink()
        with pytest.raises(CannotMove, match=f"deleted file {program} of .* more than --ghost-limit 4096"):
            engine.call(dump_tree, process.pid, images(tmp_path), DumpOptions(ghost_limit=4096))
        assert process.poll() is None
