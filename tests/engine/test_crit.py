"""Debian's crit reads every metadata image that phaul writes: an independent reader of the format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.engine.thread import EngineThread
from phaul.engine.vmas import Status
from tests.engine.test_dump_restore import ALL, dump_tree
from tests.images.crit_oracle import crit_decode
from tests.support.programs import OPTIONS, Target

pytestmark = pytest.mark.root

# In every set, whatever the program is.
ALWAYS = {"inventory", "pstree", "files"}


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineThread]:
    with EngineThread() as thread:
        yield thread


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_crit_reads_it(case: tuple[str, ...], engine: EngineThread, tmp_path: Path) -> None:
    with Target.start(*case) as target:
        time.sleep(0.1)
        engine.call(dump_tree, target.pid, tmp_path, OPTIONS.get(case[0]), leave_running=True)
        target.finish()
    images = {path.stem: path for path in tmp_path.glob("*.img") if not path.name.startswith("pages-")}
    assert images.keys() >= ALWAYS
    for name, path in images.items():
        entries = crit_decode(path)
        assert entries, name
    (tree, *_), (mm,) = crit_decode(images["pstree"]), crit_decode(images[f"mm-{target.pid}"])
    assert (tree["pid"], tree["threads"][0]) == (target.pid, target.pid)
    assert any(vma["status"] & Status.VDSO for vma in mm["vmas"])
    (core,) = crit_decode(images[f"core-{target.pid}"])
    assert core["mtype"] == "X86_64"
    assert core["tc"]["comm"]
    assert len(core["tc"]["sigactions"]) == 62
