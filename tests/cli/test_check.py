"""`phaul check`: what it says, and what it means."""

from __future__ import annotations

import json

import pytest

from phaul import handshake
from phaul.cli import main
from tests.cli.run import phaul

pytestmark = pytest.mark.root


def test_this_kernel_is_enough() -> None:
    done = phaul("check", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["enough"] is True
    assert report["features"]["clone3_set_tid"] is True
    lines = phaul("check").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(report["features"])
    assert "clone3_set_tid           yes needed" in lines


def test_a_kernel_that_lacks_something(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(handshake, "SOURCE_NEEDS", ("time_travel",))
    assert main(["check"]) == 1
    assert "lacks time_travel." in capsys.readouterr().out
    assert main(["check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["enough"] is False
