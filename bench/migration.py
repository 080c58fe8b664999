"""The cost of moving a program, by migration and through a directory, next to plain TCP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from phaul.demo.hosts import Host, HostProcess, TwoHosts
from phaul.demo.run import AGENT_PORT, PHAUL, start_agent

_TCP_PORT = 7000
_TCP = Path(__file__).with_name("tcp.py")
_WRITES_PER_SECOND = 1000
_THREADS = 1
_SECONDS = 120.0
_MIB = 1 << 20


@dataclass(frozen=True)
class Move:
    """One migration. Seconds and bytes.

    Attributes:
        total, downtime, transferred, rate: as `phaul migrate --json` reports them.
        gap: the longest time that the program itself did not run.
    """

    total: float
    downtime: float
    transferred: int
    rate: float
    gap: float


def build_beat(directory: Path) -> Path:
    """Compile `tests/programs/beat.c`."""
    source = Path(__file__).resolve().parent.parent / "tests" / "programs" / "beat.c"
    program = directory / "beat"
    subprocess.run(["gcc", "-O2", "-D_GNU_SOURCE", "-pthread", "-o", program, source], check=True)
    return program


def plain_tcp(directory: Path, size: int) -> float:
    """Bytes a second of one TCP connection from host to host, 1 MiB buffers at both ends."""
    with TwoHosts() as (source, destination):
        out = directory / "tcp.json"
        where = [destination.address, str(_TCP_PORT)]
        receiver = destination.popen([sys.executable, "-I", _TCP, "receive", *where], stdout=out)
        _wait_for_listener(destination)
        source.run([sys.executable, "-I", _TCP, "send", *where, str(size)], check=True)
        receiver.wait(_SECONDS)
        seen = json.loads(out.read_text())
    rate: float = seen["bytes"] / seen["seconds"]
    return rate


def migrate(beat: Path, directory: Path, mib: int) -> Move:
    """Move a program with so much memory from one host to another."""
    with TwoHosts() as (source, destination):
        log = directory / f"beat-{mib}"
        program = _start(beat, source, log, mib)
        start_agent(destination, directory)
        where = f"tcp://{destination.address}:{AGENT_PORT}"
        done = source.run([*PHAUL, "migrate", str(program.pid), where, "--json"], timeout=_SECONDS)
        if done.returncode:
            raise SystemExit(f"phaul migrate: {done.stderr}")
        report = json.loads(done.stdout)
        gap = _finish(destination, program.pid, log)
    return Move(
        total=report["total_s"],
        downtime=report["downtime_s"],
        transferred=report["bytes"],
        rate=report["rate"],
        gap=gap,
    )


def dump_and_restore(beat: Path, directory: Path, mib: int) -> tuple[float, float]:
    """Seconds to dump a program with so much memory into a tmpfs and to restore it from there."""
    images = "/dev/shm/images"  # the host's own
    with TwoHosts() as (source, _destination):
        log = directory / f"beat-dump-{mib}"
        program = _start(beat, source, log, mib)
        source.run(["mkdir", images], check=True)
        times = []
        for words in (["dump", "-t", str(program.pid)], ["restore", "-d"]):
            begin = time.monotonic()
            source.run([*PHAUL, *words, "-D", images], timeout=_SECONDS, check=True)
            times.append(time.monotonic() - begin)
        _finish(source, program.pid, log)
    return times[0], times[1]


def _start(beat: Path, host: Host, log: Path, mib: int) -> HostProcess:
    log.unlink(missing_ok=True)  # it appends
    program = host.popen([beat, log, str(mib), str(_WRITES_PER_SECOND), str(_THREADS)])
    _wait_for_line(log, "ready")
    time.sleep(0.2)
    return program


def _finish(host: Host, pid: int, log: Path) -> float:
    # The program's own verdict, and the longest time that it did not run.
    time.sleep(0.2)
    host.run(["kill", "-TERM", str(pid)], check=True)
    verdict = _wait_for_line(log, "PASS", "FAIL")
    gap = re.search(r"max_gap_ms\D*([\d.]+)", verdict)
    if gap is None:
        raise SystemExit(f"beat: {verdict}")
    return float(gap[1]) / 1000


def _wait_for_line(log: Path, *words: str) -> str:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else ():
            if line.startswith(words):
                return line
        time.sleep(0.01)
    raise SystemExit(f"{log.name} says no {' or '.join(words)} after {_SECONDS:.0f} s")


def _wait_for_listener(host: Host) -> None:
    deadline = time.monotonic() + _SECONDS
    row = f":{_TCP_PORT:04X} 00000000:0000 0A"  # LISTEN, proc_pid_net(5)
    while row not in host.run(["cat", "/proc/net/tcp"], check=True).stdout:
        if time.monotonic() > deadline:
            raise SystemExit("the receiver does not listen")
        time.sleep(0.01)
