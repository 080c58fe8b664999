"""Resource limits of a process (getrlimit(2)).

Read from /proc/PID/limits: prlimit(2) on a task of another user needs CAP_SYS_RESOURCE, which containers
lack.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.engine.proc import Proc
from phaul.errors import DumpError, ImageError, RestoreError
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess
    from phaul.images.imageset import ImageSet

INFINITY: Final = (1 << 64) - 1

# By RLIMIT_* number (asm-generic/resource.h): our name, and that of /proc/PID/limits.
NAMES: Final = (
    ("RLIMIT_CPU", "Max cpu time"),
    ("RLIMIT_FSIZE", "Max file size"),
    ("RLIMIT_DATA", "Max data size"),
    ("RLIMIT_STACK", "Max stack size"),
    ("RLIMIT_CORE", "Max core file size"),
    ("RLIMIT_RSS", "Max resident set"),
    ("RLIMIT_NPROC", "Max processes"),
    ("RLIMIT_NOFILE", "Max open files"),
    ("RLIMIT_MEMLOCK", "Max locked memory"),
    ("RLIMIT_AS", "Max address space"),
    ("RLIMIT_LOCKS", "Max file locks"),
    ("RLIMIT_SIGPENDING", "Max pending signals"),
    ("RLIMIT_MSGQUEUE", "Max msgqueue size"),
    ("RLIMIT_NICE", "Max nice priority"),
    ("RLIMIT_RTPRIO", "Max realtime priority"),
    ("RLIMIT_RTTIME", "Max realtime timeout"),
)


def limits_of(proc: Proc) -> list[tuple[int, int]]:
    """(soft, hard) by RLIMIT_* number.

    Raises:
        DumpError: /proc/PID/limits has not the limits that we know.
    """
    found = {name: (soft, hard) for name, soft, hard in proc.limits()}
    try:
        return [found[label] for _, label in NAMES]
    except KeyError as error:
        raise DumpError(f"/proc/{proc.pid}/limits has no {error.args[0]!r}") from error


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Fills tc.rlimits."""
    del call, images
    for soft, hard in limits_of(process.proc):
        process.core.tc.rlimits.rlimits.add(cur=soft, max=hard)
    yield


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Sets the limits that are not so already.

    Raises:
        ImageError: limits that we do not know.
        RestoreError: a limit cannot be set (to raise a hard limit needs CAP_SYS_RESOURCE).
    """
    entry = images.one(f"core-{process.pid}", core_entry).tc.rlimits
    if len(entry.rlimits) > len(NAMES):
        raise ImageError(f"core-{process.pid}: {len(entry.rlimits)} resource limits")
    calls = []
    now = limits_of(Proc(process.pid))
    for number, (wanted, current) in enumerate(zip(entry.rlimits, now, strict=False)):
        pair = wanted.cur, wanted.max
        if pair != current:
            address = call.data(struct.pack("<2Q", *pair))
            calls.append((number, pair, current, call.prlimit64(0, number, address, 0, may_fail=True)))
    yield
    for number, pair, current, result in calls:
        if result.value < 0:
            raise RestoreError(
                f"{NAMES[number][0]} of PID {process.pid} cannot be set from {_text(current)} "
                f"to {_text(pair)} (soft:hard): {os.strerror(-result.value)}"
            )


def _text(limits: tuple[int, int]) -> str:
    return ":".join("unlimited" if limit == INFINITY else str(limit) for limit in limits)
