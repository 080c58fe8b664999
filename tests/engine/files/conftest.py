"""The fixtures of the tests of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.files.holding import Holder


@pytest.fixture
def holder() -> Iterator[Holder]:
    found = Holder()
    yield found
    found.stop()
    for copy in found.copies:
        copy.close()


@pytest.fixture
def fdinfo() -> Callable[[int], dict[str, str]]:
    """Position and flags (without close-on-exec) of one of our descriptors."""

    def read(fd: int) -> dict[str, str]:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines[:2])
        return {"pos": found["pos"].strip(), "flags": oct(int(found["flags"], 8) & ~os.O_CLOEXEC)}

    return read
