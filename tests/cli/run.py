"""Runs the command line as users do, and looks at what they see."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from phaul.errors import PhaulError

ROOT = Path(__file__).parents[2]
PHAUL = [sys.executable, "-m", "phaul"]

# Everything that a command may import, before the user is changed: the interpreter may live
# where only root can read.
_AS_NOBODY = """
import os, sys
import phaul.agent, phaul.source, phaul.engine.imagedir, phaul.handshake
import phaul.cli.agent, phaul.cli.check, phaul.cli.dump
import phaul.cli.migrate, phaul.cli.restore
from phaul.cli import main
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(main(sys.argv[1:]))
"""

CLOCK_NANOSLEEP = "230 "

Done = subprocess.CompletedProcess[str]


def phaul(*arguments: object, timeout: float = 60) -> Done:
    """Run `phaul ARGUMENTS` to its end."""
    return subprocess.run(
        [*PHAUL, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def phaul_as_nobody(*arguments: object) -> Done:
    """The same without any privilege."""
    return subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_error(done: Done, error: type[PhaulError], says: str) -> None:
    """One clear line, the advice and the exit code of the class; nothing else."""
    assert done.returncode == error.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("phaul: error: ")]
    assert len(lines) == 1, done.stderr
    assert says in lines[0], lines[0]
    assert done.stderr.endswith(f"{lines[0]}\n{error.help_text}\n")


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps, in a session of its own as a daemon is."""
    process = subprocess.Popen(
        ["sleep", "1000"],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 10
        while not Path(f"/proc/{process.pid}/syscall").read_text().startswith(CLOCK_NANOSLEEP):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def agent(*arguments: str) -> Iterator[str]:
    """A running agent; gives its address, and ends it with SIGTERM."""
    listen = arguments or ("--listen", "tcp://127.0.0.1:0")
    process = subprocess.Popen([*PHAUL, "agent", *listen], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 20)
        assert ready, "the agent says nothing"
        line = process.stdout.readline()
        assert line.startswith("listening on "), line
        yield line.removeprefix("listening on ").strip()
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
