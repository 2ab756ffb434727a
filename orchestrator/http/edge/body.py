"""Read the JSON object of a request: bounded in bytes and time, strict in its encoding."""

import asyncio
import json
import re
from typing import NoReturn

from starlette.requests import ClientDisconnect, Request

from mgpu.orchestrator.http.edge.errors import HttpError, bad_request
from mgpu.orchestrator.http.edge.front_window import WHOSE
from mgpu.protocol.front.fields import shown
from mgpu.protocol.internal.process.free_memory import release_free_memory

MAX_BODY_BYTES = 4 << 20
"""A request of the front channel has 1 MiB at most, and escapes make text up to three times as long in JSON."""
BODY_TIMEOUT_S = 60.0
MAX_DEPTH = 200
"""Objects and arrays in one another. How deep Python itself can read or write them depends on its version."""
MAX_PARTS = 1 << 16
"""Objects and arrays in all. A message of the front channel has 8192 at most. All streams wait while a body is parsed:
half a second of CPU time for a million."""
MAX_HELD_BYTES = 256 << 20
"""Bodies of all requests that are being read. Thousands of connections could each hold one for a minute."""
LARGE_BYTES = 64 << 10
"""What is longer takes more than a millisecond to parse."""
WORTH_RELEASING_BYTES = 32 << 20
RELEASE_AFTER_S = 1.0
"""The buffers of connections that end now are free by then."""
_RETRY_S = 1
_EXACT = 2.0**53
"""Below it a float holds each integer."""
_STRING = re.compile(rb'(?s)"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)')
"""A string in JSON, or the beginning of one that does not end. Without backtracking, so that each byte is read once."""


class _Held:
    """Bytes of the bodies that are being read in this process."""

    nbytes = 0
    freed = 0
    """Bytes of bodies that have been read since free memory was last returned to the system."""


async def read_object(request: Request) -> dict[str, object]:
    """Return the body. HttpError for another type, too many bytes, or what is no JSON object.

    A large one waits for its turn before it is parsed, and counts to the bytes that are being read meanwhile.
    """
    _check_type(request.headers.get("content-type", ""))
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        text = f"content-encoding is {coding[:60]!a}; send the body as it is"
        raise HttpError(415, text, code="unsupported_media_type")
    data = bytearray()
    try:
        await _read(request, data)
        state = request.scope["state"]
        if len(data) > LARGE_BYTES:
            await state["wait_turn"]()
        state["charge_front"](len(data))
        if (whose := WHOSE.get(None)) is not None:
            whose.body_bytes = len(data)
        return parse_object(bytes(data))
    finally:
        _forget(len(data))


def _check_type(written: str) -> None:
    kind = written.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        shown = f"got {kind[:60]!a}" if kind else "got none"
        raise HttpError(
            415, f"content-type must be application/json, {shown} (curl: -H 'content-type: application/json')",
            code="unsupported_media_type",
        )  # fmt: skip


async def _read(request: Request, data: bytearray) -> None:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large(int(length[:20]))
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                data += chunk
                _Held.nbytes += len(chunk)
                if len(data) > MAX_BODY_BYTES:
                    raise _too_large(len(data))
                if _Held.nbytes > MAX_HELD_BYTES:
                    raise _too_many()
    except TimeoutError:
        text = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        raise HttpError(408, text, "timeout_error", "body_timeout", headers={"connection": "close"}) from None


def _forget(nbytes: int) -> None:
    """Count a body no more, and return the memory of many to the system."""
    _Held.nbytes -= nbytes
    _Held.freed += nbytes
    if _Held.freed >= WORTH_RELEASING_BYTES:
        _Held.freed = 0
        asyncio.get_running_loop().call_later(RELEASE_AFTER_S, release_free_memory)


def _too_many() -> HttpError:
    text = f"requests that are being read hold {_Held.nbytes} bytes, the limit is {MAX_HELD_BYTES}; try again"
    return HttpError(503, text, "service_unavailable_error", "overloaded", headers={"retry-after": str(_RETRY_S)})


def _too_large(size: int) -> HttpError:
    return HttpError(413, f"the body has {size} bytes or more, the limit is {MAX_BODY_BYTES}", code="request_too_large")


def parse_object(data: bytes) -> dict[str, object]:
    """Return the JSON object in ``data``. HttpError says what is wrong with it, without any of its text."""
    most_parts = _most_parts(data)
    if most_parts > MAX_PARTS:
        raise bad_request(f"the body has {most_parts} objects and arrays, the limit is {MAX_PARTS}")
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_number, object_pairs_hook=_unambiguous
        )
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # a constant that JSON lacks, a field twice, a number of thousands of digits
        text = str(error) if str(error).startswith("JSON") else "the body has a number of too many digits"
        raise bad_request(text) from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, got {shown(value)}")
    if most_parts > MAX_DEPTH:
        _check_depth(value)
    return value


def _most_parts(data: bytes) -> int:
    """Return how many objects and arrays a JSON text has at most; exactly how many if it could be too many."""
    count = data.count(b"[") + data.count(b"{")
    if count <= MAX_PARTS:
        return count
    outside = _STRING.sub(b"", data)
    return outside.count(b"[") + outside.count(b"{")


def _check_depth(value: dict[str, object]) -> None:
    level: list[dict[str, object] | list[object]] = [value]
    for _ in range(MAX_DEPTH):
        children = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> HttpError:
    return bad_request(f"the body is nested too deeply: more than {MAX_DEPTH} objects and arrays in one another")


def _number(text: str) -> float:
    """Read a number with a point or an exponent. JSON has one kind of number: 5.0 and 5e0 are the integer 5."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


def _unambiguous(fields: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object; a proxy might have looked at another field of the same name than we do."""
    value = dict(fields)
    if len(value) != len(fields):
        raise ValueError("JSON leaves open which of two fields of one name counts; write each field once")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}; leave the field out or write a number")


__all__ = ["BODY_TIMEOUT_S", "MAX_BODY_BYTES", "ClientDisconnect", "parse_object", "read_object"]
