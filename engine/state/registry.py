"""Which kinds of state there are, and in which order they are put back.

A module of `phaul.engine.state` has any of these functions, found by name:

    preflight(pid)                                  refuses what cannot be moved, from /proc alone
    dump_process(process, call, images)             generators: add calls, yield once while the batch runs,
    dump_thread(thread, call, core)                 then fill in the images
    restore_process(process, call, images)          add calls; a generator may look at their results after
    restore_thread(thread, call, core)              the one yield, or end before it

What concerns a whole process runs in its leader, before any thread runs what concerns itself. A restore
function must be called when those before it have added their calls. At dump the order does not matter.

The address space (`mm`) and what needs files (`fs`, `fds`) have steps of their own in phaul.engine.dump and
phaul.engine.restore.
"""

from __future__ import annotations

from types import ModuleType
from typing import Final

from phaul.engine.state import (
    credentials,
    death_signal,
    fs,
    limits,
    membarrier,
    names,
    registers,
    rseq,
    scheduling,
    seccomp,
    signals,
    task,
    thread_area,
    timers,
)

PROCESS: Final[tuple[ModuleType, ...]] = (
    task,
    membarrier,
    # Before any thread's batch: setting an action can discard the signal that ends a batch. Before the
    # timers: what they send must find its action.
    signals,
    timers,
    # Before the credentials of any thread, which may forbid to install filters.
    seccomp,
    # After all that they could forbid (descriptors, mappings, queued signals, timers), but with privileges.
    limits,
)

THREAD: Final[tuple[ModuleType, ...]] = (
    registers,
    thread_area,
    rseq,
    names,
    signals,
    # Late, as it can make the thread slow; a higher priority needs privileges.
    scheduling,
    # After all that needs privileges.
    credentials,
    # A change of credentials clears it.
    death_signal,
)


def preflight(pid: int) -> None:
    """Refuses a running process if a part of its state is of a kind that cannot be moved.

    Raises:
        CannotMove: with the name of that state.
        NoSuchProcess: the process has gone.
    """
    for module in dict.fromkeys((*PROCESS, *THREAD, fs)):
        if hasattr(module, "preflight"):
            module.preflight(pid)
