"""`phaul dump -t PID -D DIR`: save a process tree as a directory of images."""

from __future__ import annotations

import argparse

from phaul.cli.common import add_images_dir, add_log_options, add_tree_options, set_up_log

EPILOG = """\
The images are CRIU's. The tree is killed once all of it is saved; with -R, and
whenever anything fails, it goes on.

example:
  phaul dump -t 1234 -D /tmp/images
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: CRIU's names and meanings."""
    parser.epilog = EPILOG
    parser.add_argument("-t", "--tree", metavar="PID", type=int, required=True, help="root of the tree")
    add_images_dir(parser)
    parser.add_argument("-R", "--leave-running", action="store_true", help="let the tree go on afterwards")
    add_tree_options(parser)
    add_log_options(parser)


def run(args: argparse.Namespace) -> int:
    """Dump; the exit code."""
    import signal
    from pathlib import Path

    from phaul.engine.dump import Dump, DumpOptions, preflight
    from phaul.engine.imagedir import dump_to_directory
    from phaul.engine.thread import EngineThread

    set_up_log(args)
    # As Ctrl-C: what has been stopped goes on before we end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = DumpOptions(shell_job=args.shell_job, tcp_close=args.tcp_close)
    with EngineThread() as engine:
        engine.call(preflight, args.tree, options)
        dump = Dump(args.tree, options)
        try:
            engine.call(dump.freeze)
            engine.call(dump.collect)
            engine.call(dump_to_directory, dump, Path(args.images_dir))
        except BaseException:
            engine.call(dump.thaw)
            raise
        engine.call(dump.thaw if args.leave_running else dump.kill)
    return 0
