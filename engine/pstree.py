"""The shape of a tree: parents, sessions, process groups, and which kernel objects processes share.

Source: CRIU's pstree and core images (task_kobj_ids_entry), kcmp(2), namespaces(7).
"""

from __future__ import annotations

import os
from functools import cmp_to_key
from pathlib import Path
from typing import Final

from phaul.engine import native
from phaul.engine.proc import Proc
from phaul.engine.source import SourceProcess
from phaul.engine.state import zombie
from phaul.errors import CannotMove
from phaul.images.imageset import ImageSet
from phaul.images.pb.core_pb2 import task_kobj_ids_entry
from phaul.images.pb.pstree_pb2 import pstree_entry

# Namespace links of /proc/PID/ns and their field in the ids; all but time must be ours.
_NAMESPACES: Final = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time")
_OBJECTS: Final = {
    "vm_id": (native.KCMP_VM, "its memory"),
    "files_id": (native.KCMP_FILES, "its descriptor table"),
    "fs_id": (native.KCMP_FS, "its working directory"),
    "sighand_id": (native.KCMP_SIGHAND, "its signal handlers"),
}
_SHAREABLE: Final = {"files_id": 0x400, "fs_id": 0x200}  # CLONE_FILES, CLONE_FS
_ORDER: Final = {0: 0, 1: -1, 2: 1}


def check(pids: list[int], shell_job: bool) -> None:
    """Refuse shapes that cannot be rebuilt; looks at /proc only.

    Raises:
        CannotMove: a session or group from outside, or another namespace than ours.
    """
    inside = set(pids)
    for pid in pids:
        proc = Proc(pid)
        group, session = int(proc.stat[5]), int(proc.stat[6])
        if session not in inside and not shell_job:
            raise CannotMove(
                pid,
                "session",
                f"belongs to session {session}, whose leader is not in the tree (start it with setsid, "
                "or use --shell-job)",
            )
        # A leader that has ended leaves its group behind, which then has nobody outside of the tree's session.
        if group not in inside and not shell_job and Path(f"/proc/{group}").exists():
            raise CannotMove(pid, "process group", f"belongs to group {group}, whose leader is not in the tree")
        if zombie.is_zombie(pid):
            continue  # it has left its namespaces
        for name in _NAMESPACES[:-1]:
            try:
                if proc.link(f"ns/{name}") != Proc(os.getpid()).link(f"ns/{name}"):
                    raise CannotMove(pid, f"{name} namespace", "is not that of phaul; run phaul inside of it")
            except FileNotFoundError:
                continue  # the kernel has no such namespaces


def dump(processes: list[SourceProcess], zombies: dict[int, int], images: ImageSet) -> None:
    """Add pstree, and fill in the ids of every process. `zombies`: PID -> PID of the parent.

    Raises:
        CannotMove: two processes share what only threads may.
    """
    for process in processes:
        stat = process.proc.stat
        entry = pstree_entry(
            pid=process.pid,
            ppid=process.parent.pid if process.parent else 0,
            pgid=int(stat[5]),
            sid=int(stat[6]),
            threads=[thread.tid for thread in process.threads],
        )
        images.add("pstree", entry)
    for pid, parent in zombies.items():
        stat = Proc(pid).stat
        images.add("pstree", pstree_entry(pid=pid, ppid=parent, pgid=int(stat[5]), sid=int(stat[6]), threads=[pid]))
    _number_objects(processes)
    _number_namespaces(processes)


def _number_objects(processes: list[SourceProcess]) -> None:
    for process in processes:
        process.ids = task_kobj_ids_entry(vm_id=0, files_id=0, fs_id=0, sighand_id=0)
    for field, (kind, what) in _OBJECTS.items():

        def order(a: SourceProcess, b: SourceProcess, kind: int = kind) -> int:
            return _ORDER[native.syscall("kcmp", a.pid, b.pid, kind, 0, 0)]

        number, before = 0, None
        for process in sorted(processes, key=cmp_to_key(order)):
            number += before is None or order(before, process) != 0
            setattr(process.ids, field, number)
            before = process
        _check_sharing(processes, field, what)


def _check_sharing(processes: list[SourceProcess], field: str, what: str) -> None:
    """Only what a child can share with its parent by clone(2) can be made again: one way in, from above."""
    first: dict[int, SourceProcess] = {}
    for process in processes:
        number = getattr(process.ids, field)
        other = first.setdefault(number, process)
        from_parent = process.parent is not None and getattr(process.parent.ids, field) == number
        if other is not process and not (field in _SHAREABLE and from_parent):
            raise CannotMove(process.pid, "process", f"shares {what} with PID {other.pid} (clone), cannot be moved")


def sharing_flags(parent: task_kobj_ids_entry, child: task_kobj_ids_entry) -> int:
    """The flags of clone(2) that make a child share what it shared with its parent."""
    return sum(flag for field, flag in _SHAREABLE.items() if getattr(parent, field) == getattr(child, field))


def namespace_ids(pid: int, known: dict[bytes, int]) -> dict[str, int]:
    """Ids of a process's namespaces (field name -> id); `known` maps namespace links to ids given so far."""
    found = {}
    for name in _NAMESPACES:
        if os.path.exists(f"/proc/{pid}/ns/{name}"):
            link = Proc(pid).link(f"ns/{name}")
            found[f"{name}_ns_id"] = known.setdefault(link, len(known) + 1)
    return found


def _number_namespaces(processes: list[SourceProcess]) -> None:
    known: dict[bytes, int] = {}
    for process in processes:
        for field, number in namespace_ids(process.pid, known).items():
            setattr(process.ids, field, number)
