"""Registrations for membarrier(2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess
    from phaul.images.imageset import ImageSet

_GET_REGISTRATIONS: Final = 1 << 9
# PRIVATE_EXPEDITED, its SYNC_CORE and its RSEQ variant; the command that registers is the next bit.
_PRIVATE: Final = (1 << 3, 1 << 5, 1 << 7)


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Fills tc.membarrier_registration_mask if there is any registration."""
    del images
    if _kernel_tells():
        registrations = call.membarrier(_GET_REGISTRATIONS, 0, 0)
        yield
        mask = registrations.value
    else:
        # Before Linux 6.3: the barrier itself works only where it is registered. That leaves out
        # GLOBAL_EXPEDITED, which tells nobody.
        barriers = [(command, call.membarrier(command, 0, 0, may_fail=True)) for command in _PRIVATE]
        yield
        mask = sum(command << 1 for command, result in barriers if result.value == 0)
    if mask:
        process.core.tc.membarrier_registration_mask = mask


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> None:
    """Registers again."""
    mask = images.one(f"core-{process.pid}", core_entry).tc.membarrier_registration_mask
    for bit in range(mask.bit_length()):
        if mask >> bit & 1:
            call.membarrier(1 << bit, 0, 0)


@cache
def _kernel_tells() -> bool:
    try:
        native.syscall("membarrier", _GET_REGISTRATIONS, 0, 0)
    except OSError:
        return False
    return True
