"""The signal that a thread gets when its parent dies (PR_SET_PDEATHSIG of prctl(2))."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonThread
    from phaul.engine.source import SourceThread

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_PDEATHSIG: Final = 2


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Fills pdeath_sig if there is one."""
    del thread
    room = call.space(4)
    call.prctl(_PR_GET_PDEATHSIG, room)
    yield
    (signal,) = struct.unpack("<i", room.bytes())
    if signal:
        core.thread_core.pdeath_sig = signal


def restore_thread(thread: SkeletonThread, call: Batch, core: core_entry) -> None:
    """Sets it. After the credentials: a change of those clears it."""
    del thread
    if core.thread_core.pdeath_sig:
        call.prctl(_PR_SET_PDEATHSIG, core.thread_core.pdeath_sig, 0, 0, 0)
