"""Seccomp (seccomp(2)): refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from phaul.engine.proc import Proc
from phaul.errors import CannotMove
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.source import SourceThread


def preflight(pid: int) -> None:
    """Refuses processes with a seccomp mode or filter.

    Raises:
        CannotMove: with the thread that has one.
    """
    for tid in Proc(pid).tids():
        _refuse(Proc(pid, tid))


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """As `preflight`, with all threads stopped.

    Raises:
        CannotMove: with the thread that has one.
    """
    del call, core
    _refuse(thread.proc)
    yield


def _refuse(thread: Proc) -> None:
    mode = int(thread.status["Seccomp"])
    if mode:
        name = {1: "strict mode", 2: "filter"}.get(mode, f"mode {mode}")
        raise CannotMove(thread.pid, f"seccomp {name} of thread {thread.tid}", "cannot be moved")
