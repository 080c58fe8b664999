"""Measures phaul on this machine and prints the numbers, with the bar where there is one."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench import batches, migration
from phaul.demo.run import PHAUL

GIB = 1 << 30
CALLS = 2000
RUNS = 5


def main() -> None:
    """Run everything, quickest first; about a minute."""
    if os.geteuid() != 0:
        raise SystemExit("the benchmarks need root")
    start = statistics.median(_help_time() for _ in range(RUNS))
    _line("phaul --help", f"{start * 1e3:.0f} ms", "200 ms at most")

    together, single = batches.measure(CALLS)
    _line(f"{CALLS} system calls in one batch", f"{together * 1e3:.1f} ms")
    _line(f"{CALLS} system calls one at a time", f"{single * 1e3:.1f} ms", f"{single / together:.0f} times")

    with tempfile.TemporaryDirectory(prefix="phaul-bench-") as name:
        directory = Path(name)
        beat = migration.build_beat(directory)
        _downtime([migration.migrate(beat, directory, 64) for _ in range(RUNS)], 64)
        moves, plain = [], []
        for _ in range(RUNS):  # in turn: whatever else the machine does hits both
            moves.append(migration.migrate(beat, directory, 1024))
            plain.append(migration.plain_tcp(directory, GIB))
        _downtime(moves, 1024)
        _throughput(moves, plain)
        dumped, restored = migration.dump_and_restore(beat, directory, 1024)
        _line("dump of 1 GiB into tmpfs", f"{dumped:.2f} s")
        _line("restore of 1 GiB from tmpfs", f"{restored:.2f} s")


def _downtime(moves: list[migration.Move], mib: int) -> None:
    typical = sorted(moves, key=lambda move: move.downtime)[len(moves) // 2]
    note = f"the program saw {typical.gap * 1e3:.1f} ms"
    _line(f"downtime with {mib} MiB", f"{typical.downtime * 1e3:.1f} ms", note)


def _throughput(moves: list[migration.Move], plain: list[float]) -> None:
    tcp = statistics.median(plain)
    pages = statistics.median(move.rate for move in moves)
    whole = statistics.median(move.transferred / move.total for move in moves)
    _line("plain TCP between the two hosts", f"{tcp / 1e6:.0f} MB/s")
    _line("1 GiB: pages", f"{pages / 1e6:.0f} MB/s", f"{pages / tcp:.2f} of plain TCP; 0.50 at least")
    _line("1 GiB: whole migration", f"{whole / 1e6:.0f} MB/s", f"{whole / tcp:.2f} of plain TCP, all phases counted")


def _help_time() -> float:
    begin = time.perf_counter()
    subprocess.run([*PHAUL, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def _line(what: str, value: str, note: str = "") -> None:
    print(f"{what:<36}{value:>14}   {note}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
