"""The cut-over protocol as two pure state machines: who may run the tree, and when.

    source:       GREETING > PREFLIGHT > FROZEN > STAGED > PREPARED > COMMITTED > DONE
    destination:  READY > STAGING > PREPARED > COMMITTED > RUNNING

Until the source is COMMITTED (it is about to say Commit), every failure leads to RESUMED there and
DROPPED here: the tree goes on at the source as if nothing had happened. From COMMITTED on the
source never lets its tree run unless the destination has said DROPPED, and a destination that
is DROPPED can reach no other state. So at no time both run it.

Nothing here does I/O: every interleaving can be tried in a test.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Generic, TypeVar


class SourceState(enum.StrEnum):
    """Where the source is."""

    GREETING = "greeting"  # nothing is known of the destination yet
    PREFLIGHT = "preflight"  # both sides look for what stands against it
    FROZEN = "frozen"  # the tree is stopped
    STAGED = "staged"  # the destination takes pages
    PREPARED = "prepared"  # the destination has a complete, stopped copy
    COMMITTED = "committed"  # Commit may have been said: the tree is not ours to run
    DONE = "done"  # it runs there, our copy is gone
    RESUMED = "resumed"  # it goes on here
    IN_DOUBT = "in-doubt"  # nobody could tell: our copy stays stopped


class DestinationState(enum.StrEnum):
    """Where the destination is; also what it answers to `GET /migrations/TOKEN`."""

    READY = "ready"  # nothing of the tree is here
    STAGING = "staging"  # processes are being built
    PREPARED = "prepared"  # a complete, stopped copy
    COMMITTED = "committed"  # Commit has come: the copy is being let go
    RUNNING = "running"  # it runs here
    DROPPED = "dropped"  # nothing is left here and never will be
    FAILED = "failed"  # letting it go failed half way: for people to look at


_S, _D = SourceState, DestinationState

SOURCE_STEPS: Mapping[SourceState, frozenset[SourceState]] = {
    _S.GREETING: frozenset({_S.PREFLIGHT, _S.RESUMED}),
    _S.PREFLIGHT: frozenset({_S.FROZEN, _S.RESUMED}),
    _S.FROZEN: frozenset({_S.STAGED, _S.RESUMED}),
    _S.STAGED: frozenset({_S.PREPARED, _S.RESUMED}),
    _S.PREPARED: frozenset({_S.COMMITTED, _S.RESUMED}),
    _S.COMMITTED: frozenset({_S.DONE, _S.RESUMED, _S.IN_DOUBT}),
    _S.DONE: frozenset(),
    _S.RESUMED: frozenset(),
    _S.IN_DOUBT: frozenset(),
}

DESTINATION_STEPS: Mapping[DestinationState, frozenset[DestinationState]] = {
    _D.READY: frozenset({_D.STAGING, _D.DROPPED}),
    _D.STAGING: frozenset({_D.PREPARED, _D.DROPPED}),
    _D.PREPARED: frozenset({_D.COMMITTED, _D.DROPPED}),
    _D.COMMITTED: frozenset({_D.RUNNING, _D.FAILED}),
    _D.RUNNING: frozenset(),
    _D.DROPPED: frozenset(),
    _D.FAILED: frozenset(),
}


class Verdict(enum.Enum):
    """What a source whose Commit was not answered has to do."""

    KILL = "kill"  # it runs there
    RESUME = "resume"  # it never will
    ASK_AGAIN = "ask again"  # not decided yet
    STAY = "stay"  # no answer will ever tell


def verdict(state: DestinationState, same_agent: bool) -> Verdict:
    """What the destination's state means for a source in COMMITTED.

    Args:
        state: as the destination has answered.
        same_agent: whether the very agent answers that the Commit went to. Another one (it was
            started anew) does not know what the first has done before it ended.
    """
    if not same_agent:
        return Verdict.STAY
    match state:
        case DestinationState.RUNNING:
            return Verdict.KILL
        case DestinationState.DROPPED:
            return Verdict.RESUME
        case DestinationState.FAILED:
            return Verdict.STAY
        case _:
            return Verdict.ASK_AGAIN


State = TypeVar("State", bound=enum.StrEnum)


class Machine(Generic[State]):
    """A state that only moves along a table.

    Attributes:
        state: the present one.
    """

    def __init__(self, start: State, steps: Mapping[State, frozenset[State]]) -> None:
        self.state = start
        self._steps = steps

    def to(self, state: State) -> None:
        """Move on.

        Raises:
            RuntimeError: the table has no such step: a mistake of the program.
        """
        if state not in self._steps[self.state]:
            raise RuntimeError(f"no step from {self.state} to {state}")
        self.state = state

    def can(self, state: State) -> bool:
        """Whether the table has a step to `state`."""
        return state in self._steps[self.state]
