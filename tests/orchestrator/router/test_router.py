"""What clients see of a router: one server, also while a replica or the router itself is lost."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import pytest
import zmq

from harness.servers.gateway_process import GatewayProcess, says
from harness.servers.router_thread import RouterThread
from harness.waiting import eventually
from mgpu import Client, RequestFailed
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.router.dispatch import Dispatch
from mgpu.orchestrator.router.replica import Replica
from mgpu.orchestrator.router.requests.part import Part
from mgpu.orchestrator.router.requests.routed_request import RoutedChoice, RoutedRequest
from mgpu.orchestrator.router.requests.table import RoutedTable
from mgpu.protocol.front import framing
from mgpu.protocol.front.seeds import seed_of_choice

ACCOUNT = Account("pid:1", "uid:0 01")


def test_answers_pass_through_whole(client: Client) -> None:
    done = client.generate(list(b"abc"), max_tokens=5, n=2, logprobs=1, seed=7)
    assert [choice.token_ids for choice in done.choices] == [tuple(b"abcab")] * 2
    assert done.logprobs is not None
    assert [len(each.top) for each in done.logprobs] == [1] * 5
    assert (done.seed, done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (
        7,
        3,
        10,
        3,
    )
    assert [piece.text for piece in client.stream("hi", max_tokens=2) if piece.text] == ["h", "i"]


def test_questions_are_answered_for_all_replicas(client: Client) -> None:
    health = client.health()
    assert (health.state, health.max_seq_len, health.kv_tokens) == ("ready", 512, 8192)
    assert "replica0: ready" in health.layout
    assert client.count_tokens("hi") == 3
    assert client.models()[0]["max_seq_len"] == 512
    eventually(lambda: "replica1_running" in client.stats())  # each is asked for its counters by and by
    stats = client.stats()
    assert (stats["replicas_ready"], stats["replica1_running"]) == (2.0, 0.0)


def test_a_mistake_is_answered_once_and_costs_nothing(client: Client, gateways: list[GatewayProcess]) -> None:
    with pytest.raises(RequestFailed, match="token id 300"):
        client.generate([300], max_tokens=2)
    with pytest.raises(RequestFailed, match="use max_tokens"):
        client.generate([5], max_tokens=100_000)
    assert client.generate([5], max_tokens=2).token_ids == (5, 5)


def test_what_cannot_be_sent_on_is_refused_as_the_mistake_that_it_is(router: RouterThread, client: Client) -> None:
    body = msgpack.packb({"type": "generate", "id": 1, "prompt": "a", "stream": True})
    hole = msgpack.packb("template_options") + b"\x91" * 600 + b"\x01"
    bodies = {
        "template_options must be a map": bytes([body[0] + 1]) + body[1:] + hole,
        "bytes, the limit is": msgpack.packb({"type": "generate", "id": 1, "prompt": "a" * ((1 << 20) - 60)}),
        "messages must be": msgpack.packb({"type": "generate", "id": 1, "messages": "hi"}),
        "exactly one of prompt": msgpack.packb({"type": "generate", "id": 1}),
        "unknown field 'x'": msgpack.packb({"type": "generate", "id": 1, "prompt": "a", "x": 1}),
    }
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as socket:
        framing.set_client_options(socket, router.endpoint)
        socket.connect(router.endpoint)
        for problem, sent in bodies.items():
            socket.send_multipart([framing.VERSION, sent])
            assert socket.poll(20_000), problem
            answer = msgpack.unpackb(socket.recv_multipart()[1])
            assert (answer["type"], answer["code"]) == ("failed", "bad_request"), answer
            assert re.search(problem, answer["message"]), answer
    assert len(router.router.table) == 0
    assert client.generate([5], max_tokens=2).token_ids == (5, 5)


def test_requests_go_where_least_waits(client: Client, gateways: list[GatewayProcess]) -> None:
    for gateway in gateways:
        gateway.engine.going.clear()
    streams = [client.stream([at], max_tokens=1) for at in range(8)]
    eventually(lambda: [len(each.engine.submits) for each in gateways] == [4, 4], "they were not shared")
    for gateway in gateways:
        gateway.engine.going.set()
    assert [stream.completion().token_ids for stream in streams] == [(at,) for at in range(8)]


def test_a_prompt_goes_where_its_beginning_is_cached(client: Client, gateways: list[GatewayProcess]) -> None:
    for at in range(4):
        begins = bytes([65 + at]) * 300
        for _ in range(3):
            client.generate(list(begins), max_tokens=1)
    for gateway in gateways:
        firsts = [submit.token_ids[:1] for submit in gateway.engine.submits]
        assert len(firsts) == 3 * len(set(firsts)), firsts


def test_requests_of_a_replica_that_dies_go_on_elsewhere(
    client: Client, router: RouterThread, gateways: list[GatewayProcess]
) -> None:
    text = "words that go on ä ö ü " * 10
    for gateway in gateways:
        gateway.engine.script = says(text)
    streams = [client.stream([5], max_tokens=400, seed=at, n=1 + at % 2) for at in range(6)]
    first = [next(stream).text for stream in streams]
    gateways[0].close()
    for at, stream in enumerate(streams):
        done = stream.completion()
        assert {choice.text for choice in done.choices} == {text}, (first[at], done)
        assert done.finish_reason == "stop"
    assert client.stats()["router_moved"] >= 1
    continued = [submit for submit in gateways[1].engine.submits if submit.num_emitted]
    assert continued, "tokens that clients have are not made again"
    seeds = {submit.sampling.seed for submit in continued}
    assert seeds <= {seed_of_choice(seed, index) for seed in range(6) for index in range(2)}


def test_a_gateway_that_is_replaced_costs_nothing(client: Client, gateways: list[GatewayProcess]) -> None:
    streams = [client.stream([at], max_tokens=300) for at in range(4)]
    for stream in streams:
        next(stream)
    gateways[0].kill()
    gateways[0].replace()
    assert [stream.completion().token_ids for stream in streams] == [(at,) * 300 for at in range(4)]
    assert client.stats()["router_moved"] == 0


def test_a_router_that_is_replaced_costs_nothing(gateways: list[GatewayProcess], tmp_path: Path) -> None:
    endpoints = [each.endpoint for each in gateways]
    router = RouterThread(f"ipc://{tmp_path}/front", endpoints)
    router.wait_until_ready()
    with Client(router.endpoint) as client:
        streams = [client.stream([at], max_tokens=300, n=1 + at % 2) for at in range(4)]
        for stream in streams:
            next(stream)
        router.end()
        again = RouterThread(router.endpoint, endpoints)
        try:
            for at, stream in enumerate(streams):
                assert {choice.token_ids for choice in stream.completion().choices} == {(at,) * 300}
            assert sum(len(each.engine.submits) for each in gateways) == 6, "nothing has run twice"
        finally:
            again.end()


def test_a_request_ends_whose_replica_is_lost_before_its_last_message() -> None:
    sent: list[dict[str, Any]] = []
    front = SimpleNamespace(send_body=lambda _connection, body: sent.append(msgpack.unpackb(body)))
    table = RoutedTable(cast(FrontSocket, front))
    replica = Replica("replica0")
    dispatch = Dispatch([replica], table)
    choices = [RoutedChoice(finish_reason="length"), RoutedChoice()]
    routed = RoutedRequest(b"c", ACCOUNT, 7, {"prompt_ids": b"1234"}, "s", 16, True, None, choices)
    table.add(routed)
    part = Part(routed, [0, 1], {"id": 16, "n": 2}, dispatch.on_error, dispatch.pass_on)
    replica.add(part)
    dispatch.attach(part, replica)
    tokens = {"type": "tokens", "id": 16, "index": 1, "text": "x", "token_ids": [5], "finish_reason": "stop"}
    assert dispatch.pass_on(part, {**tokens})
    dispatch.leave(replica, "it is lost")
    assert [values["type"] for values in sent] == ["tokens", "finished"]
    assert sent[-1]["finish_reasons"] == ["length", "stop"]
    assert len(table) == 0


def test_with_keys_of_its_own_a_router_names_no_accounts(gateways: list[GatewayProcess], tmp_path: Path) -> None:
    """The HTTP process names its clients, and servers let no key do that."""
    router = RouterThread(f"ipc://{tmp_path}/front", [each.endpoint for each in gateways], names_accounts=False)
    try:
        router.wait_until_ready()
        with Client(router.endpoint) as client:
            client.generate([5], max_tokens=1, account="alice")
        [submit] = [each for gateway in gateways for each in gateway.engine.submits]
        assert len(submit.account) == 2, "process and connection"
    finally:
        router.end()


def test_a_cancelled_request_ends_on_its_replica(client: Client, gateways: list[GatewayProcess]) -> None:
    stream = client.stream([5], max_tokens=500)
    next(stream)
    stream.close()
    eventually(lambda: any(each.engine.cancels for each in gateways), "it goes on")
    assert client.generate([6], max_tokens=1).token_ids == (6,)


def test_without_replicas_requests_are_refused_and_questions_answered(
    client: Client, router: RouterThread, gateways: list[GatewayProcess]
) -> None:
    for gateway in gateways:
        gateway.close()
    router.wait_until_ready(0)
    with pytest.raises(RequestFailed, match=r"takes requests now \(replica0 is unreachable"):
        client.generate([5], max_tokens=1)
    assert client.health().state == "starting"


def test_tokens_that_a_client_brings_go_along_when_a_replica_is_lost(
    client: Client, gateways: list[GatewayProcess]
) -> None:
    began = list(b"ab")
    stream = client.stream([*b"abc"], max_tokens=200, seed=1, emitted_ids=began)
    first = next(stream).token_ids
    busy = next(each for each in gateways if each.engine.submits)
    busy.close()
    other = next(each for each in gateways if each is not busy)
    assert first + tuple(token for piece in stream for token in piece.token_ids) == tuple(b"abc" * 67)[2:200]
    assert [submit.num_emitted > 2 for submit in other.engine.submits] == [True]
