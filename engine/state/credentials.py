"""Credentials of a thread: ids, groups, capability sets, securebits, no_new_privs.

Source: credentials(7), capabilities(7).

Each thread sets its own, as the last thing it does with privileges. Labels of security modules are not moved.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phaul.engine.proc import Proc
from phaul.errors import CannotMove, ImageError, NoSuchProcess, RestoreError
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonThread
    from phaul.engine.source import SourceThread

# prctl(2)
_PR_CAPBSET_DROP: Final = 24
_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_SECBIT_NO_SETUID_FIXUP: Final = 1 << 2

_CAP_HEADER: Final = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, the caller
_WORDS: Final = 2
_KEEP: Final = -1

# linux/capability.h, by number: for messages.
CAPABILITIES: Final = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
    "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT "
    "SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE "
    "AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ "
    "PERFMON BPF CHECKPOINT_RESTORE"
).split()


def preflight(pid: int) -> None:
    """Refuses processes of another user namespace: their ids mean something else.

    Raises:
        CannotMove: the user namespace is not ours.
    """
    try:
        theirs = os.stat(f"/proc/{pid}/ns/user")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"PID {pid}: no such process") from error
    ours = os.stat("/proc/self/ns/user")
    if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
        raise CannotMove(pid, "user namespace", "is not that of phaul, cannot be moved")


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Fills creds.

    Raises:
        CannotMove: another user namespace.
    """
    if thread.tid == thread.process.pid:  # one with several threads cannot have got another one
        preflight(thread.process.pid)
    securebits = call.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0)
    yield
    status = thread.proc.status
    creds = core.thread_core.creds
    creds.uid, creds.euid, creds.suid, creds.fsuid = map(int, status["Uid"].split())
    creds.gid, creds.egid, creds.sgid, creds.fsgid = map(int, status["Gid"].split())
    creds.groups.extend(map(int, status["Groups"].split()))
    for name, words in (
        ("CapInh", creds.cap_inh),
        ("CapPrm", creds.cap_prm),
        ("CapEff", creds.cap_eff),
        ("CapBnd", creds.cap_bnd),
        ("CapAmb", creds.cap_amb),
    ):
        mask = int(status[name], 16)
        words.extend((mask & 0xFFFF_FFFF, mask >> 32))
    creds.secbits = securebits.value
    creds.no_new_privs = int(status["NoNewPrivs"])


def restore_thread(thread: SkeletonThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Makes the thread what it was, from all privileges that it got from us.

    The bounding set only loses what the source's had not: what this host withholds stays withheld.

    Raises:
        ImageError: a capability set of the wrong size.
        RestoreError: it needs a capability that phaul does not have here.
    """
    if not core.thread_core.HasField("creds"):
        raise ImageError(f"core-{thread.tid}: credentials are missing")
    creds = core.thread_core.creds
    inheritable, permitted, effective, bounding, ambient = (
        _mask(words, thread.tid)
        for words in (creds.cap_inh, creds.cap_prm, creds.cap_eff, creds.cap_bnd, creds.cap_amb)
    )
    have = int(Proc(thread.process.pid, thread.tid).status["CapPrm"], 16)
    if missing := permitted & ~have:
        raise RestoreError(f"thread {thread.tid} needs {_names(missing)}, which phaul has not here")

    call.setgroups(len(creds.groups), call.data(struct.pack(f"<{len(creds.groups)}I", *creds.groups)))
    # Without this bit a change of ids would take the capabilities away.
    call.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    call.setresgid(creds.gid, creds.egid, creds.sgid)
    call.setresuid(creds.uid, creds.euid, creds.suid)
    call.setfsgid(creds.fsgid)
    call.setfsuid(creds.fsuid)
    # These two have no errors: only a second call tells what came of the first.
    fsgid, fsuid = call.setfsgid(_KEEP), call.setfsuid(_KEEP)

    # Inheritable first: later it may not go beyond the bounding set. Then all that needs SETPCAP.
    call.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    call.capset(call.data(_CAP_HEADER), call.data(_sets(have, have, inheritable)))
    for number in _numbers(~bounding & (2 << _last_capability()) - 1):
        call.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    for number in _numbers(ambient):
        call.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)
    call.prctl(_PR_SET_SECUREBITS, creds.secbits, 0, 0, 0)
    call.capset(call.data(_CAP_HEADER), call.data(_sets(effective, permitted, inheritable)))
    if creds.no_new_privs:
        call.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    yield
    for name, result, wanted in (("fsuid", fsuid, creds.fsuid), ("fsgid", fsgid, creds.fsgid)):
        if result.value & 0xFFFF_FFFF != wanted:
            raise RestoreError(f"thread {thread.tid} cannot get {name} {wanted}")


def _mask(words: Sequence[int], tid: int) -> int:
    if len(words) > _WORDS:
        raise ImageError(f"core-{tid}: capability set of {len(words)} words")
    return sum(word << 32 * i for i, word in enumerate(words))


def _sets(effective: int, permitted: int, inheritable: int) -> bytes:
    """struct __user_cap_data_struct[2] of capset(2)."""
    sets = effective, permitted, inheritable
    return struct.pack("<6I", *(mask >> 32 * i & 0xFFFF_FFFF for i in range(_WORDS) for mask in sets))


def _numbers(mask: int) -> list[int]:
    return [number for number in range(mask.bit_length()) if mask >> number & 1]


def _names(mask: int) -> str:
    known = dict(enumerate(CAPABILITIES))
    return ", ".join(f"CAP_{known.get(number, number)}" for number in _numbers(mask))


def _last_capability() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())
