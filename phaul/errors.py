"""Every error that phaul reports on purpose.

    PhaulError
    +-- UsageError          the command line or an option is wrong
    +-- NotPermitted        a privilege is missing
    +-- NoSuchProcess       the PID is not there, or is not a user process
    +-- CannotMove          something in the tree cannot be moved (named before anything changes)
    +-- DumpError           reading the tree failed; the tree goes on
    +-- ImageError          an image is missing, truncated or not what it says
    +-- RestoreError        rebuilding the tree failed; nothing of it is left
    +-- PeerError           the other host cannot be reached, or is not what we need
    |   +-- VersionMismatch the two sides do not fit together
    +-- InDoubt             the other side may run the tree; the source stays frozen

Each class owns an exit code and a paragraph of advice; the command line prints one line (the
message), then the advice. `docs/errors.md` holds the same table (a test compares them).
"""

from __future__ import annotations

from typing import ClassVar


class PhaulError(Exception):
    """Root of all. The message is one line that names the resource."""

    exit_code: ClassVar[int] = 1
    help_text: ClassVar[str] = ""


class UsageError(PhaulError):
    """An option or argument that cannot be taken."""

    exit_code = 2
    help_text = "See `phaul --help`."


class NotPermitted(PhaulError):
    """A privilege is missing."""

    exit_code = 3
    help_text = "phaul reads and builds processes of any user: run it as root."


class NoSuchProcess(PhaulError):
    """The PID is not there, or is no user process."""

    exit_code = 4
    help_text = "`ps -e` lists the processes; kernel threads cannot be moved."


class CannotMove(PhaulError):
    """Something in the tree cannot be moved.

    Attributes:
        pid: whose it is, in the pid namespace of the caller.
        resource: what it is, for people ("fd 7").
        reason: what about it ("io_uring, cannot be moved").
    """

    exit_code = 5
    help_text = "The process was not changed and goes on."

    def __init__(self, pid: int, resource: str, reason: str) -> None:
        super().__init__(pid, resource, reason)
        self.pid, self.resource, self.reason = pid, resource, reason

    def __str__(self) -> str:
        return f"{self.resource} of PID {self.pid}: {self.reason}"


class DumpError(PhaulError):
    """Reading the tree failed; the tree goes on."""

    exit_code = 6
    help_text = "The process was not changed and goes on."


class ImageError(PhaulError):
    """An image is missing, truncated or not what it says it is."""

    exit_code = 7
    help_text = "Nothing was restored."


class RestoreError(PhaulError):
    """Rebuilding the tree failed; nothing of it is left."""

    exit_code = 8
    help_text = "Nothing was restored."


class PeerError(PhaulError):
    """The other host cannot be reached or does not answer as an agent."""

    exit_code = 9
    help_text = "Is `phaul agent` running there, and is the address right?"


class VersionMismatch(PeerError):
    """The two sides do not fit together."""

    exit_code = 10
    help_text = "Both hosts need the same protocol version, architecture and page size."


class InDoubt(PhaulError):
    """The other side may run the tree already; the source stays stopped.

    Never resume by hand before the other side has said that it does not run the tree.
    """

    exit_code = 11
    help_text = "Look at the destination first: only one of the two may run."
