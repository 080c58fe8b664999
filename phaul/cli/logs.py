"""-o FILE and -v LEVEL, with CRIU's levels."""

from __future__ import annotations

import argparse
import logging

from phaul.errors import UsageError

# CRIU: 0 only messages, 1 errors, 2 warnings, 3 information, 4 debugging.
LEVELS = (
    logging.CRITICAL + 1,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.DEBUG,
)


def set_up(args: argparse.Namespace) -> None:
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
