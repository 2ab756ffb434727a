"""Which state of a server may follow which."""

import pytest

from mgpu.orchestrator.engine.life_cycle import NEXT, LifeCycle, ServerState


def test_a_server_starts_serves_recovers_drains_and_stops() -> None:
    life = LifeCycle()
    for state in (
        ServerState.READY,
        ServerState.RECOVERING,
        ServerState.READY,
        ServerState.DRAINING,
        ServerState.STOPPED,
    ):
        life.enter(state)
    assert life.state == "stopped"


@pytest.mark.parametrize("state", [ServerState.STARTING, ServerState.RECOVERING, ServerState.DRAINING])
def test_a_start_leads_to_ready_or_ends(state: ServerState) -> None:
    with pytest.raises(AssertionError):
        LifeCycle().enter(state)


def test_every_state_can_stop_and_nothing_follows_that() -> None:
    assert [state for state, following in NEXT.items() if ServerState.STOPPED not in following] == [ServerState.STOPPED]
    assert NEXT[ServerState.STOPPED] == set()
