"""`phaul demo` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "phaul", "demo"]
KEYS = 5000

pytestmark = [pytest.mark.root, pytest.mark.slow]


def leftovers(directory: Path) -> list[str]:
    """Processes with `directory` in their command line or environment, and what is in it."""
    found = [path.name for path in directory.iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            seen = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue  # ended meanwhile
        if os.fsencode(directory) in seen:
            found.append(seen.replace(b"\0", b" ")[:80].decode(errors="replace"))
    return found


def environment(directory: Path) -> dict[str, str]:
    # Marks whatever the demo starts, and holds its files.
    return {**os.environ, "TMPDIR": str(directory)}


def test_everything_arrives(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--json", "--keys", str(KEYS)],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["keys"] == KEYS
    assert report["passed"]
    assert len(report["checks"]) == 6
    assert all(report["checks"].values())
    assert 0 < report["downtime"] <= report["total"]
    assert 0 < report["downtime_of_client"] <= report["total"]
    # At least the records themselves have gone over, and not much more than redis had.
    assert KEYS * 100 < report["transferred"] < 2 * report["resident"]
    assert leftovers(tmp_path) == []


def test_the_table_is_for_people(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--keys", "100"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in ("total time", "downtime, as the client sees it", "transferred", "rate"):
        assert word in done.stdout
    assert done.stdout.count("yes") == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["two hosts", "filling", "migrating"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, step: str, number: signal.Signals) -> None:
    with subprocess.Popen(
        DEMO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    ) as demo:
        assert demo.stderr is not None
        assert any(step in line for line in demo.stderr)
        demo.send_signal(number)
        assert demo.wait(30) == 130
    assert leftovers(tmp_path) == []


def test_redis_is_missed_by_name(tmp_path: Path) -> None:
    done = subprocess.run(DEMO, capture_output=True, text=True, env={"PATH": str(tmp_path)}, timeout=100, check=False)
    assert done.returncode == 2
    assert "redis-server is not installed" in done.stderr.splitlines()[0]
