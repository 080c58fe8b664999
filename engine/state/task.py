"""What a process is to the kernel and its neighbours: state, flags, personality, subreaper, OOM score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phaul.engine.proc import Proc
from phaul.errors import CannotMove, RestoreError
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonProcess
    from phaul.engine.source import SourceProcess
    from phaul.images.imageset import ImageSet

# task_core_entry.task_state
ALIVE: Final = 1

# prctl(2)
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37

_STATES: Final = {
    "Z": "zombie, cannot be moved",
    "X": "dead, cannot be moved",
    "T": "stopped (SIGSTOP or Ctrl-Z), cannot be moved; continue it first",
    "t": "stopped by a debugger, cannot be moved",
}


def preflight(pid: int) -> None:
    """Refuses zombies, stopped and traced processes.

    Raises:
        CannotMove: with the state.
    """
    for tid in Proc(pid).tids():
        status = Proc(pid, tid).status
        resource = "process" if tid == pid else f"thread {tid}"
        if reason := _STATES.get(status["State"][0]):
            raise CannotMove(pid, resource, reason)
        if tracer := int(status["TracerPid"]):
            raise CannotMove(pid, resource, f"is traced by PID {tracer}, cannot be moved")


def dump_process(process: SourceProcess, call: Batch, images: ImageSet) -> Iterator[None]:
    """Fills task_state, exit_code, flags, personality, oom_score_adj and child_subreaper of tc."""
    del images
    subreaper = call.space(4)
    call.prctl(_PR_GET_CHILD_SUBREAPER, subreaper)
    yield
    tc = process.core.tc
    tc.task_state, tc.exit_code = ALIVE, 0
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
