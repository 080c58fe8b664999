"""`phaul restore -D DIR`: start a process tree from a directory of images."""

from __future__ import annotations

import argparse
import os

from phaul.cli import criu_syntax
from phaul.cli.common import prepare

EPILOG = """\
The options are CRIU's: all of them are known, those that phaul does not do yet are
refused by name. Without -d, phaul is the parent of the tree, waits for its root and
exits as the root did (128 + N when signal N ended it).

example:
  phaul restore -d -D /tmp/images
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: CRIU's names and meanings."""
    parser.epilog = EPILOG
    criu_syntax.add_arguments(parser, "restore")


def run(args: argparse.Namespace) -> int:
    """Restore; the exit code."""
    import signal
    from pathlib import Path

    from phaul.cli.action_scripts import ActionScripts
    from phaul.engine.imagedir import restore_from_directory
    from phaul.engine.native import Parent
    from phaul.engine.restore import RestoreOptions
    from phaul.engine.thread import EngineThread
    from phaul.errors import RestoreError, UsageError

    if args.restore_sibling and not args.restore_detached:
        raise UsageError("--restore-sibling only makes sense with --restore-detached")
    work_dir = prepare(args)
    # As Ctrl-C: what is half built is taken away before we end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parent = Parent.CALLERS_PARENT if args.restore_sibling else Parent.INIT if args.restore_detached else Parent.CALLER
    scripts = ActionScripts(args.action_script, args.images_dir, work_dir, RestoreError)
    scripts.run("pre-restore")
    with EngineThread() as engine:
        options = RestoreOptions(
            shell_job=args.shell_job,
            parent=parent,
            tcp_established=args.tcp_established,
            tcp_close=args.tcp_close,
            network_lock=criu_syntax.network_lock(args.network_lock),
        )
        restore = engine.call(restore_from_directory, Path(args.images_dir), options)
        pid = restore.root_pid
        try:
            for stage in ("setup-namespaces", "post-setup-namespaces", "post-restore"):
                scripts.run(stage, pid)
            scripts.notify("pre-resume", pid)
            if args.pidfile:
                _write_pidfile(os.path.join(work_dir, args.pidfile), pid)
            if args.leave_stopped:
                for process in restore.pids:
                    os.kill(process, signal.SIGSTOP)
            engine.call(restore.resume)
        except BaseException:
            engine.call(restore.abort)
            raise
    scripts.notify("post-resume", pid)
    return 0 if args.restore_detached else _wait(pid)


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
