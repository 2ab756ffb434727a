"""A client's limits hold for all replicas together."""

from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess
from harness.servers.router_thread import RouterThread
from harness.waiting import eventually
from mgpu import Client, RequestFailed
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.router.requests.in_flight import InFlight
from mgpu.protocol.internal.client_limits import ClientLimits

ONE, OTHER = Account("pid:1", "a"), Account("pid:1", "b")


def test_requests_and_choices_of_an_account_have_bounds_and_others_their_own() -> None:
    in_flight = InFlight(ClientLimits(max_client_requests=2, max_sequences=64))
    in_flight.check(ONE, 99)  # alone, whatever its size
    in_flight.add(ONE, 60)
    with pytest.raises(Refusal, match="60 sequences in flight on all replicas, the limit is 64"):
        in_flight.check(ONE, 5)
    in_flight.check(ONE, 4)
    in_flight.add(ONE, 1)
    with pytest.raises(Refusal, match="2 requests in flight on all replicas, the limit is 2") as caught:
        in_flight.check(ONE, 1)
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 1.0)
    in_flight.check(OTHER, 1)
    in_flight.remove(ONE, 60)
    in_flight.check(ONE, 4)
    in_flight.remove(ONE, 1)
    assert in_flight._usage == {}, "nothing is kept of accounts with nothing in flight"


def test_without_limits_nothing_is_refused() -> None:
    in_flight = InFlight()
    for _ in range(1000):
        in_flight.add(ONE, 16)
    in_flight.check(ONE, 16)


def test_a_client_has_as_much_behind_a_router_as_at_one_server(gateways: list[GatewayProcess], tmp_path: Path) -> None:
    limits = ClientLimits(max_client_requests=3)
    router = RouterThread(f"ipc://{tmp_path}/front", [each.endpoint for each in gateways], limits=limits)
    try:
        router.wait_until_ready()
        with Client(router.endpoint, retries=0) as client, Client(router.endpoint) as other:
            for gateway in gateways:
                gateway.engine.going.clear()
            streams = [client.stream([at], max_tokens=1) for at in range(3)]
            eventually(lambda: sum(len(each.engine.submits) for each in gateways) == 3, "they do not run")
            with pytest.raises(RequestFailed, match="3 requests in flight on all replicas, the limit is 3"):
                client.generate([9], max_tokens=1)
            fourth = other.stream([4], max_tokens=1)
            for gateway in gateways:
                gateway.engine.going.set()
            assert [each.completion().token_ids for each in (*streams, fourth)] == [(0,), (1,), (2,), (4,)]
            assert client.generate([9], max_tokens=1).token_ids == (9,)
    finally:
        router.end()
