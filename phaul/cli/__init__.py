"""The command line: `phaul COMMAND ...`, one module a command.

A command module has `add_arguments(parser)` and `run(args) -> int`. Only the module of the
command that is called is imported, and it imports what it needs when it runs: help and usage
errors appear at once.

Results go to stdout, everything else to stderr. An error is one line, then a paragraph of
advice, then the exit code of its class (docs/errors.md); `--debug` adds the traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

import phaul
from phaul.cli import criu_syntax
from phaul.errors import PhaulError, UsageError

# Name -> what `phaul --help` says of it.
COMMANDS = {
    "migrate": "move a running process tree to another host",
    "agent": "wait for trees that other hosts move here",
    "dump": "save a process tree as a directory of images",
    "restore": "start a process tree from a directory of images",
    "check": "show what this kernel can do",
    "demo": "move a live program between two hosts made on this machine",
}

# Those that also CRIU has: they take its options in its syntax.
CRIU_COMMANDS = ("dump", "restore", "check")

# As a shell reports a program that was ended by SIGINT.
EXIT_INTERRUPTED = 130
EXIT_UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error is reported."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} (usage: {' '.join(self.format_usage().split()[1:])})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments
    try:
        args = _parse(arguments)
        logging.basicConfig(
            level=logging.DEBUG if args.debug else logging.INFO,
            format="phaul: %(message)s",
            stream=sys.stderr,
        )
        return int(args.run(args))
    except PhaulError as error:
        _complain(str(error), error.help_text, debug)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        _complain("interrupted", "", debug)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Nobody reads the result any more; the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PhaulError.exit_code
    except Exception as error:
        _complain(
            f"unforeseen {type(error).__name__}: {error}",
            "This is a mistake in phaul: please report it with the output of --debug.",
            debug,
        )
        return EXIT_UNFORESEEN


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="phaul", description=phaul.__doc__, allow_abbrev=False)
    parser.add_argument("-V", "--version", action="version", version=phaul.__version__)
    parser.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if name == wanted:
            module = _load(name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            if name in CRIU_COMMANDS:
                place = arguments.index(name) + 1
                arguments = arguments[:place] + criu_syntax.canonical(name, arguments[place:])
    return parser.parse_args(arguments)


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"phaul.cli.{name}")


def _complain(line: str, advice: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if any(isinstance(handler, logging.FileHandler) for handler in logging.getLogger().handlers):
        logging.error("Error: %s", line)
    print(f"phaul: error: {' '.join(line.split())}", file=sys.stderr)
    if advice:
        print(advice, file=sys.stderr)
