"""A router that replaces another knows its replicas before clients come back."""

import threading
import time
from pathlib import Path

from harness.servers.gateway_process import GatewayProcess
from harness.servers.scripted_server import ScriptedServer
from mgpu.orchestrator.router.fleet import Fleet
from mgpu.protocol.internal.router_messages import KnownReplica, RouterOrders

LONG_S = 60.0


def fleet_of(*endpoints: str) -> Fleet:
    fleet = Fleet()
    fleet.follow(RouterOrders([KnownReplica(f"replica{at}", each) for at, each in enumerate(endpoints)]))
    return fleet


def test_a_replica_takes_requests_once_it_is_known(gateways: list[GatewayProcess]) -> None:
    """A connection alone is not enough: a first request would be refused."""
    fleet = fleet_of(*(each.endpoint for each in gateways), "")
    fleet.wait_until_known(LONG_S)
    assert [replica.takes_requests for replica in fleet.replicas] == [True, True, False]
    fleet.close()


def test_a_replica_that_is_loading_is_not_waited_for(tmp_path: Path) -> None:
    server = ScriptedServer(tmp_path)
    fleet = fleet_of(server.endpoint)
    waiting = threading.Thread(target=fleet.wait_until_known, args=(LONG_S,))
    waiting.start()
    while (question := server.hear())["type"] != "health":
        pass
    counts = dict.fromkeys(("max_seq_len", "kv_tokens", "in_flight"), 0)
    server.say(type="health", id=question["id"], state="starting", model="m", uptime_s=0.0, layout="", **counts)
    waiting.join(LONG_S / 2)
    assert not waiting.is_alive()
    assert not fleet.replicas[0].takes_requests
    fleet.close()
    server.close()


def test_a_replica_that_does_not_answer_is_waited_for_so_long_at_most(tmp_path: Path) -> None:
    fleet = fleet_of(f"ipc://{tmp_path}/nobody")
    began_s = time.monotonic()
    fleet.wait_until_known(0.05)
    assert time.monotonic() - began_s < LONG_S / 2
    fleet.close()
