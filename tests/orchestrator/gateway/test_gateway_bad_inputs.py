"""Fields beyond their bounds and floods of bad messages: a clear answer, memory back, the next request served.

Frames and MessagePack that are wrong in themselves are in test_gateway_hostile_input.py, connections in
test_gateway_lifecycle.py.
"""

import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from harness.servers.gateway_process import VOCAB_SIZE, GatewayProcess, assert_serves
from harness.servers.raw_peer import RawPeer
from mgpu.protocol.front.framing import VERSION

MiB = 1 << 20
CONTEXT = 512
USER = {"role": "user", "content": "x"}

BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("a billion choices", {"n": 10**9}, "n must be an integer from 1 to 16"),
    ("no choice", {"n": 0}, "n must be an integer from 1 to 16"),
    ("negative max_tokens", {"max_tokens": -1}, "max_tokens must be an integer from 1"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens must be an integer from 1"),
    ("max_tokens 2^63", {"max_tokens": 2**63}, "max_tokens must be an integer from 1"),
    ("max_tokens above the context", {"max_tokens": 2**31 - 1}, f"the context holds {CONTEXT}"),
    ("a million logprobs", {"logprobs": 10**6}, "logprobs must be an integer from 0 to 20"),
    ("temperature NaN", {"temperature": float("nan")}, "temperature must be a number from 0 to 100"),
    ("temperature infinite", {"temperature": float("inf")}, "temperature must be a number from 0 to 100"),
    ("temperature -1", {"temperature": -1}, "temperature must be a number from 0 to 100"),
    ("temperature 1e308", {"temperature": 1e308}, "temperature must be a number from 0 to 100"),
    ("temperature in words", {"temperature": "hot"}, "temperature must be a number from 0 to 100"),
    ("top_p 0", {"top_p": 0}, "top_p must be a number above 0, at most 1"),
    ("top_p -1", {"top_p": -1.0}, "top_p must be a number above 0, at most 1"),
    ("top_k -2", {"top_k": -2}, "top_k must be an integer from -1"),
    ("a penalty of 1e308", {"presence_penalty": 1e308}, "presence_penalty must be a number from -2 to 2"),
    ("a repetition penalty of 0", {"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
    ("a bias for thousands of tokens", {"logit_bias": [[at, 1.0] for at in range(4000)]}, "logit_bias must be"),
    ("a bias for a token beyond the vocabulary", {"logit_bias": [[VOCAB_SIZE, 1.0]]}, f"token id {VOCAB_SIZE}"),
    ("a bias for a token in words", {"logit_bias": [["a", 1.0]]}, "logit_bias"),
    ("an infinite bias", {"logit_bias": [[1, float("-inf")]]}, "logit_bias"),
    ("ten thousand stop strings", {"stop": ["s"] * 10_000}, "stop must be an array of 0 to 16"),
    ("an empty stop string", {"stop": [""]}, "stop[0] must be a string of 1 to 256"),
    ("a long stop string", {"stop": ["s" * (MiB - 1000)]}, "stop[0] must be a string of 1 to 256"),
    ("no prompt ids", {"prompt_ids": []}, "at least one"),
    ("prompt ids that are no integers", {"prompt_ids": [1.5]}, "prompt_ids"),
    ("prompt ids that are yes and no", {"prompt_ids": [True]}, "prompt_ids"),
    ("a prompt one longer than the context", {"prompt_ids": [1] * (CONTEXT + 1)}, f"the context holds {CONTEXT}"),
    ("a prompt as long as the context", {"prompt_ids": [1] * CONTEXT}, "at most 511 for the prompt"),
    ("a prompt of special tokens", {"prompt": "<|end|>" * 100_000}, f"the context holds {CONTEXT}"),
    ("thousands of turns", {"messages": [USER] * 4000}, "messages must be an array of 1 to 2048"),
    ("a turn without content", {"messages": [{"role": "user", "content": None}]}, "content"),
    ("content in parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "content"),
    ("a turn that is a number", {"messages": [5]}, "messages[0]"),
    ("a model of a megabyte", {"model": "m" * (MiB - 1000)}, "model must be a string of 1 to 512"),
    ("a seed of 2^64 in words", {"seed": "18446744073709551616"}, "seed must be an integer from 0 to"),
    ("seed -1", {"seed": -1}, "seed must be an integer from 0 to"),
    ("a schema for the answer", {"response_format": {"type": "json_schema"}}, "unknown field 'response_format'"),
    ("a pattern that never ends", {"guided_regex": "(a+)+b"}, "unknown field 'guided_regex'"),
    ("a priority beyond its range", {"priority": 1001}, "priority must be an integer from -1000 to 1000"),
    ("a deadline of 0", {"timeout_s": 0}, "timeout_s must be a number above 0"),
    ("a short session", {"session": "short"}, "session must be a string of 16 to 64"),
]  # fmt: skip


@pytest.fixture
def peer(gateway: GatewayProcess) -> Iterator[RawPeer]:
    peer = RawPeer(gateway.endpoint)
    yield peer
    peer.close()


@pytest.mark.parametrize(("fields", "words"), [case[1:] for case in BAD_FIELDS], ids=[case[0] for case in BAD_FIELDS])
def test_a_field_out_of_bounds_is_refused_and_says_what_is_allowed(
    gateway: GatewayProcess, peer: RawPeer, fields: dict[str, Any], words: str
) -> None:
    prompt = {} if fields.keys() & {"prompt", "prompt_ids", "messages"} else {"prompt_ids": [5]}
    peer.say(type="generate", id=1, **prompt, **fields)
    [failed] = [message for message in peer.hear_all(1) if message["type"] == "failed"]
    assert failed["code"] == "bad_request"
    assert words in failed["message"], failed["message"]
    assert len(failed["message"]) < 1000, "an answer need not repeat what was sent"
    assert_serves(gateway.endpoint)


def test_a_path_is_no_model(gateway: GatewayProcess, peer: RawPeer) -> None:
    for at, name in enumerate(["../../etc/passwd", "https://example.org/model", "tiny/"]):
        peer.say(type="generate", id=at, prompt_ids=[5], model=name)
        [failed] = peer.hear_all(at)
        assert (failed["code"], "is not served here" in failed["message"]) == ("unknown_model", True)


def hostile_messages() -> list[tuple[bytes, ...]]:
    """One of each kind that has an answer of its own."""
    bodies = [msgpack.packb({"type": "generate", "id": 1, "prompt_ids": [5], **case[1]}) for case in BAD_FIELDS]
    small = [body for body in bodies if len(body) < 1 << 16]
    bombs = [b"\x91" * 10_000, b"\xdd" + struct.pack(">I", 2**31), b"\xc1", b"", b"\x81\xa1x\xc7\x01\x05x"]
    frames: list[tuple[bytes, ...]] = [(VERSION, body) for body in small + bombs]
    return [*frames, (b"mgpu0", b"x"), (VERSION,), (VERSION, *[b"x"] * 100), (b"",)]


def test_ten_thousand_hostile_messages_are_all_answered_and_leave_no_memory_behind(
    gateway: GatewayProcess, peer: RawPeer
) -> None:
    messages = hostile_messages()

    def flood(count: int) -> None:
        for at in range(0, count, 100):
            for frames in (messages[(at + step) % len(messages)] for step in range(100)):
                peer.send(*frames)
            for _ in range(100):
                assert peer.hear()["type"] == "failed"

    flood(1000)  # what Python and libzmq keep once they have needed it
    before = gateway.resident_bytes()
    flood(10_000)
    assert gateway.resident_bytes() - before < 8 * MiB
    assert_serves(gateway.endpoint)


def test_large_requests_that_are_cancelled_at_once_leave_no_memory_behind(
    gateway: GatewayProcess, peer: RawPeer
) -> None:
    """Each is cancelled before, while or after a thread tokenizes it; some are refused because so many wait."""
    turn = {"role": "user", "content": "x" * 100_000}

    def rounds(first: int, count: int) -> None:
        for request_id in range(first, first + count):
            peer.say(type="generate", id=request_id, messages=[turn])
            peer.say(type="cancel", id=request_id)
        open_ids = set(range(first, first + count))
        while open_ids:
            message = peer.hear()
            if message["type"] in ("finished", "failed"):
                open_ids.remove(message["id"])

    rounds(0, 50)
    before = gateway.resident_bytes()
    rounds(50, 250)
    assert_serves(gateway.endpoint)
    assert gateway.resident_bytes() - before < 48 * MiB
