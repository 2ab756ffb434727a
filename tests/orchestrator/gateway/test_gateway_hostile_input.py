"""Whatever arrives on the socket gets a clear answer or none, and the next request is served."""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq

from harness.servers.gateway_process import GatewayProcess, assert_serves
from harness.servers.raw_peer import RawPeer
from mgpu import Client
from mgpu.orchestrator.gateway.requests.quota import MAX_RETRY_S, MIN_RETRY_S
from mgpu.protocol.front.framing import VERSION

MiB = 1 << 20


@pytest.fixture
def peer(gateway: GatewayProcess) -> Iterator[RawPeer]:
    peer = RawPeer(gateway.endpoint)
    yield peer
    peer.close()
    assert_serves(gateway.endpoint)


def test_random_bytes_and_http_on_the_raw_socket_change_nothing(gateway: GatewayProcess, peer: RawPeer) -> None:
    path = gateway.endpoint.removeprefix("ipc://")
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(4096), b"\x01\x00\x0d\x00hello-forged", b"\xff" * 10):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.connect(path)
            raw.sendall(data)


def test_an_empty_message_is_refused(peer: RawPeer) -> None:
    peer.send(b"")
    failed = peer.hear()
    assert (failed["type"], failed["code"], failed.get("id")) == ("failed", "bad_version", None)


def test_a_wrong_version_is_told_the_right_one(peer: RawPeer) -> None:
    peer.send(b"mgpu2", msgpack.packb({"type": "health", "id": 1}))
    failed = peer.hear()
    assert failed["code"] == "bad_version"
    assert "mgpu1" in failed["message"]


@pytest.mark.parametrize("count", [1, 3, 5, 100_000])
def test_a_wrong_number_of_frames_is_refused(gateway: GatewayProcess, peer: RawPeer, count: int) -> None:
    before = gateway.resident_bytes()
    peer.send(VERSION, *[b"x"] * (count - 1))
    failed = peer.hear()
    assert failed["code"] == "bad_request"
    assert "2 frames" in failed["message"]
    assert gateway.resident_bytes() - before < 64 * MiB


def test_a_frame_above_the_limit_ends_only_the_connection(peer: RawPeer) -> None:
    peer.send(VERSION, b"x" * (MiB + 1))
    peer.say(type="health", id=3)  # libzmq has connected again by itself
    assert peer.hear()["id"] == 3


BOMBS = {
    "nested": lambda: b"\x91" * 100_000 + b"\xc0",
    "wide": lambda: b"\xdd" + struct.pack(">I", 2**31) + b"\x90" * 100,
    "tiny": lambda: b"\x81\xa1x\xdc\xff\xff" + b"\x90" * 65_535,
    "two levels": lambda: msgpack.packb({"x": [[[] for _ in range(1000)] for _ in range(900)]}),
    "wide map": lambda: msgpack.packb({f"k{at}": at for at in range(1000)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_msgpack_bombs_are_refused_unbuilt(gateway: GatewayProcess, peer: RawPeer, name: str) -> None:
    before = gateway.resident_bytes()
    peer.send(VERSION, BOMBS[name]())
    assert peer.hear()["code"] == "bad_request"
    assert gateway.resident_bytes() - before < 32 * MiB


@pytest.mark.parametrize("body", [
    b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb("generate"), msgpack.packb({"type": "health", "id": 1})[:-1],
    msgpack.packb({"type": "health", "id": 1}) + b"\x00", msgpack.packb({1: 2}),
    msgpack.packb({"type": "health", "id": msgpack.ExtType(5, b"x")}),
    msgpack.packb({"type": "health", "id": msgpack.Timestamp(0)}),
    b"\x82\xa4type\xa6health\xa2id\xc7\x0c\xff" + b"\xff" * 12, b"\x81\xa4type\xa3\xed\xa0\x80", os.urandom(1000),
])  # fmt: skip
def test_what_is_not_a_map_is_refused(peer: RawPeer, body: bytes) -> None:
    peer.send(VERSION, body)
    failed = peer.hear()
    assert (failed["type"], failed["code"]) == ("failed", "bad_request")


@pytest.mark.parametrize(("fields", "words"), [
    ({"type": "gernate"}, ["type must be one of generate"]),
    ({"type": "tokens", "index": 0}, ["type must be one of"]),
    ({"type": "generate", "prompt": "x", "temprature": 1}, ["temprature", "did you mean temperature?"]),
    ({"type": "health", "prompt": "x"}, ["unknown field", "known fields: id"]),
    ({"type": "generate", "prompt": "x", "temperature": float("nan")}, ["temperature", "0 to 100", "nan"]),
    ({"type": "generate", "prompt": ""}, ["prompt", "1 to"]),
    ({"type": "generate", "prompt_ids": b""}, ["prompt_ids", "at least one"]),
    ({"type": "generate", "prompt_ids": b"123"}, ["prompt_ids", "3 bytes"]),
    ({"type": "generate", "prompt_ids": struct.pack("<2i", 3, -1)}, ["prompt_ids", "-1"]),
    ({"type": "generate", "prompt_ids": struct.pack("<i", 300)}, ["token id 300", "0 to 299"]),
    ({"type": "generate", "prompt_ids": [1, -2]}, ["prompt_ids[1]", "-2"]),
    ({"type": "generate"}, ["exactly one of prompt, prompt_ids and messages"]),
    ({"type": "generate", "prompt": "x", "prompt_ids": [1]}, ["exactly one"]),
    ({"type": "generate", "messages": []}, ["messages", "1 to 2048"]),
    ({"type": "generate", "messages": [{"role": "wizard", "content": ""}]}, ["messages[0].role", "wizard"]),
    ({"type": "generate", "messages": [{"role": "user"}]}, ["messages[0] lacks content"]),
    ({"type": "generate", "messages": [{"role": "user", "content": "x"}], "template_options": {"tools": True}},
     ["template_options must not have tools"]),
    ({"type": "generate", "prompt": "x", "chat_template": "{{ 1 }}"}, ["unknown field"]),
])  # fmt: skip
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    peer: RawPeer, fields: dict[str, Any], words: list[str]
) -> None:
    peer.say(**{"id": 9, **fields})
    failed = peer.hear()
    assert (failed["type"], failed["id"], failed["code"]) == ("failed", 9, "bad_request")
    assert all(word in failed["message"] for word in words), failed["message"]


@pytest.mark.parametrize("request_id", [-1, 2**63, "1", 1.5, None, [1]])
def test_an_unusable_id_is_refused_without_one(peer: RawPeer, request_id: object) -> None:
    peer.say(type="generate", id=request_id, prompt="x")
    failed = peer.hear()
    assert (failed["code"], failed.get("id")) == ("bad_request", None)
    assert "id" in failed["message"]


def test_an_id_in_flight_cannot_be_used_again_and_its_request_goes_on(gateway: GatewayProcess, peer: RawPeer) -> None:
    gateway.engine.going.clear()
    peer.say(type="generate", id=1, prompt_ids=[5], max_tokens=3)
    assert peer.hear()["type"] == "accepted"
    peer.say(type="generate", id=1, prompt_ids=[6])
    failed = peer.hear()
    assert (failed["code"], failed.get("id")) == ("duplicate_id", None)
    assert "request 1" in failed["message"]
    gateway.engine.going.set()
    assert peer.hear_all(1)[-1]["finish_reasons"] == ["length"]


def test_a_client_cannot_cancel_the_request_of_another(gateway: GatewayProcess, peer: RawPeer) -> None:
    gateway.engine.going.clear()
    peer.say(type="generate", id=1, prompt_ids=[5], max_tokens=3)
    assert peer.hear()["type"] == "accepted"
    other = RawPeer(gateway.endpoint)
    other.say(type="cancel", id=1)
    other.say(type="health", id=2)
    assert other.hear()["type"] == "health"
    other.close()
    assert not gateway.engine.cancels
    gateway.engine.going.set()
    assert peer.hear_all(1)[-1]["finish_reasons"] == ["length"]


def test_cancel_ends_a_request_once_with_what_was_generated(gateway: GatewayProcess, peer: RawPeer) -> None:
    peer.say(type="generate", id=1, prompt_ids=[5], max_tokens=500, n=2, stream=True)
    peer.hear_until("tokens")
    peer.say(type="cancel", id=1)
    peer.say(type="cancel", id=1)
    messages = peer.hear_all(1)
    assert messages[-1]["finish_reasons"] == ["cancelled", "cancelled"]
    assert [m["index"] for m in messages if m.get("finish_reason") == "cancelled"] == [0, 1]
    peer.say(type="health", id=2)
    assert peer.hear()["type"] == "health"  # and nothing more of request 1
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 2)


def test_a_client_that_vanishes_in_mid_stream_is_noticed_and_its_sequences_end(gateway: GatewayProcess) -> None:
    peer = RawPeer(gateway.endpoint)
    peer.say(type="generate", id=1, prompt_ids=[5], max_tokens=500, stream=True)
    peer.hear_until("tokens")
    gateway.engine.going.clear()
    peer.close()
    gateway.engine.going.set()
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1)


def test_a_client_that_vanishes_while_it_waits_is_noticed_by_the_keepalive(gateway: GatewayProcess) -> None:
    gateway.engine.going.clear()
    peer = RawPeer(gateway.endpoint)
    peer.say(type="generate", id=1, prompt_ids=[5])
    assert [peer.hear()["type"] for _ in range(2)] == ["accepted", "keepalive"]
    peer.close()
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1)


def test_a_client_that_does_not_read_is_cut_off_and_the_others_are_not_delayed(gateway: GatewayProcess) -> None:
    """Its pipe, the kernel's buffers and its backlog fill up; then what it has in flight ends."""
    gateway.set_info(max_seq_len=10**6, kv_tokens=10**6)
    before = gateway.resident_bytes()
    slow = RawPeer(gateway.endpoint)
    slow.socket.setsockopt(zmq.RCVHWM, 1)
    for request_id in range(64):
        slow.say(type="generate", id=request_id, prompt_ids=[5], max_tokens=10**5, stream=True, logprobs=20)
    gateway.engine.wait(lambda: len(gateway.engine.submits) == 64)
    with Client(gateway.endpoint) as client:
        assert client.generate([7], max_tokens=20).token_ids == (7,) * 20
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 64)
    assert gateway.resident_bytes() - before < 96 * MiB
    message = slow.hear_until("failed")
    assert (message["code"], message.get("id")) == ("slow_reader", None)
    slow.close()


def test_too_many_requests_of_one_client_are_refused_with_a_time_to_wait(
    gateway: GatewayProcess, peer: RawPeer
) -> None:
    gateway.engine.going.clear()
    for request_id in range(257):
        peer.say(type="generate", id=request_id, prompt_ids=[5], max_tokens=1)
    message = peer.hear_until("failed")
    assert (message["id"], message["code"]) == (256, "overloaded")
    assert MIN_RETRY_S <= message["retry_after_s"] <= MAX_RETRY_S
    gateway.engine.going.set()


def test_an_enormous_prompt_of_one_character_is_refused_with_the_numbers(peer: RawPeer) -> None:
    peer.say(type="generate", id=1, prompt="a" * (MiB - 1000))
    [failed] = [message for message in peer.hear_all(1) if message["type"] == "failed"]
    assert "context holds 512" in failed["message"]
