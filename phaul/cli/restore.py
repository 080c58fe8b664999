"""`phaul restore -D DIR`: start a process tree from a directory of images."""

from __future__ import annotations

import argparse
import os

from phaul.cli.common import add_images_dir, add_log_options, set_up_log

EPILOG = """\
Without -d, phaul is the parent of the tree, waits for its root and exits as the
root did (128 + N when signal N ended it).

example:
  phaul restore -d -D /tmp/images
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: CRIU's names and meanings."""
    parser.epilog = EPILOG
    add_images_dir(parser)
    parser.add_argument("-d", "--restore-detached", action="store_true", help="do not wait for the tree")
    parser.add_argument("--pidfile", metavar="FILE", help="write the PID of the root there; must not exist")
    parser.add_argument(
        "-j",
        "--shell-job",
        action="store_true",
        help="the tree takes our session and process group for those it had outside",
    )
    add_log_options(parser)


def run(args: argparse.Namespace) -> int:
    """Restore; the exit code."""
    import signal
    from pathlib import Path

    from phaul.engine.imagedir import restore_from_directory
    from phaul.engine.restore import RestoreOptions
    from phaul.engine.thread import EngineThread

    set_up_log(args)
    # As Ctrl-C: what is half built is taken away before we end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = RestoreOptions(shell_job=args.shell_job, detached=args.restore_detached)
    with EngineThread() as engine:
        restore = engine.call(restore_from_directory, Path(args.images_dir), options)
        try:
            if args.pidfile:
                _write_pidfile(args.pidfile, restore.root_pid)
            engine.call(restore.resume)
        except BaseException:
            engine.call(restore.abort)
            raise
    return 0 if args.restore_detached else _wait(restore.root_pid)


def _write_pidfile(path: str, pid: int) -> None:
    from phaul.errors import UsageError

    try:
        with open(path, "x") as file:
            file.write(str(pid))
    except OSError as error:
        raise UsageError(f"cannot write the pidfile {path}: {error.strerror}") from error


def _wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
