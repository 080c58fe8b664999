"""The state machines, exhaustively: every path of both sides, and never two trees that run."""

from __future__ import annotations

from itertools import product

import pytest

from phaul.states import (
    DESTINATION_STEPS,
    SOURCE_STEPS,
    DestinationState,
    Machine,
    SourceState,
    Verdict,
    verdict,
)

D, S = DestinationState, SourceState


def reachable(start: DestinationState) -> set[DestinationState]:
    found, todo = {start}, [start]
    while todo:
        for state in DESTINATION_STEPS[todo.pop()] - found:
            found.add(state)
            todo.append(state)
    return found


def test_every_state_is_in_its_table() -> None:
    assert set(SOURCE_STEPS) == set(S)
    assert set(DESTINATION_STEPS) == set(D)


def test_dropped_is_final() -> None:
    assert reachable(D.DROPPED) == {D.DROPPED}


def test_only_commit_leads_to_running() -> None:
    assert {state for state in D if D.RUNNING in DESTINATION_STEPS[state]} == {D.COMMITTED}
    assert D.DROPPED not in reachable(D.COMMITTED)


def test_the_source_can_take_everything_back_until_it_is_committed() -> None:
    early = [S.GREETING, S.PREFLIGHT, S.FROZEN, S.STAGED, S.PREPARED]
    assert all(S.RESUMED in SOURCE_STEPS[state] for state in early)
    # And what it may not do then, it cannot do by accident.
    assert all(S.DONE not in SOURCE_STEPS[state] for state in early)


@pytest.mark.parametrize(("state", "same_agent"), list(product(D, [True, False])))
def test_a_verdict_never_makes_two_of_one(state: DestinationState, same_agent: bool) -> None:
    answer = verdict(state, same_agent)
    future = reachable(state)
    if answer is Verdict.RESUME:
        assert same_agent
        assert D.RUNNING not in future
        assert D.FAILED not in future
    if answer is Verdict.KILL:
        assert same_agent
        assert future == {D.RUNNING}
    if answer is Verdict.ASK_AGAIN:
        assert len(future) > 1


def test_a_machine_takes_only_steps_of_its_table() -> None:
    machine = Machine(D.READY, DESTINATION_STEPS)
    machine.to(D.STAGING)
    assert machine.can(D.DROPPED)
    with pytest.raises(RuntimeError, match="no step from staging to running"):
        machine.to(D.RUNNING)
    assert machine.state is D.STAGING
