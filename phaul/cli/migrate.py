"""`phaul migrate PID DEST`: move a running process tree to another host."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from phaul.cli.common import add_tree_options, require_root

if TYPE_CHECKING:
    from phaul.source import MigrateOptions, Report
    from phaul.transport.endpoint import Endpoint

EPILOG = """\
DEST is the agent at the destination: tcp://HOST:PORT or unix:///PATH.

The tree goes on here as if nothing had happened when anything fails before the
destination has all of it, also on Ctrl-C.

example:
  phaul migrate 1234 tcp://other-host:7000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EPILOG
    parser.add_argument("pid", metavar="PID", type=int, help="root of the tree")
    parser.add_argument("destination", metavar="DEST", help="address of the agent there")
    add_tree_options(parser)
    parser.add_argument(
        "--connect-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="how long the destination may take to answer (default 10)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Migrate; the exit code."""
    import asyncio

    from phaul.source import MigrateOptions
    from phaul.transport.endpoint import parse

    options = MigrateOptions(
        shell_job=args.shell_job,
        tcp_established=args.tcp_established,
        tcp_close=args.tcp_close,
        file_locks=args.file_locks,
        link_remap=args.link_remap,
        ghost_limit=args.ghost_limit,
        ext_unix_sk=args.ext_unix_sk,
        connect_timeout=args.connect_timeout,
    )
    endpoint = parse(args.destination)
    require_root("phaul migrate")
    report = asyncio.run(_migrate(args.pid, endpoint, options))
    if args.json:
        print(report.to_json())
    else:
        print(
            f"moved {len(report.pids)} processes in {report.total_s:.3f} s, "
            f"downtime {report.downtime_s * 1e3:.1f} ms, "
            f"{report.bytes / (1 << 20):.1f} MiB at {report.rate / 1e6:.0f} MB/s"
        )
    return 0


async def _migrate(pid: int, endpoint: Endpoint, options: MigrateOptions) -> Report:
    import asyncio
    import signal

    from phaul.source import Source

    source = Source(pid, endpoint, options, progress)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, source.interrupt)
    return await source.migrate()


def progress(line: str) -> None:
    """A line for people."""
    print(f"phaul: {line}", file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


_seconds.__name__ = "number of seconds"  # argparse names the type in its message
