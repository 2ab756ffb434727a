"""What a router does with each message of a replica: its own ids off, the client's on, nothing else lost."""

from typing import Any, cast

import msgpack
import pytest

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.router.dispatch import Dispatch
from mgpu.orchestrator.router.replica import RUNNING_TOKENS, Replica
from mgpu.orchestrator.router.requests.part import Part
from mgpu.orchestrator.router.requests.routed_request import RoutedChoice, RoutedRequest
from mgpu.orchestrator.router.requests.table import RoutedTable
from mgpu.protocol.front.fields import FieldError

ACCOUNT = Account("pid:1", "uid:0 01")

UPSTREAM = 1 << 40
ACCEPTED = {"type": "accepted", "id": UPSTREAM, "model": "m", "prompt_tokens": 3, "max_tokens": 9, "seed": 5}
TOKENS = {"type": "tokens", "id": UPSTREAM, "index": 1, "text": "ab", "token_ids": [97, 98]}
FINISHED = {
    "type": "finished",
    "id": UPSTREAM,
    "finish_reasons": ["stop", "length"],
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "cached_tokens": 1,
}


class FakeFront:
    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send_body(self, connection: bytes, body: bytes) -> None:
        assert connection == b"client"
        self.sent.append(msgpack.unpackb(body))


class Way:
    """A request of two choices on its replica."""

    def __init__(self) -> None:
        self.front = FakeFront()
        self.table = RoutedTable(cast(FrontSocket, self.front))
        self.replica = Replica("replica0")
        self.dispatch = Dispatch([self.replica], self.table)
        choices = [RoutedChoice(), RoutedChoice()]
        self.routed = RoutedRequest(
            b"client", ACCOUNT, 7, {"n": 2}, "s", UPSTREAM, True, None, choices, prompt_size=100
        )
        self.table.add(self.routed)
        message = {"id": UPSTREAM, "n": 2, "session": "s"}
        self.part = Part(self.routed, [0, 1], message, self.dispatch.on_error, self.dispatch.pass_on)
        self.replica.add(self.part)
        self.dispatch.attach(self.part, self.replica)

    def take(self, message: dict[str, Any], **more: object) -> bool:
        return self.dispatch.pass_on(self.part, {**message, **more})


@pytest.fixture
def way() -> Way:
    return Way()


def test_messages_keep_all_that_a_router_does_not_know(way: Way) -> None:
    assert way.take(ACCEPTED, tool_format="hermes", new_field=[1])
    assert way.take(TOKENS, new_field={"a": 1}, stop_string="b", finish_reason="stop")
    assert way.take(FINISHED)
    accepted, tokens, finished = way.front.sent
    assert accepted == {**ACCEPTED, "id": 7, "tool_format": "hermes", "new_field": [1]}
    assert tokens == {**TOKENS, "id": 7, "new_field": {"a": 1}, "stop_string": "b", "finish_reason": "stop"}
    assert finished == {**FINISHED, "id": 7, "finish_reasons": ["stop", "stop"]}
    assert len(way.table) == 0


def test_the_client_that_comes_back_gets_the_messages_after_its_offset(way: Way) -> None:
    for at in range(3):
        way.take(TOKENS, token_ids=[at], text=str(at))
    choice = way.routed.choices[1]
    assert [msgpack.unpackb(body)["text"] for body in choice.since(1)] == ["1", "2"]
    assert (choice.offset, way.part.offsets()) == (3, [0, 3])


@pytest.mark.parametrize(
    "wrong",
    [
        {**TOKENS, "index": 2},
        {**TOKENS, "index": "1"},
        {**TOKENS, "token_ids": [1 << 40]},
        {**TOKENS, "token_ids": ["a"]},
        {**TOKENS, "text": None},
        {**TOKENS, "finish_reason": 5},
        {**ACCEPTED, "seed": "x"},
        {**FINISHED, "finish_reasons": ["stop"]},
        {**FINISHED, "finish_reasons": ["stop", 1]},
        {**FINISHED, "cached_tokens": None},
    ],
)
def test_a_malformed_message_reaches_no_client(way: Way, wrong: dict[str, Any]) -> None:
    with pytest.raises(FieldError):
        way.take(wrong)
    assert way.front.sent == []
    assert way.part.offsets() == [0, 0]


def test_what_comes_while_the_connection_is_lost_is_left_to_the_resume(way: Way) -> None:
    way.take(TOKENS)
    way.part.request.disconnect()
    assert not way.take(TOKENS)
    assert not way.take(FINISHED)
    assert way.part.request.resume()["offsets"] == [0, 2]
    assert len(way.front.sent) == 1


def test_the_load_of_a_replica_falls_with_the_first_token_and_the_end(way: Way) -> None:
    loads = [way.replica.load]
    for message in (ACCEPTED, TOKENS, TOKENS, FINISHED):
        way.take(message)
        loads.append(way.replica.load)
    assert loads == [100 + RUNNING_TOKENS, 100 + RUNNING_TOKENS, RUNNING_TOKENS, RUNNING_TOKENS, 0]
    way.replica.forget(way.part)
    assert way.replica.load == 0
