"""The shell of the command line: help, wrong usage, and how fast it is."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import phaul as package
from phaul.cli import COMMANDS, EXIT_INTERRUPTED, EXIT_UNFORESEEN, main
from phaul.errors import UsageError
from tests.cli.run import PHAUL, ROOT, assert_error, phaul


def test_help_starts_at_once() -> None:
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        done = subprocess.run([*PHAUL, "--help"], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - begin)
        assert b"migrate" in done.stdout
    # The best of some: other load must not decide, and cannot make it faster.
    assert min(seconds) < 0.2


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_nothing_heavy(command: str | None) -> None:
    arguments = [*([command] if command else []), "--help"]
    code = (
        "import sys\nfrom phaul.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'aiohttp', 'google.protobuf', 'xxhash', 'cffi', 'phaul.engine.native'}\n"
        "sys.exit(f'imported: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: phaul")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_tells_its_options(command: str) -> None:
    done = phaul(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: phaul {command}")
    assert COMMANDS[command] in done.stdout.replace("\n", " ").lower()


def test_version() -> None:
    assert phaul("--version").stdout == f"{package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["migrate"], "PID, DEST"),
        (["migrate", "1"], "DEST"),
        (["migrate", "one", "tcp://h:1"], "invalid int value: 'one'"),
        (["migrate", "1", "h"], "'h' is not an address (supported: tcp://HOST:PORT, unix:///PATH)"),
        (["migrate", "1", "ssh://h"], "unknown scheme 'ssh'"),
        (["migrate", "1", "tcp://h:1", "--wings"], "unrecognized arguments: --wings"),
        (["migrate", "1", "tcp://h:1", "--connect-timeout", "x"], "invalid number of seconds"),
        (["migrate", "1", "tcp://h:1", "--connect-timeout", "-1"], "invalid number of seconds"),
        (["agent"], "--listen"),
        (["dump", "-D", "/tmp"], "-t/--tree"),
        (["dump", "-t", "1", "-D", "/tmp", "-o", "/no/such/file"], "cannot write the log"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str) -> None:
    assert_error(phaul(*arguments), UsageError, says)


def test_a_mistake_of_ours_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("phaul.cli.check.run", run)
    assert main(["check"]) == EXIT_UNFORESEEN
    shown = capsys.readouterr().err
    assert shown.startswith("phaul: error: unforeseen ZeroDivisionError: oh\n")
    assert "Traceback" not in shown
    assert main(["check", "--debug"]) == EXIT_UNFORESEEN
    assert "Traceback" in capsys.readouterr().err


def test_exit_codes_without_a_class_are_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    assert f"`{EXIT_INTERRUPTED}` is Ctrl-C" in text
    assert f"`{EXIT_UNFORESEEN}` is a mistake in phaul" in text
