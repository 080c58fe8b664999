"""`phaul migrate` between two hosts: a program moves, or goes on where it was."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul.demo.hosts import Host, HostProcess, TwoHosts
from phaul.errors import RestoreError
from tests.cli.run import PHAUL, ROOT, Done, assert_error
from tests.support.programs import COUNTING, Target
from tests.support.visible import difference, visible_tree

pytestmark = pytest.mark.root

PORT = 7000


@pytest.fixture
def agent(hosts: TwoHosts, tmp_path: Path) -> HostProcess:
    """An agent on the second host."""
    _, destination = hosts
    log = tmp_path / "agent.log"
    process = destination.popen([*PHAUL, "agent", "--listen", address(destination), "--insecure"], stdout=log, cwd=ROOT)
    wait_for(lambda: "listening on" in log.read_text(), log)
    return process


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def address(host: Host) -> str:
    return f"tcp://{host.address}:{PORT}"


def migrate(hosts: TwoHosts, pid: int, *options: str) -> Done:
    source, destination = hosts
    return source.run([*PHAUL, "migrate", str(pid), address(destination), *options], cwd=ROOT)


def start_moving(hosts: TwoHosts, target: Target, directory: Path) -> tuple[HostProcess, Path]:
    """A migration whose pages are on their way, and the file of its stderr."""
    source, destination = hosts
    err = directory / "err"
    command = [*PHAUL, "migrate", str(target.pid), address(destination)]
    moving = source.popen(command, stdout=directory / "out", stderr=err, cwd=ROOT)
    wait_for(lambda: "staged" in err.read_text(), err)
    return moving, err


def test_a_program_moves(hosts: TwoHosts, agent: HostProcess) -> None:
    source, destination = hosts
    with Target.start("beat", "16", "4000", "3", host=source) as target:
        before = visible_tree(target.outer_pid)
        done = migrate(hosts, target.pid, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["pids"] == [target.pid]
        assert report["bytes"] > 16 << 20
        assert report["rate"] > 0
        assert 0 < report["downtime_s"] < report["total_s"]
        assert sum(report["phases"].values()) <= report["total_s"]
        target.moved(destination)
        assert target.pid not in source.pids()
        assert not difference(before, visible_tree(target.outer_pid), ["*pos"])
        assert "TracerPid:\t0\n" in Path(f"/proc/{target.outer_pid}/status").read_text()
        # It needs the agent no more.
        agent.kill(signal.SIGTERM)
        assert agent.wait(20) == 0
        target.finish()


def test_the_report_for_people(hosts: TwoHosts, agent: HostProcess) -> None:
    source, destination = hosts
    with Target.start("regs", host=source) as target:
        done = migrate(hosts, target.pid)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("moved 1 processes in ")
        assert all(line.startswith("phaul: ") for line in done.stderr.splitlines())
        target.moved(destination)
        target.finish()


def test_there_and_back_again(hosts: TwoHosts, agent: HostProcess, tmp_path: Path) -> None:
    source, destination = hosts
    log = tmp_path / "back.log"
    back = source.popen([*PHAUL, "agent", "--listen", address(source), "--insecure"], stdout=log, cwd=ROOT)
    wait_for(lambda: "listening on" in log.read_text(), log)
    with Target.start("threads", host=source) as target:
        for here, there in ((source, destination), (destination, source)):
            done = here.run([*PHAUL, "migrate", str(target.pid), address(there)], cwd=ROOT)
            assert done.returncode == 0, done.stderr
            target.moved(there)
        target.finish()
    back.kill(signal.SIGTERM)
    assert back.wait(20) == 0


def test_another_build_at_the_destination(hosts: TwoHosts, agent: HostProcess, tmp_path: Path) -> None:
    source, destination = hosts
    program = tmp_path / "program"
    shutil.copy(shutil.which("sleep") or "", program)
    process = source.popen([program, "1000"], cwd="/")
    time.sleep(0.2)
    before = visible_tree(process.outer_pid)
    # The same path on the other host has another file.
    other = shutil.which("cat") or ""
    destination.run(["mount", "--bind", other, program], check=True)
    done = migrate(hosts, process.pid)
    assert_error(done, RestoreError, f"destination: {program}: another build")
    assert "frozen" not in done.stderr
    assert not difference(before, visible_tree(process.outer_pid))
    destination.run(["umount", program], check=True)
    assert migrate(hosts, process.pid).returncode == 0


def test_a_file_is_missing_at_the_destination(hosts: TwoHosts, agent: HostProcess, tmp_path: Path) -> None:
    source, destination = hosts
    library = tmp_path / "directory"
    library.mkdir()
    program = library / "program"
    shutil.copy(shutil.which("sleep") or "", program)
    process = source.popen([program, "1000"], cwd="/")
    time.sleep(0.2)
    destination.run(["mount", "-t", "tmpfs", "none", library], check=True)
    done = migrate(hosts, process.pid)
    assert_error(done, RestoreError, f"destination: {program}: No such file or directory")
    assert process.pid in source.pids()


def test_the_agent_dies_while_pages_move(hosts: TwoHosts, agent: HostProcess, tmp_path: Path) -> None:
    source, destination = hosts
    with Target.start("beat", "256", "4000", "3", host=source) as target:
        before = visible_tree(target.outer_pid)
        moving, err = start_moving(hosts, target, tmp_path)
        agent.kill(signal.SIGKILL)
        assert moving.wait(30) == 9, err.read_text()
        assert "Traceback" not in err.read_text()
        assert target.alive
        assert not difference(before, visible_tree(target.outer_pid), ["*pos"])
        assert target.pid not in destination.pids()
        target.finish()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_pages_move(hosts: TwoHosts, agent: HostProcess, tmp_path: Path, number: signal.Signals) -> None:
    source, destination = hosts
    with Target.start("beat", "256", "4000", "3", host=source) as target:
        before = visible_tree(target.outer_pid)
        moving, err = start_moving(hosts, target, tmp_path)
        moving.kill(number)
        assert moving.wait(30) == 130, err.read_text()
        assert err.read_text().endswith("phaul: error: interrupted\n")
        assert "the tree goes on here" in err.read_text()
        assert not difference(before, visible_tree(target.outer_pid), ["*pos"])
        # The destination is free for the next try at once.
        done = migrate(hosts, target.pid)
        assert done.returncode == 0, done.stderr
        target.moved(destination)
        target.finish()


def test_a_threaded_python_program(hosts: TwoHosts, agent: HostProcess, tmp_path: Path) -> None:
    source, destination = hosts
    out = tmp_path / "out"
    program = source.popen([sys.executable, "-c", COUNTING], stdout=out, cwd="/")
    wait_for(lambda: out.read_text().count("\n") > 100, out)
    done = migrate(hosts, program.pid)
    assert done.returncode == 0, done.stderr
    assert program.pid in destination.pids()
    seen = out.read_text().count("\n")
    wait_for(lambda: out.read_text().count("\n") > seen + 100, out)
    lines = out.read_text().split()
    assert [int(line) for line in lines] == list(range(len(lines)))
