"""Time goes on over a move, and over the move back, between hosts that were booted hours apart."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from phaul.demo.hosts import Host, HostProcess, TwoHosts
from phaul.demo.run import AGENT_PORT, PHAUL, start_agent

pytestmark = [pytest.mark.root, pytest.mark.slow]

# Writes a line for each step of a clock backwards, or of more than a second; and one a second.
WATCH = """
import sys, time
CLOCKS = time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME
out = open(sys.argv[1], "w", buffering=1)
ticks, before = 0, [time.clock_gettime(clock) for clock in CLOCKS]
while True:
    time.sleep(0.001)
    now = [time.clock_gettime(clock) for clock in CLOCKS]
    steps = [late - early for late, early in zip(now, before)]
    if min(steps) < 0 or max(steps) > 1:
        out.write(f"jumped by {steps}\\n")
    before, ticks = now, ticks + 1
    if ticks % 100 == 0:
        out.write("goes on\\n")
"""


def migrate(program: HostProcess, here: Host, there: Host, directory: Path) -> None:
    directory.mkdir()
    start_agent(there, directory)
    where = f"tcp://{there.address}:{AGENT_PORT}"
    done = here.run([*PHAUL, "migrate", str(program.pid), where, "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pids"] == [program.pid]
    assert program.pid in there.pids()
    assert program.pid not in here.pids()


def lines_after(log: Path, count: int) -> list[str]:
    """All lines, once there are more than `count`."""
    deadline = time.monotonic() + 10
    while len(lines := log.read_text().splitlines() if log.exists() else []) <= count:
        assert time.monotonic() < deadline, "the program does not go on"
        time.sleep(0.01)
    return lines


@pytest.mark.parametrize("offset", [5000, -5000])
def test_there_and_back(tmp_path: Path, offset: int) -> None:
    log = tmp_path / "log"
    with TwoHosts(clock_offset=offset) as (source, destination):
        program = source.popen([sys.executable, "-c", WATCH, log])
        assert set(lines_after(log, 1)) == {"goes on"}
        migrate(program, source, destination, tmp_path / "there")
        seen = lines_after(log, len(log.read_text().splitlines()))
        assert set(seen) == {"goes on"}
        migrate(program, destination, source, tmp_path / "back")
        seen = lines_after(log, len(log.read_text().splitlines()))
        assert set(seen) == {"goes on"}
