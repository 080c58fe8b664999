"""Seccomp (seccomp(2)): strict mode, and the filters of each thread, oldest first.

Filters stay without effect while we trace (PTRACE_O_SUSPEND_SECCOMP), so what is injected never meets them. They
are put back before the credentials, which may take away the right to install one.
Source: ptrace(2) PTRACE_SECCOMP_GET_FILTER; CRIU's seccomp image, in which filters that threads have in common stand
once, each with the number of the one installed before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.engine import native
from phaul.errors import ImageError
from phaul.images.pb import core_pb2
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.seccomp_pb2 import seccomp_entry, seccomp_filter

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonProcess, SkeletonThread
    from phaul.engine.source import SourceProcess
    from phaul.images.imageset import ImageSet

_IMAGE: Final = "seccomp"
_GET_FILTER, _GET_METADATA = 0x420C, 0x420D
_METADATA: Final = struct.Struct("<2Q")  # index of the filter, its SECCOMP_FILTER_FLAG_*
_INSTRUCTION: Final = 8  # struct sock_filter
_MOST_INSTRUCTIONS: Final = 4096  # BPF_MAXINSNS
_PROGRAM: Final = struct.Struct("<HxxxxxxQ")  # struct sock_fprog
_MODES: Final = (core_pb2.disabled, core_pb2.strict, core_pb2.filter)
_SET_MODE_STRICT, _SET_MODE_FILTER = 0, 1


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Fills seccomp_mode and seccomp_filter of every thread, and the seccomp image."""
    del call
    for thread in process.threads:
        mode = int(thread.proc.status["Seccomp"])
        thread.core.thread_core.seccomp_mode = _MODES[mode]
        if mode == core_pb2.filter:
            thread.core.thread_core.seccomp_filter = _add_chain(_chain(thread.tid), images)
    yield


def _chain(tid: int) -> list[seccomp_filter]:
    """The filters of a stopped thread, oldest first, without their links."""
    found: list[seccomp_filter] = []
    while True:
        try:
            length = native.ptrace(_GET_FILTER, tid, len(found), 0)
        except FileNotFoundError:  # there is no older one
            return found[::-1]
        code = native.buffer(bytes(length * _INSTRUCTION))
        native.ptrace(_GET_FILTER, tid, len(found), code.address)
        metadata = native.buffer(_METADATA.pack(len(found), 0))
        native.ptrace(_GET_METADATA, tid, metadata.size, metadata.address)
        found.append(seccomp_filter(filter=code.content(), flags=_METADATA.unpack(metadata.content())[1]))


def _add_chain(chain: list[seccomp_filter], images: ImageSet) -> int:
    """Add filters that are not there yet, linked; the number of the newest."""
    if not images.records(_IMAGE):
        images.add(_IMAGE, seccomp_entry())
    known = images.one(_IMAGE, seccomp_entry).seccomp_filters
    number: int | None = None
    for item in chain:
        if number is not None:
            item.prev = number
        if item not in known:
            known.append(item)
        number = list(known).index(item)
    assert number is not None
    return number


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> None:
    """Puts mode and filters of every thread back, by each thread itself."""
    del call
    for thread in process.threads:
        core = images.one(f"core-{thread.tid}", core_entry).thread_core
        if core.seccomp_mode == core_pb2.strict:
            thread.batch().run_one("seccomp", _SET_MODE_STRICT, 0, 0)
        elif core.seccomp_mode == core_pb2.filter:
            _install(thread, _linked(core.seccomp_filter, images.one(_IMAGE, seccomp_entry)))


def _linked(newest: int, entry: seccomp_entry) -> list[seccomp_filter]:
    """The filters up to a number, oldest first."""
    found: list[seccomp_filter] = []
    number: int | None = newest
    while number is not None:
        if number >= len(entry.seccomp_filters) or len(found) > len(entry.seccomp_filters):
            raise ImageError(f"seccomp: no chain of filters ends with number {newest}")
        item = entry.seccomp_filters[number]
        if not 0 < len(item.filter) <= _MOST_INSTRUCTIONS * _INSTRUCTION or len(item.filter) % _INSTRUCTION:
            raise ImageError(f"seccomp: filter {number} has {len(item.filter)} bytes")
        found.append(item)
        number = item.prev if item.HasField("prev") else None
    return found[::-1]


def _install(thread: SkeletonThread, chain: list[seccomp_filter]) -> None:
    for item in chain:
        # One batch each: a long chain of long filters would outgrow the scratch.
        call = thread.batch()
        program = call.data(_PROGRAM.pack(len(item.filter) // _INSTRUCTION, call.data(item.filter)))
        call.seccomp(_SET_MODE_FILTER, item.flags, program)
        call.run()
