"""What the gateway says of its clients, and what is left of that when it is lost."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mgpu.orchestrator.engine.gateway_bridge import GatewayBridge
from mgpu.orchestrator.engine.life_cycle import ServerState
from mgpu.orchestrator.scheduler.running_shares import RunningShares
from mgpu.protocol.internal.gateway_messages import Floods


@pytest.mark.parametrize("state", [ServerState.STARTING, ServerState.READY])
def test_who_floods_is_known_until_the_gateway_is_lost(state: ServerState) -> None:
    """Nobody has flooded the next one yet, and it tells changes only."""
    shares, received = RunningShares(), [Floods([3, 5])]
    anything = cast("Any", SimpleNamespace(state=state))
    scheduler = cast("Any", SimpleNamespace(shares=shares, live_ids=list))
    gateway = cast("Any", SimpleNamespace(receive=lambda _most: received))
    bridge = GatewayBridge(anything, scheduler, anything, gateway, anything, 1.0, anything)
    bridge.take_in()
    assert shares.floods == {3, 5}
    bridge.on_gateway_replaced([Floods([7])])
    assert shares.floods == frozenset()
