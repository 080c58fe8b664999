"""What several commands share: options that mean the same everywhere, and the checks before any work."""

from __future__ import annotations

import argparse
import logging
import os

from phaul.cli.criu_syntax import level, size
from phaul.errors import NotPermitted, UsageError

# CRIU: 0 only messages, 1 errors, 2 warnings, 3 information, 4 debugging.
LEVELS = (
    logging.CRITICAL + 1,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.DEBUG,
)
DEFAULT_LEVEL = 2


def require_root(what: str) -> None:
    """End at once where nothing could work.

    Raises:
        NotPermitted: we are not root.
    """
    if os.geteuid() != 0:
        raise NotPermitted(f"{what} must run as root")


def add_tree_options(parser: argparse.ArgumentParser) -> None:
    """Options about what a tree may have, the same wherever one is read."""
    parser.add_argument(
        "-j",
        "--shell-job",
        action="store_true",
        help="the tree may belong to a session or process group from outside",
    )
    parser.add_argument(
        "--tcp-established",
        action="store_true",
        help="established TCP connections are moved, too",
    )
    parser.add_argument(
        "--tcp-close",
        action="store_true",
        help="established TCP connections come back closed",
    )
    parser.add_argument(
        "--file-locks",
        action="store_true",
        help="locks and leases on files are moved, too",
    )
    parser.add_argument(
        "--link-remap",
        action="store_true",
        help="deleted files that have other hard links get one more for the journey",
    )
    parser.add_argument(
        "--ext-unix-sk",
        action="store_true",
        help="datagram sockets may be connected to a name outside the tree, which the destination must have",
    )
    parser.add_argument(
        "--ghost-limit",
        metavar="SIZE",
        type=size,
        default=1 << 20,
        help="largest deleted file that is taken along, on disk (default 1M)",
    )


def set_up_log(args: argparse.Namespace, directory: str) -> None:
    """Apply --verbosity, and send the log to the file of --log-file.

    Args:
        directory: where a relative name lies.

    Raises:
        UsageError: the file cannot be written.
    """
    root = logging.getLogger()
    if not args.debug:
        root.setLevel(LEVELS[min(level(args.verbosity, DEFAULT_LEVEL), len(LEVELS) - 1)])
    if args.log_file:
        path = os.path.join(directory, args.log_file)
        try:
            handler = logging.FileHandler(path, mode="w")
        except OSError as error:
            raise UsageError(f"cannot write the log to {path}: {error.strerror}") from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        root.handlers = [handler]


def prepare(args: argparse.Namespace) -> str:
    """What comes before any work, as with CRIU: --close, then the log. Returns the working directory."""
    for fd in args.close or []:
        try:
            os.close(fd)
        except OSError as error:
            raise UsageError(f"cannot close descriptor {fd}: {error.strerror}") from error
    work_dir = args.work_dir or args.images_dir
    set_up_log(args, work_dir)
    return str(work_dir)
