"""Addresses that the kernel acts on when a thread ends: clear_child_tid and the robust futex list."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonThread
    from phaul.engine.source import SourceThread

_PR_GET_TID_ADDRESS: Final = 40
_ITSELF: Final = 0


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Fills clear_tid_addr, futex_rla and futex_rla_len."""
    del thread
    address, head, length = (call.space(8) for _ in range(3))
    call.prctl(_PR_GET_TID_ADDRESS, address)
    call.get_robust_list(_ITSELF, head, length)
    yield
    core.thread_info.clear_tid_addr, core.thread_core.futex_rla, core.thread_core.futex_rla_len = (
        struct.unpack("<Q", room.bytes())[0] for room in (address, head, length)
    )


def restore_thread(thread: SkeletonThread, call: Batch, core: core_entry) -> None:
    """Registers both again; by each thread itself."""
    del thread
    call.set_tid_address(core.thread_info.clear_tid_addr)
    if core.thread_core.futex_rla:
        call.set_robust_list(core.thread_core.futex_rla, core.thread_core.futex_rla_len)
