"""What several commands share: options that mean the same everywhere, and the checks before any work."""

from __future__ import annotations

import argparse
import logging
import os

from phaul.errors import NotPermitted, UsageError

# CRIU: 0 only messages, 1 errors, 2 warnings, 3 information, 4 debugging.
LEVELS = (
    logging.CRITICAL + 1,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.DEBUG,
)


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
        help="the tree may belong to a session or a terminal from outside",
    )
    parser.add_argument(
        "--tcp-close",
        action="store_true",
        help="established TCP connections come back closed",
    )


def add_images_dir(parser: argparse.ArgumentParser) -> None:
    """-D, the same for dump and restore."""
    parser.add_argument("-D", "--images-dir", metavar="DIR", default=".", help="where the images are (default .)")


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """-o and -v, the same for dump and restore."""
    parser.add_argument("-o", "--log-file", metavar="FILE", help="write the log there")
    parser.add_argument(
        "-v",
        dest="verbosity",
        metavar="LEVEL",
        type=int,
        nargs="?",
        const=4,
        default=2,
        help="how much is logged: 0 nothing, 1 errors, 2 warnings, 3 information, 4 all",
    )


def set_up_log(args: argparse.Namespace) -> None:
    """Apply -v, and send the log to the file of -o.

    Raises:
        UsageError: the file cannot be written.
    """
    root = logging.getLogger()
    if not args.debug:
        root.setLevel(LEVELS[max(0, min(args.verbosity, len(LEVELS) - 1))])
    if args.log_file:
        try:
            handler = logging.FileHandler(args.log_file, mode="w")
        except OSError as error:
            raise UsageError(f"cannot write the log to {args.log_file}: {error.strerror}") from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        root.handlers = [handler]
