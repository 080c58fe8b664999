"""What a process is to the kernel and its neighbours: state, flags, personality, subreaper, OOM score."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phaul.engine.proc import Proc
from phaul.errors import CannotMove, RestoreError
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.pstree_pb2 import pstree_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess
    from phaul.images.imageset import ImageSet

# task_core_entry.task_state; zombies have a file of their own.
ALIVE: Final = 1
STOPPED: Final = 3

# prctl(2)
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37


def preflight(pid: int) -> None:
    """Refuses traced processes.

    Raises:
        CannotMove: with the tracer.
    """
    for tid in Proc(pid).tids():
        if tracer := int(Proc(pid, tid).status["TracerPid"]):
            resource = "process" if tid == pid else f"thread {tid}"
            raise CannotMove(pid, resource, f"is traced by PID {tracer}, cannot be moved")


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Fills task_state, exit_code, flags, personality, oom_score_adj and child_subreaper of tc."""
    del images
    subreaper = call.space(4)
    call.prctl(_PR_GET_CHILD_SUBREAPER, subreaper)
    yield
    tc = process.core.tc
    tc.task_state, tc.exit_code = STOPPED if process.stop_signal else ALIVE, 0
    if process.stop_signal:
        tc.stop_signo = process.stop_signal
    tc.flags = int(process.proc.stat[9])
    tc.personality = int(process.proc.read("personality"), 16)
    tc.oom_score_adj = int(process.proc.read("oom_score_adj"))
    tc.child_subreaper = any(subreaper.bytes())


def restore_process(process: SkeletonProcess, call: Batch, images: ImageSet) -> None:
    """Sets personality, subreaper and OOM score, the last from outside.

    Raises:
        RestoreError: the OOM score is below ours, which needs CAP_SYS_RESOURCE.
    """
    tc = images.one(f"core-{process.pid}", core_entry).tc
    call.personality(tc.personality)
    if tc.child_subreaper:
        call.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    score = Path(f"/proc/{process.pid}/oom_score_adj")
    current = int(score.read_text())
    if tc.HasField("oom_score_adj") and tc.oom_score_adj != current:
        try:
            score.write_text(str(tc.oom_score_adj))
        except OSError as error:
            raise RestoreError(
                f"oom_score_adj of PID {process.pid} cannot be set from {current} to {tc.oom_score_adj}: "
                f"{error.strerror}"
            ) from error


def restore_stop(process: SkeletonProcess, images: ImageSet) -> None:
    """Stop a process that was stopped by job control: the signal takes effect when we let go of it."""
    tc = images.one(f"core-{process.pid}", core_entry).tc
    if tc.task_state == STOPPED:
        # A signal other than SIGSTOP is taken as the reason only if it will stop the process for sure.
        number = tc.stop_signo or signal.SIGSTOP
        proc = Proc(process.pid)
        deaf = proc.signal_set("SigBlk") | proc.signal_set("SigIgn") | proc.signal_set("SigCgt")
        if deaf >> number - 1 & 1 or _in_orphaned_group(process.entry, images):
            number = signal.SIGSTOP
        os.kill(process.pid, number)


def _in_orphaned_group(entry: pstree_entry, images: ImageSet) -> bool:
    """Whether nobody of the session but the group itself could continue it: terminal signals do not stop it then."""
    tree = {other.pid: other for other in images.messages("pstree", pstree_entry)}
    parents = [tree[other.ppid] for other in tree.values() if other.pgid == entry.pgid and other.ppid in tree]
    return not any(parent.pgid != entry.pgid and parent.sid == entry.sid for parent in parents)
