"""`phaul dump` and `phaul restore` called as CRIU is: where things go, whose child the tree becomes, action scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.errors import DumpError, RestoreError, UsageError
from tests.cli.run import PHAUL, ROOT, assert_error, phaul, sleeper
from tests.support.visible import difference, visible_state

pytestmark = pytest.mark.root

# Tells what it has been told, and fails at the stage in $FAIL_AT.
SCRIPT = f"""#!{sys.executable}
import json, os, sys
told = {{name: os.environ.get("CRTOOLS_" + name) for name in ("SCRIPT_ACTION", "INIT_PID")}}
told |= {{"images": os.path.realpath(os.environ["CRTOOLS_IMAGE_DIR"]), "cwd": os.getcwd()}}
with open(os.environ["TOLD"], "a") as file:
    print(json.dumps(told), file=file)
sys.exit(told["SCRIPT_ACTION"] == os.environ.get("FAIL_AT"))
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def saved(images: Path) -> Iterator[int]:
    """PID of a program that has gone into the images."""
    with sleeper() as process:
        assert phaul("dump", "-t", process.pid, "-D", images).returncode == 0
        process.wait(10)
        yield process.pid


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "script"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return path


def told(tmp_path: Path) -> list[dict[str, str | None]]:
    return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def state_of(pid: int) -> str:
    return next(line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "State:" in line)


def parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("PPid:"))


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    """Until init has reaped it."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_as_scripts_for_criu_call_it(tmp_path: Path, images: Path) -> None:
    """Relative directories, log files beside the images, options that change nothing here."""
    common = ["--no-default-config", "--images-dir", "images", "--verbosity=4"]
    pidfile = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with sleeper() as process:
        dump = [*common, "--log-file", "dump.log", "--tree", str(process.pid), "--pidfile", str(pidfile)]
        dump += ["--timeout", "10", "--pre-dump-mode", "splice"]
        subprocess.run([*PHAUL, "dump", *dump], cwd=tmp_path, env=environment, check=True, timeout=60)
        process.wait(10)
        restore = [*common, "--log-file", "restore.log", "--pidfile", str(pidfile), "--restore-detached"]
        subprocess.run([*PHAUL, "restore", *restore], cwd=tmp_path, env=environment, check=True, timeout=60)
    pid = int(pidfile.read_text())
    assert pid == process.pid
    assert parent_of(pid) != os.getpid()
    assert (images / "dump.log").exists()
    assert (images / "restore.log").exists()
    end(pid)


def test_the_log_of_a_failure_is_in_the_working_directory(tmp_path: Path, images: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    done = phaul("restore", "-d", "-D", images, "-W", work, "-o", "log", "-v0")
    assert done.returncode != 0
    assert not (images / "log").exists()
    assert (work / "log").exists()
    done = phaul("restore", "-d", "-D", images, "-W", work, "-o", "log")
    assert "Error: " in (work / "log").read_text()
    assert done.stderr.splitlines()[0].removeprefix("phaul: error: ") in (work / "log").read_text()


def test_options_in_a_file(images: Path, tmp_path: Path) -> None:
    with sleeper() as process:
        config = tmp_path / "config"
        config.write_text(f"tree {process.pid}\nimages-dir {images}\nleave-running\n")
        assert phaul("dump", "--no-default-config", "--config", config).returncode == 0
        assert process.poll() is None
        assert (images / "inventory.img").exists()
        assert_error(phaul("dump", "--config", config, "--lazy-pages"), UsageError, "does not do --lazy-pages yet")


def test_a_sibling(saved: int, images: Path) -> None:
    done = phaul("restore", "-d", "-S", "-D", images)
    assert (done.returncode, done.stderr) == (0, "")
    assert parent_of(saved) == os.getpid()
    os.kill(saved, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(saved, 0)[1]) == -signal.SIGTERM
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert_error(phaul("restore", "-S", "-D", images), UsageError, "only makes sense with --restore-detached")


def test_left_stopped_after_a_dump(images: Path) -> None:
    with sleeper() as process:
        before = visible_state(process.pid)
        assert phaul("dump", "-s", "-t", process.pid, "-D", images).returncode == 0
        assert state_of(process.pid) == "T"
        assert process.poll() is None
        process.send_signal(signal.SIGCONT)
        assert not difference(before, visible_state(process.pid))


def test_left_stopped_after_a_restore(saved: int, images: Path) -> None:
    assert phaul("restore", "-d", "-s", "-D", images).returncode == 0
    assert state_of(saved) == "T"
    os.kill(saved, signal.SIGCONT)
    deadline = time.monotonic() + 10
    while state_of(saved) != "S":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    end(saved)


def test_stages_of_action_scripts(tmp_path: Path, images: Path, script: Path) -> None:
    with sleeper() as process:
        pid = process.pid
        done = phaul("dump", "-t", pid, "-D", images, "--action-script", script, "--action-script", script)
        assert done.returncode == 0, done.stderr
        process.wait(10)
    assert [line["SCRIPT_ACTION"] for line in told(tmp_path)] == ["pre-dump"] * 2 + ["post-dump"] * 2
    assert {line["INIT_PID"] for line in told(tmp_path)} == {str(pid)}
    (tmp_path / "told").unlink()
    done = phaul("restore", "-d", "-D", images, "--action-script", script, "-W", tmp_path)
    assert done.returncode == 0, done.stderr
    stages = [line["SCRIPT_ACTION"] for line in told(tmp_path)]
    assert stages[0] == "pre-restore"
    assert stages[1:3] == ["setup-namespaces", "post-setup-namespaces"]
    assert stages[3:] == ["post-restore", "pre-resume", "post-resume"]
    assert [line["INIT_PID"] for line in told(tmp_path)] == [None, *[str(pid)] * 5]
    assert {(line["images"], line["cwd"]) for line in told(tmp_path)} == {(str(images), str(tmp_path))}
    end(pid)


@pytest.mark.parametrize("stage", ["pre-dump", "post-dump"])
def test_a_script_that_stops_a_dump(images: Path, script: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setenv("FAIL_AT", stage)
    with sleeper() as process:
        before = visible_state(process.pid)
        done = phaul("dump", "-t", process.pid, "-D", images, "--action-script", script)
        assert_error(done, DumpError, f"action script {script} failed at {stage} (status 1)")
        assert process.poll() is None
        assert not difference(before, visible_state(process.pid))


@pytest.mark.parametrize("stage", ["pre-restore", "setup-namespaces", "post-restore"])
def test_a_script_that_stops_a_restore(
    saved: int, images: Path, script: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setenv("FAIL_AT", stage)
    done = phaul("restore", "-d", "-D", images, "--action-script", script)
    assert_error(done, RestoreError, f"failed at {stage}")
    wait_until_gone(saved)


@pytest.mark.parametrize("stage", ["pre-resume", "post-resume"])
def test_too_late_to_fail(saved: int, images: Path, script: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setenv("FAIL_AT", stage)
    done = phaul("restore", "-d", "-D", images, "--action-script", script)
    assert done.returncode == 0
    assert f"failed at {stage}" in done.stderr
    end(saved)


def test_a_script_that_is_not_there(saved: int, images: Path) -> None:
    done = phaul("restore", "-d", "-D", images, "--action-script", "/no/such/script")
    assert_error(done, RestoreError, "action script /no/such/script at pre-restore: No such file or directory")
