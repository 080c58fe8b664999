"""`phaul agent --listen ADDRESS`: wait for trees that other hosts move here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from phaul.cli.common import require_root

if TYPE_CHECKING:
    from phaul.transport.endpoint import Endpoint

EPILOG = """\
Prints `listening on ADDRESS` when it takes connections, and runs until SIGINT
or SIGTERM; what is half here by then is dropped and goes on at its source.

Whoever can talk to an agent can start processes as root. So plain text is
refused on addresses that other machines can reach, unless --insecure is given.

example:
  phaul agent --listen tcp://10.0.0.2:7000 --insecure
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        required=True,
        help="tcp://ADDR:PORT (port 0: any free one) or unix:///PATH",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="take plain-text connections from other machines",
    )


def run(args: argparse.Namespace) -> int:
    """Serve; the exit code."""
    import asyncio

    from phaul.transport.endpoint import parse

    endpoint = parse(args.listen)
    require_root("the agent")
    asyncio.run(_serve(endpoint, args.insecure))
    return 0


async def _serve(endpoint: Endpoint, insecure: bool) -> None:
    import asyncio
    import signal

    from phaul.agent import Agent

    agent = Agent(endpoint, insecure)
    serving = asyncio.create_task(agent.serve(_ready))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, serving.cancel)
    await asyncio.wait({serving})
    if not serving.cancelled():
        serving.result()


def _ready(endpoint: Endpoint) -> None:
    print(f"listening on {endpoint}", flush=True)
