"""The body of a request: its bounds, alone and together with others."""

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from starlette.requests import Request

from mgpu.orchestrator.http.edge import body
from mgpu.orchestrator.http.edge.errors import HttpError


def request_of(pieces: Iterator[bytes], *more: tuple[bytes, bytes]) -> Request:
    async def receive() -> dict[str, Any]:
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    headers = [(b"content-type", b"application/json"), *more]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}
    state = {"wait_turn": partial(asyncio.sleep, 0), "charge_front": lambda _nbytes: None}
    return Request(scope | {"state": state}, receive)


def read(*pieces: bytes) -> dict[str, object]:
    return asyncio.run(body.read_object(request_of(iter(pieces))))


def test_pieces_are_put_together() -> None:
    assert read(b'{"a": ', b"1}") == {"a": 1}


def test_a_packed_body_is_refused_by_name() -> None:
    with pytest.raises(HttpError, match="content-encoding is 'gzip'; send the body as it is") as packed:
        asyncio.run(body.read_object(request_of(iter((b"{}",)), (b"content-encoding", b"gzip"))))
    assert packed.value.status == 415
    plain = request_of(iter((b"{}",)), (b"content-encoding", b"identity"))
    assert asyncio.run(body.read_object(plain)) == {}


def test_json_has_one_kind_of_number() -> None:
    found = read(b'{"a": 5.0, "b": 5e2, "c": 0.5, "d": 1e300, "e": [7.0], "f": 9007199254740993.0}')
    assert found == {"a": 5, "b": 500, "c": 0.5, "d": 1e300, "e": [7], "f": 9007199254740993.0}
    assert [type(found[name]) for name in "abcdf"] == [int, int, float, float, float]


def test_one_body_and_all_together_are_bounded_and_counted_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MAX_BODY_BYTES", 100)
    with pytest.raises(HttpError) as large:
        read(b" " * 60, b" " * 60)
    assert large.value.status == 413
    monkeypatch.setattr(body, "MAX_HELD_BYTES", 50)
    with pytest.raises(HttpError) as many:
        read(b" " * 60)
    assert (many.value.status, many.value.headers["retry-after"]) == (503, "1")
    assert read(b'{"a": 1}') == {"a": 1}
    assert body._Held.nbytes == 0


def test_a_body_that_does_not_come_in_time_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.01)

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(HttpError) as late:
        asyncio.run(body.read_object(Request(scope, never)))
    assert late.value.status == 408
    assert body._Held.nbytes == 0


@pytest.mark.parametrize(
    ("begin", "middle", "end", "most"),
    [
        (b"[", b"", b"]", body.MAX_DEPTH - 1),
        (b'{"a":', b"1", b"}", body.MAX_DEPTH - 1),
        (b'[{"a":', b"1", b"}]", body.MAX_DEPTH // 2 - 1),
    ],
)
def test_nesting_is_bounded_whatever_python_can_do(begin: bytes, middle: bytes, end: bytes, most: int) -> None:
    assert read(b'{"x":' + begin * most + middle + end * most + b"}")
    for deep in (most + 1, 30_000):
        with pytest.raises(HttpError, match="nested too deeply") as refused:
            read(b'{"x":' + begin * deep + middle + end * deep + b"}")
        assert refused.value.status == 400


def test_many_objects_beside_one_another_are_not_deep() -> None:
    assert len(read(b'{"x": [' + b'{"a": [1]}, ' * 5000 + b"{}]}")["x"]) == 5001  # type: ignore[arg-type]


def test_a_field_that_comes_twice_is_refused() -> None:
    for data in (b'{"a": 1, "a": 1}', b'{"x": [{"a": 1, "b": 2, "\\u0061": 3}]}'):
        with pytest.raises(HttpError, match="write each field once"):
            read(data)


@pytest.mark.parametrize("text", ["{[" * 40_000, '\\"{' * 70_000, "\\\\" * 5 + "[" * 70_000])
def test_brackets_in_a_text_are_no_objects(text: str) -> None:
    assert read(b'{"a": "' + text.encode() + b'", "b": []}')["b"] == []


@pytest.mark.parametrize("data", [
    b'{"a": [' + b"{}," * 65_535 + b"[]]}",
    b'{"a": "\\"", "b": [' + b"[]," * 65_535 + b"{}]}",
    b'"{' * 1_000_000,
])  # fmt: skip
def test_a_body_of_too_many_parts_is_not_parsed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(HttpError, match="objects and arrays, the limit is 65536") as refused:
        read(data)
    assert refused.value.status == 400


@pytest.mark.parametrize("data", [b'{"a": "' + b'\\"{' * 1_000_000, b'{"a": "' + b'\\"{' * 1_000_000 + b"\\"])
def test_a_text_without_an_end_is_looked_at_once(data: bytes) -> None:
    began_s = time.process_time()
    with pytest.raises(HttpError, match="Unterminated string"):
        read(data)
    assert time.process_time() - began_s < 2.0, "it takes hours if each quote in it is tried as a beginning"


def test_a_large_body_waits_for_its_turn_and_counts_meanwhile() -> None:
    held: list[int] = []
    charged: list[int] = []

    async def wait_turn() -> None:
        held.append(body._Held.nbytes)

    for size in (100, body.LARGE_BYTES + 100):
        request = request_of(iter((b'{"a": 1}' + b" " * size,)))
        request.scope["state"] = {"wait_turn": wait_turn, "charge_front": charged.append}
        assert asyncio.run(body.read_object(request)) == {"a": 1}
    assert held == [body.LARGE_BYTES + 108]
    assert charged == [108, body.LARGE_BYTES + 108]
    assert body._Held.nbytes == 0
