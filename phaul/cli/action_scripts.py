"""--action-script: programs of the user that are run at each stage of a dump or a restore, as CRIU does.

A program finds the stage in CRTOOLS_SCRIPT_ACTION, the images in CRTOOLS_IMAGE_DIR and, once it is known, the PID
of the root in CRTOOLS_INIT_PID. A status other than 0 fails the operation: before the tree is killed (dump) or
runs (restore).
"""

from __future__ import annotations

import logging
import os
import subprocess

from phaul.errors import PhaulError

log = logging.getLogger(__name__)


class ActionScripts:
    """All --action-script programs of one command.

    Args:
        programs: in the order given, or None.
        images_dir: of the command; held open.
        work_dir: their working directory.
        error: what is raised when one fails.
    """

    def __init__(self, programs: list[str] | None, images_dir: str, work_dir: str, error: type[PhaulError]) -> None:
        self._programs = [os.path.abspath(program) for program in programs or []]
        self._work_dir, self._error = work_dir, error
        if self._programs:
            try:
                self._images_fd = os.open(images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as problem:
                raise error(f"{images_dir}: {problem.strerror}") from problem

    def notify(self, stage: str, pid: int) -> None:
        """As `run`, for a stage at which it is too late to fail: that is logged."""
        try:
            self.run(stage, pid)
        except PhaulError as problem:
            log.warning("%s", problem)

    def run(self, stage: str, pid: int | None = None) -> None:
        """Run them one after the other and wait for each.

        Args:
            stage: as CRIU names it ("post-dump").
            pid: of the root, if there is one yet.
        """
        for program in self._programs:
            environment = os.environ | {
                "CRTOOLS_SCRIPT_ACTION": stage,
                "CRTOOLS_IMAGE_DIR": f"/proc/{os.getpid()}/fd/{self._images_fd}",
            }
            if pid is not None:
                environment["CRTOOLS_INIT_PID"] = str(pid)
            try:
                done = subprocess.run([program], cwd=self._work_dir, env=environment, check=False)
            except OSError as problem:
                raise self._error(f"action script {program} at {stage}: {problem.strerror}") from problem
            if done.returncode:
                raise self._error(f"action script {program} failed at {stage} (status {done.returncode})")
