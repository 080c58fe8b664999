"""`phaul dump` and `phaul restore`: options, exit codes, and what damaged images lead to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phaul.errors import DumpError, ImageError, NoSuchProcess, RestoreError, UsageError
from tests.cli.run import PHAUL, ROOT, assert_error, phaul, sleeper
from tests.support.programs import Target
from tests.support.visible import difference, visible_state

pytestmark = pytest.mark.root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def saved(images: Path) -> Iterator[tuple[int, Path]]:
    """PID of a program that has gone into images, and where they are."""
    with sleeper() as process:
        done = phaul("dump", "-t", process.pid, "-D", images)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert process.wait(10) == -signal.SIGKILL
        yield process.pid, images


def assert_gone(pid: int) -> None:
    """The PID is free, once init has reaped what was there."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_goes_on_from_its_images(images: Path) -> None:
    with Target.start("threads") as target:
        done = phaul("dump", "-t", target.pid, "-D", images)
        assert done.returncode == 0, done.stderr
        assert not target.alive
        target.reap()
        done = phaul("restore", "-d", "-D", images)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        target.moved()
        target.finish()


def test_leave_running(images: Path) -> None:
    with sleeper() as process:
        before = visible_state(process.pid)
        assert phaul("dump", "-R", "-t", process.pid, "-D", images).returncode == 0
        assert process.poll() is None
        assert not difference(before, visible_state(process.pid))
        assert (images / "inventory.img").exists()


def test_the_pidfile(saved: tuple[int, Path], tmp_path: Path) -> None:
    pid, images = saved
    pidfile = tmp_path / "pid"
    done = phaul("restore", "-d", "-D", images, "--pidfile", pidfile)
    assert done.returncode == 0, done.stderr
    assert pidfile.read_text() == str(pid)
    assert "State:\tS" in Path(f"/proc/{pid}/status").read_text()
    os.kill(pid, signal.SIGKILL)
    assert_gone(pid)
    done = phaul("restore", "-d", "-D", images, "--pidfile", pidfile)
    assert_error(done, UsageError, f"cannot write the pidfile {pidfile}: File exists")
    assert_gone(pid)


def test_waiting_for_the_root(saved: tuple[int, Path], tmp_path: Path) -> None:
    pid, images = saved
    pidfile = tmp_path / "pid"
    command = [*PHAUL, "restore", "-D", str(images), "--pidfile", str(pidfile)]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 20
    while not (pidfile.exists() and pidfile.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"PPid:\t{process.pid}\n" in status
    assert process.poll() is None
    os.kill(pid, signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert_gone(pid)


def test_the_pid_is_taken(images: Path) -> None:
    with sleeper() as process:
        assert phaul("dump", "-R", "-t", process.pid, "-D", images).returncode == 0
        done = phaul("restore", "-d", "-D", images)
        assert_error(done, RestoreError, f"PID {process.pid}")
        assert process.poll() is None


def test_a_refused_program_is_unharmed(images: Path) -> None:
    with Target.start("refuse_iouring") as target:
        before = visible_state(target.pid)
        done = phaul("dump", "-t", target.pid, "-D", images)
        assert done.returncode == 5
        line = done.stderr.splitlines()[0]
        assert line.startswith("phaul: error: ")
        assert f" of PID {target.pid}: " in line
        assert "io_uring" in line
        assert not list(images.iterdir())
        # Its ring turns while it works.
        assert not difference(before, visible_state(target.pid), ["fds.*Head", "fds.*Tail"])
        target.finish()


def test_no_directory_to_dump_to(tmp_path: Path) -> None:
    with sleeper() as process:
        done = phaul("dump", "-t", process.pid, "-D", tmp_path / "none")
        assert_error(done, DumpError, f"{tmp_path}/none: not a directory")
        assert process.poll() is None


def test_a_full_disk(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", full], check=True)
    try:
        with sleeper() as process:
            before = visible_state(process.pid)
            done = phaul("dump", "-t", process.pid, "-D", full)
            assert_error(done, DumpError, "No space left on device")
            assert not list(full.iterdir())
            assert process.poll() is None
            assert not difference(before, visible_state(process.pid))
    finally:
        subprocess.run(["umount", full], check=True)


def test_nothing_to_restore(images: Path) -> None:
    done = phaul("restore", "-d", "-D", images)
    assert_error(done, ImageError, "holds no image set: inventory.img is missing")


def test_every_truncated_image_is_named(saved: tuple[int, Path], tmp_path: Path) -> None:
    pid, images = saved
    names = sorted(path.name for path in images.iterdir() if path.stat().st_size)
    for count, name in enumerate(names):
        broken = tmp_path / f"broken-{count}"
        shutil.copytree(images, broken)
        os.truncate(broken / name, (broken / name).stat().st_size - 1)
        done = phaul("restore", "-d", "-D", broken)
        assert_error(done, ImageError, name.removesuffix(".img"))
        assert_gone(pid)


def test_a_corrupted_image(saved: tuple[int, Path]) -> None:
    pid, images = saved
    (images / f"core-{pid}.img").write_bytes(b"no image at all")
    assert_error(phaul("restore", "-d", "-D", images), ImageError, f"core-{pid}")
    (images / f"core-{pid}.img").unlink()
    assert_error(phaul("restore", "-d", "-D", images), ImageError, f"core-{pid} is missing")
    assert_gone(pid)


def test_a_thread_is_no_process(images: Path) -> None:
    with Target.start("threads") as target:
        tid = next(tid for tid in os.listdir(f"/proc/{target.pid}/task") if int(tid) != target.pid)
        done = phaul("dump", "-t", tid, "-D", images)
        assert_error(done, NoSuchProcess, f"PID {tid}: is a thread of PID {target.pid}")


def test_the_log(saved: tuple[int, Path], tmp_path: Path) -> None:
    pid, images = saved
    log = tmp_path / "log"
    assert phaul("restore", "-d", "-D", images, "-v4", "-o", log).returncode == 0
    assert log.exists()
    os.kill(pid, signal.SIGKILL)
    assert_gone(pid)


def interrupted(arguments: list[str], ready: Callable[[], bool], number: signal.Signals) -> None:
    """Run phaul until something is so, send it a signal, and see that it says so."""
    process = subprocess.Popen([*PHAUL, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert shown.endswith("phaul: error: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(images: Path, number: signal.Signals) -> None:
    with Target.start("beat", "512", "1000", "1") as target:
        dump = ["dump", "-t", str(target.pid), "-D", str(images)]
        interrupted(dump, (images / "pages-1.img").exists, number)
        assert target.alive
        assert phaul(*dump).returncode == 0
        target.reap()
        restore = ["restore", "-d", "-D", str(images)]
        interrupted(restore, Path(f"/proc/{target.pid}").exists, number)
        assert_gone(target.pid)
        done = phaul(*restore)
        assert done.returncode == 0, done.stderr
        target.moved()
        target.finish()
