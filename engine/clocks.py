"""CLOCK_MONOTONIC and CLOCK_BOOTTIME of a tree, which must never run backwards: time namespaces.

A restored tree's clocks go on from where they stood when it was frozen, however long the new host has been up.
Source: time_namespaces(7), CRIU's timens image (the clocks' values at the dump).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from phaul.engine.proc import Proc
from phaul.errors import RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.timens_pb2 import timens_entry, timespec

CLOCKS: Final = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}
_SECOND: Final = 10**9


def supported() -> bool:
    """Whether this kernel has time namespaces (CONFIG_TIME_NS)."""
    return Path("/proc/self/timens_offsets").exists()


def offsets(pid: int) -> dict[str, int]:
    """Offsets of a process's clocks to the host's, in nanoseconds, by clock name."""
    if not supported():
        return dict.fromkeys(CLOCKS, 0)
    lines = (line.split() for line in Proc(pid).read("timens_offsets").decode().splitlines())
    return {name: int(seconds) * _SECOND + int(rest) for name, seconds, rest in lines}


def read(pid: int) -> dict[str, int]:
    """The clocks as a process sees them now, in nanoseconds."""
    ours, theirs = offsets(os.getpid()), offsets(pid)
    return {name: time.clock_gettime_ns(clock) - ours[name] + theirs[name] for name, clock in CLOCKS.items()}


def dump(pid: int, namespace_id: int, images: ImageSet) -> None:
    """Add timens-ID: the clocks as the tree sees them."""
    now = {name: divmod(value, _SECOND) for name, value in read(pid).items()}
    entry = timens_entry(**{name: timespec(tv_sec=s, tv_nsec=ns) for name, (s, ns) in now.items()})
    images.add(f"timens-{namespace_id}", entry)


def restore_offsets(root_pid: int, images: ImageSet) -> tuple[int, int] | None:
    """Offsets (monotonic, boottime) for the tree's new time namespace; None to stay in ours.

    Raises:
        RestoreError: clocks would run backwards, and this kernel has no time namespaces.
    """
    namespace_id = images.one(f"core-{root_pid}", core_entry).ids.time_ns_id
    name = f"timens-{namespace_id}"
    if name not in images.names():
        return None
    entry = images.one(name, timens_entry)
    saved = {clock: getattr(entry, clock) for clock in CLOCKS}
    behind = {
        clock: value.tv_sec * _SECOND + value.tv_nsec - time.clock_gettime_ns(CLOCKS[clock])
        for clock, value in saved.items()
    }
    if not supported():
        if max(behind.values()) > 0:
            raise RestoreError("the clocks would run backwards: this kernel has no time namespaces")
        return None
    ours = offsets(os.getpid())
    return behind["monotonic"] + ours["monotonic"], behind["boottime"] + ours["boottime"]
