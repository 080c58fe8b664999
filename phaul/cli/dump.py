"""`phaul dump -t PID -D DIR`: save a process tree as a directory of images."""

from __future__ import annotations

import argparse

from phaul.cli import criu_syntax
from phaul.cli.common import prepare

EPILOG = """\
The images are CRIU's, and so are the options: all of CRIU's are known, those that
phaul does not do yet are refused by name. The tree is killed once all of it is
saved; with -R or -s, and whenever anything fails, it is not.

example:
  phaul dump -t 1234 -D /tmp/images
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: CRIU's names and meanings."""
    parser.epilog = EPILOG
    criu_syntax.add_arguments(parser, "dump")


def run(args: argparse.Namespace) -> int:
    """Dump; the exit code."""
    import contextlib
    import signal
    from pathlib import Path

    from phaul.cli.action_scripts import ActionScripts
    from phaul.engine.dump import Dump, DumpOptions, preflight
    from phaul.engine.imagedir import dump_to_directory
    from phaul.engine.source import check_process
    from phaul.engine.thread import EngineThread
    from phaul.errors import DumpError, NoSuchProcess, UsageError

    if args.tree is None:
        raise UsageError("a tree is needed: -t/--tree PID")
    work_dir = prepare(args)
    # As Ctrl-C: what has been stopped goes on before we end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = DumpOptions(
        shell_job=args.shell_job,
        tcp_established=args.tcp_established,
        tcp_close=args.tcp_close,
        skip_in_flight=args.skip_in_flight,
        network_lock=criu_syntax.network_lock(args.network_lock),
        link_remap=args.link_remap,
        ghost_limit=criu_syntax.size(args.ghost_limit) if args.ghost_limit else DumpOptions.ghost_limit,
        file_locks=args.file_locks,
        ext_unix_sk=criu_syntax.external_sockets(args.ext_unix_sk),
    )
    scripts = ActionScripts(args.action_script, args.images_dir, work_dir, DumpError)
    with EngineThread() as engine:
        engine.call(check_process, args.tree)
        # Children that come and go while they are looked at are looked at again when they are stopped.
        with contextlib.suppress(NoSuchProcess):
            engine.call(preflight, args.tree, options)
        scripts.run("pre-dump", args.tree)
        dump = Dump(args.tree, options)
        try:
            engine.call(dump.freeze)
            engine.call(dump.collect)
            engine.call(dump_to_directory, dump, Path(args.images_dir))
            scripts.run("post-dump", args.tree)
            if args.leave_stopped:
                engine.call(dump.hold)
        except BaseException:
            engine.call(dump.thaw)
            raise
        if args.leave_stopped:
            engine.call(dump.leave_held)
        else:
            engine.call(dump.thaw if args.leave_running else dump.kill)
    return 0
