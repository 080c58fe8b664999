"""`phaul demo`: move a live program between two hosts made on this machine."""

from __future__ import annotations

import argparse

EPILOG = """\
Makes two hosts of namespaces, starts redis-server in the first, moves it to the
second while a client uses it, and prints the numbers. Nothing of it stays.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--keys",
        metavar="N",
        type=int,
        default=200_000,
        help="how many keys redis holds (default 200000)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit code."""
    from phaul.demo.run import run as run_demo

    return run_demo(keys=args.keys, as_json=args.json)
