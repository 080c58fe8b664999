"""`phaul demo`: a redis server moves between two hosts while a client watches.

Everything is real but the cable: Debian's redis-server in the source host, `phaul agent` in the
destination host, `phaul migrate` between them, and a client that asks both places for a PONG every
half millisecond. What it proves is in `Report.checks`.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from phaul.demo.hosts import Host, HostProcess, TwoHosts
from phaul.demo.redis import Redis
from phaul.errors import PeerError, PhaulError, UsageError

REDIS_PORT = 6379
AGENT_PORT = 7717
# This very phaul, run by this very Python.
PHAUL = [sys.executable, "-m", "phaul"]
_ERROR = "phaul: error: "
_SECONDS_TO_START = 20.0
_SECONDS_TO_SETTLE = 0.2


@dataclass(frozen=True)
class Report:
    """What one run of the demo saw. Times in seconds, rate in bytes per second.

    Attributes:
        keys: keys in the database.
        resident: resident memory of redis before the move, bytes.
        total: from the start of the migration to its end, by `phaul migrate`.
        downtime: frozen at the source to running at the destination, by `phaul migrate`.
        downtime_of_client: last answer of the source to the first of the destination.
        transferred: bytes of the move.
        rate: bytes per second while pages went over.
        checks: what has to hold after the move, and whether it does.
    """

    keys: int
    resident: int
    total: float
    downtime: float
    downtime_of_client: float
    transferred: int
    rate: float
    checks: dict[str, bool]

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(self.checks.values())


def demo(keys: int, say: Callable[[str], None]) -> Report:
    """Make two hosts, move a redis with so many keys, and check it. Leaves nothing behind.

    Args:
        keys: how many keys of some 100 bytes.
        say: is called with a line before each step.

    Raises:
        UsageError: no keys, or redis-server, unshare, nsenter or ip is not installed.
        NotPermitted: not root.
        PhaulError: a step failed; the message is that of the program that failed.
    """
    if keys < 1:
        raise UsageError(f"--keys {keys}: at least one")
    if shutil.which("redis-server") is None:
        raise UsageError("redis-server is not installed (Debian: apt-get install redis-server)")
    with tempfile.TemporaryDirectory(prefix="phaul-demo-") as name, TwoHosts() as hosts:
        directory = Path(name)
        source, destination = hosts
        say(f"two hosts: {source.name} {source.address}, {destination.name} {destination.address}")
        server = start_redis(source, directory)
        say(f"redis-server runs in the source as PID {server.pid}; filling in {keys:,} keys")
        with Redis(source.connect(source.address, REDIS_PORT)) as redis:
            redis.fill(keys)
            before = redis.command("DEBUG", "DIGEST")
            resident = int(redis.info("used_memory_rss"))

        start_agent(destination, directory)
        say(f"agent listens at tcp://{destination.address}:{AGENT_PORT}; migrating")
        client = _start_probe(hosts, directory)
        moved = _migrate(source, server.pid, destination.address)
        if client.wait(_SECONDS_TO_START) != 0:
            raise PhaulError("the client saw no answer of redis at the source")
        seen = json.loads((directory / "probe.json").read_text())

        say("checking")
        with Redis(destination.connect(destination.address, REDIS_PORT)) as redis:
            status = (destination.proc / str(server.pid) / "status").read_text()
            checks = {
                "all data is the same (DEBUG DIGEST)": redis.command("DEBUG", "DIGEST") == before,
                f"{keys:,} keys": redis.command("DBSIZE") == str(keys),
                f"PID is {server.pid} as before": redis.info("process_id") == str(server.pid),
                "nobody traces it": "TracerPid:\t0\n" in status,
                "it is gone from the source": server.pid not in source.pids(),
                "never at two places": seen["last_source"] < seen["first_destination"],
            }
    return Report(
        keys=keys,
        resident=resident,
        total=moved["total_s"],
        downtime=moved["downtime_s"],
        downtime_of_client=seen["first_destination"] - seen["last_source"],
        transferred=int(moved["bytes"]),
        rate=moved["rate"],
        checks=checks,
    )


def run(keys: int = 200_000, as_json: bool = False) -> int:
    """Run the demo and print its report on stdout; the exit code: 0, or 1 when a check failed."""
    # As Ctrl-C: clean up first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if as_json:
        report = demo(keys, say=lambda _line: None)
        print(json.dumps({**asdict(report), "passed": report.passed}))
    else:
        report = demo(keys, say=lambda line: print(line, file=sys.stderr, flush=True))
        _print(report)
    return 0 if report.passed else 1


def start_redis(host: Host, directory: Path) -> HostProcess:
    """Start a redis-server without persistence, as a session leader; returns when it answers."""
    data = directory / "redis"
    data.mkdir()
    options = {
        "port": str(REDIS_PORT),
        "bind": "0.0.0.0 ::",
        "protected-mode": "no",
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "enable-debug-command": "yes",
        "dir": str(data),
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", *_words(value))]
    log = data / "log"
    server = host.popen(["redis-server", *arguments], stdout=log, cwd=data)
    _wait_for_port(host, REDIS_PORT, server, log)
    return server


def start_agent(host: Host, directory: Path) -> HostProcess:
    """Start `phaul agent` on the host's address; returns when it listens."""
    log = directory / "agent.log"
    where = f"tcp://{host.address}:{AGENT_PORT}"
    agent = host.popen([*PHAUL, "agent", "--listen", where, "--insecure"], stdout=log)
    _wait_for_port(host, AGENT_PORT, agent, log)
    return agent


def _migrate(source: Host, pid: int, address: str) -> dict[str, float]:
    where = f"tcp://{address}:{AGENT_PORT}"
    # Clients whose connections are open at that moment connect again.
    done = source.run([*PHAUL, "migrate", str(pid), where, "--tcp-close", "--json"], timeout=300)
    if done.returncode:
        raise PhaulError(f"phaul migrate: {_reason(done.stderr) or f'exit code {done.returncode}'}")
    moved: dict[str, float] = json.loads(done.stdout)
    return moved


def _start_probe(hosts: TwoHosts, directory: Path) -> HostProcess:
    source, destination = hosts
    program = Path(__file__).with_name("probe.py")
    client = source.popen(
        [sys.executable, "-I", program, source.address, destination.address, str(REDIS_PORT)],
        stdout=directory / "probe.json",
        stderr="/dev/null",
    )
    time.sleep(_SECONDS_TO_SETTLE)
    return client


def _words(value: str) -> list[str]:
    # redis takes the words of a value as arguments of their own, and an empty one as "".
    return value.split() or [""]


def _wait_for_port(host: Host, port: int, process: HostProcess, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while process.returncode is None and time.monotonic() < deadline:
        try:
            host.connect(host.address, port).close()
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise PeerError(f"nothing listens at port {port} of {host.name}: {_reason(log.read_text())}")


def _reason(log: str) -> str:
    # The one line of a phaul that failed, or the last line of anything else.
    lines = log.strip().splitlines() or [""]
    errors = [line for line in lines if line.startswith(_ERROR)]
    return errors[0].removeprefix(_ERROR) if errors else lines[-1]


def _print(report: Report) -> None:
    # Imported here: a plain `--json` run needs none of it.
    from rich.console import Console
    from rich.table import Table

    table = Table(title="redis-server moved between two hosts", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in (
        ("keys", f"{report.keys:,}"),
        ("resident memory", f"{report.resident / 1e6:,.1f} MB"),
        ("total time", f"{report.total * 1e3:,.1f} ms"),
        ("downtime, as the client sees it", f"{report.downtime_of_client * 1e3:,.1f} ms"),
        ("downtime, as phaul sees it", f"{report.downtime * 1e3:,.1f} ms"),
        ("transferred", f"{report.transferred / 1e6:,.1f} MB"),
        ("rate", f"{report.rate / 1e6:,.1f} MB/s"),
    ):
        table.add_row(name, value)
    table.add_section()
    for name, holds in report.checks.items():
        table.add_row(name, "[green]yes[/green]" if holds else "[red]NO[/red]")
    Console().print(table)
