"""The memory descriptor: what the kernel keeps of an address space besides its mappings.

Source: prctl(2) PR_SET_MM_MAP, proc(5) stat fields 26 to 28 and 45 to 51. Mappings are in phaul.engine.vmas.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from phaul.engine.batch import Batch
from phaul.images.imageset import ImageSet
from phaul.images.pb.mm_pb2 import mm_entry

if TYPE_CHECKING:
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_SET_MM, PR_SET_MM_MAP = 35, 14
PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42

# A descriptor inside of a struct cannot be a result: it needs a number known before.
EXE_FD = 100

_MM_MAP = struct.Struct("<12QII")  # struct prctl_mm_map (linux/prctl.h)
_STAT = {
    "mm_start_code": 26, "mm_end_code": 27, "mm_start_stack": 28, "mm_start_data": 45, "mm_end_data": 46,
    "mm_start_brk": 47, "mm_arg_start": 48, "mm_arg_end": 49, "mm_env_start": 50, "mm_env_end": 51,
}  # fmt: skip


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Adds mm-PID; its mappings and exe_file_id are filled in by phaul.engine.dump."""
    brk = call.brk(0)
    dumpable = call.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
    no_thp = call.prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0, may_fail=True)
    yield
    auxv = process.proc.auxv()
    entry = mm_entry(
        mm_brk=brk.value,
        exe_file_id=0,
        dumpable=dumpable.value,
        mm_saved_auxv=struct.unpack(f"<{len(auxv) // 8}Q", auxv),
    )
    for name, number in _STAT.items():
        setattr(entry, name, int(process.proc.stat[number]))
    if no_thp.value == 1:
        entry.thp_disabled = True
    images.add(f"mm-{process.pid}", entry)


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> None:
    """Set all fields at once: the address space must be laid out, and nothing map the old executable."""
    entry = images.one(f"mm-{process.pid}", mm_entry)
    auxv = struct.pack(f"<{len(entry.mm_saved_auxv)}Q", *entry.mm_saved_auxv)
    exe = call.openat(-100, process.tree.path_of_file(entry.exe_file_id), os.O_RDONLY | os.O_CLOEXEC)
    call.dup3(exe, EXE_FD, os.O_CLOEXEC)
    fields = (
        entry.mm_start_code, entry.mm_end_code, entry.mm_start_data, entry.mm_end_data,
        entry.mm_start_brk, entry.mm_brk, entry.mm_start_stack, entry.mm_arg_start, entry.mm_arg_end,
        entry.mm_env_start, entry.mm_env_end, call.data(auxv),
    )  # fmt: skip
    call.prctl(PR_SET_MM, PR_SET_MM_MAP, call.data(_MM_MAP.pack(*fields, len(auxv), EXE_FD)), _MM_MAP.size, 0)
    call.close(exe)
    call.close(EXE_FD)
    if entry.thp_disabled:
        call.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def restore_dumpable(process: SkeletonProcess, call: Batch, images: ImageSet) -> None:
    """After the credentials, which reset it. 2 (suid_dumpable) cannot be set, and comes from them by itself."""
    dumpable = images.one(f"mm-{process.pid}", mm_entry).dumpable
    if dumpable in (0, 1):
        call.prctl(PR_SET_DUMPABLE, dumpable, 0, 0, 0)
