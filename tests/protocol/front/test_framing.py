"""Framing and limits of the front channel."""

import contextlib
import os
import time

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.protocol.front.framing import (
    FROM_CLIENT,
    FROM_SERVER,
    VERSION,
    WireError,
    batch_of,
    pack,
    unpack,
    unpack_batch,
)

MAX_FRAME_BYTES = FROM_CLIENT.frame_bytes


def test_a_message_survives_packing() -> None:
    values = {
        "type": "generate", "id": 1, "prompt": "é€😀", "prompt_ids": b"\x01\x00", "nothing": None, "x": [1.5, True],
    }  # fmt: skip
    assert unpack(pack(values)) == values


@pytest.mark.parametrize("count", [1, 2, 15, 16, 1024])
def test_a_batch_has_its_messages_in_order(count: int) -> None:
    messages = [{"id": at} for at in range(count)]
    body = batch_of([pack(each)[1] for each in messages])
    assert unpack_batch([VERSION, body]) == messages
    assert body == msgpack.packb(messages if count > 1 else messages[0])


@pytest.mark.parametrize("body", [b"\x01", b"\x91\x01", b"\x92\x80\x90", b"\xdc\xff\xff"])
def test_a_batch_of_anything_but_maps_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        unpack_batch([VERSION, body])


def test_a_message_of_the_server_may_have_16_mib() -> None:
    whole = pack({"x": b"x" * ((16 << 20) - 8)})
    assert len(whole[1]) == 16 << 20
    assert len(unpack(whole, FROM_SERVER)) == 1
    with pytest.raises(WireError, match=f"{(16 << 20) + 1} bytes"):
        unpack([VERSION, whole[1] + b"x"], FROM_SERVER)


@pytest.mark.parametrize("value", ["\ud800", 2**64, object()])
def test_what_cannot_be_packed_is_a_value_error(value: object) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        pack({"x": value})


@pytest.mark.parametrize(("frames", "code", "words"), [
    ([], "bad_version", "no frame"),
    ([b""], "bad_version", "mgpu1"),
    ([b"mgpu0", b"\x80"], "bad_version", "mgpu0"),
    ([VERSION], "bad_request", "got 1"),
    ([VERSION, b"\x80", b"\x80"], "bad_request", "got 3"),
    ([VERSION] * 6, "bad_request", "more than 4"),
    ([VERSION, b"\x90"], "bad_request", "list"),
    ([VERSION, bytes(MAX_FRAME_BYTES + 1)], "bad_request", f"{MAX_FRAME_BYTES + 1} bytes"),
])  # fmt: skip
def test_wrong_frames_are_told_what_is_expected(frames: list[bytes], code: str, words: str) -> None:
    with pytest.raises(WireError, match=words) as caught:
        unpack(frames)
    assert caught.value.code == code


def test_a_megabyte_of_tiny_arrays_is_refused_quickly() -> None:
    body = msgpack.packb({"x": [[[] for _ in range(1000)] for _ in range(900)]})
    started = time.process_time()
    with pytest.raises(WireError, match="arrays and maps"):
        unpack([VERSION, body])
    assert time.process_time() - started < 1.5


def test_a_schema_of_hundreds_of_properties_is_read() -> None:
    properties = {f"property_{at}": {"type": "string"} for at in range(FROM_CLIENT.map_items)}
    message = {"tools": [{"function": {"parameters": {"type": "object", "properties": properties}}}]}
    assert unpack(pack(message)) == message
    properties["one more"] = {}
    with pytest.raises(WireError, match="1025 exceeds max_map_len"):
        unpack(pack(message))


def test_a_megabyte_of_large_maps_is_read_quickly() -> None:
    body = msgpack.packb({f"{at}": {f"{key:x}": 0 for key in range(1024)} for at in range(200)})
    started = time.process_time()
    assert len(unpack([VERSION, body])) == 200
    assert time.process_time() - started < 0.5


@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_a_wire_error(body: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(unpack([VERSION, body]), dict)


def test_random_megabytes_are_wire_errors() -> None:
    for _ in range(20):
        with pytest.raises(WireError):
            unpack([VERSION, os.urandom(MAX_FRAME_BYTES)])


def test_a_message_of_exactly_the_limit_is_read() -> None:
    frames = pack({"x": b""})
    filler = MAX_FRAME_BYTES - len(pack({"x": bytes(70_000)})[1]) + 70_000
    frames = pack({"x": bytes(filler)})
    assert len(frames[1]) == MAX_FRAME_BYTES
    assert unpack(frames) == {"x": bytes(filler)}
    with pytest.raises(WireError, match=f"{MAX_FRAME_BYTES + 1} bytes, the limit is {MAX_FRAME_BYTES}"):
        unpack(pack({"x": bytes(filler + 1)}))
