"""`phaul agent`: starting and ending."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from tests.cli.run import agent

pytestmark = pytest.mark.root


def test_tcp_on_any_free_port() -> None:
    with agent() as address:
        port = address.removeprefix("tcp://127.0.0.1:")
        assert int(port) > 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/migrations/{'0' * 32}") as reply:
            assert json.load(reply)["state"] == "dropped"


def test_public_address_when_asked_for() -> None:
    with agent("--listen", "tcp://0.0.0.0:0", "--insecure") as address:
        assert address.startswith("tcp://0.0.0.0:")


def test_unix_socket_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    with agent("--listen", f"unix://{path}") as address:
        assert address == f"unix://{path}"
        assert path.is_socket()
    assert not path.exists()
