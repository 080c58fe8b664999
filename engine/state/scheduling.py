"""Scheduling policy, nice value, real-time priority and CPU affinity of a thread (sched(7))."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from phaul.engine.proc import Proc
from phaul.errors import CannotMove, RestoreError
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonThread
    from phaul.engine.source import SourceThread

_POLICIES: Final = {0: "SCHED_OTHER", 1: "SCHED_FIFO", 2: "SCHED_RR", 3: "SCHED_BATCH", 5: "SCHED_IDLE"}
_RESET_ON_FORK: Final = 0x4000_0000  # among the policy in sched_setscheduler(2)
_FLAG_RESET_ON_FORK: Final = 1  # in struct sched_attr

# struct sched_attr of sched_setattr(2): size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES: Final = struct.Struct("<IIQiI3Q")


def preflight(pid: int) -> None:
    """Refuses policies with parameters that the images cannot hold (SCHED_DEADLINE, SCHED_EXT).

    Raises:
        CannotMove: with the thread and its policy.
    """
    for tid in Proc(pid).tids():
        _policy(pid, tid)


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Fills sched_nice, sched_policy, sched_prio and, if it is restricted, cpu_affinity.

    Raises:
        CannotMove: with the thread and its policy.
    """
    del call
    entry = core.thread_core
    entry.sched_policy = _policy(thread.process.pid, thread.tid)
    entry.sched_prio = os.sched_getparam(thread.tid).sched_priority
    entry.sched_nice = os.getpriority(os.PRIO_PROCESS, thread.tid)
    cpus = os.sched_getaffinity(thread.tid)
    if len(cpus) < (os.cpu_count() or 1):
        entry.cpu_affinity = sum(1 << cpu for cpu in cpus).to_bytes(max(cpus) // 8 + 1, "little")
    yield


def restore_thread(thread: SkeletonThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Sets them. Late: a nice thread would take its time for what is still to be done.

    Raises:
        RestoreError: the kernel refuses the policy or priority.
    """
    entry = core.thread_core
    policy = entry.sched_policy & ~_RESET_ON_FORK
    flags = _FLAG_RESET_ON_FORK if entry.sched_policy & _RESET_ON_FORK else 0
    attributes = (_ATTRIBUTES.size, policy, flags, entry.sched_nice, entry.sched_prio, 0, 0, 0)
    # The nice value by itself: sched_setattr takes it for SCHED_OTHER and SCHED_BATCH only.
    results = (
        call.setpriority(os.PRIO_PROCESS, 0, entry.sched_nice, may_fail=True),
        call.sched_setattr(0, call.data(_ATTRIBUTES.pack(*attributes)), 0, may_fail=True),
    )
    yield
    for result in results:
        if result.value < 0:
            name = _POLICIES.get(policy, str(policy))
            raise RestoreError(
                f"thread {thread.tid} cannot get {name}, nice {entry.sched_nice}, priority {entry.sched_prio}: "
                f"{os.strerror(-result.value)}"
            )
    _set_affinity(thread.tid, entry.cpu_affinity)


def _set_affinity(tid: int, mask: bytes) -> None:
    """Those of the CPUs that this host has; all, if it has none of them: better there than not at all."""
    bits = int.from_bytes(mask, "little")
    if cpus := {cpu for cpu in os.sched_getaffinity(0) if bits >> cpu & 1}:
        os.sched_setaffinity(tid, cpus)


def _policy(pid: int, tid: int) -> int:
    policy = os.sched_getscheduler(tid)
    if policy & ~_RESET_ON_FORK not in _POLICIES:
        raise CannotMove(pid, f"scheduling policy {policy} of thread {tid}", "cannot be moved")
    return policy
