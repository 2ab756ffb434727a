"""Messages from the gateway to its clients: named maps that any language can read (docs/protocol.md).

Every request ends in exactly one `Finished` or `Failed`, and every query in its reply or `Failed`.
"""

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from mgpu.protocol.front.fields import FieldError, shown

FailureCode = Literal[
    "bad_request",
    "bad_version",
    "duplicate_id",
    "unknown_request",
    "unknown_model",
    "not_allowed",
    "not_ready",
    "draining",
    "overloaded",
    "slow_reader",
    "deadline_exceeded",
    "engine_error",
    "stopped",
]


@dataclass(frozen=True, slots=True)
class Accepted:
    id: int
    model: str
    prompt_tokens: int
    max_tokens: int
    seed: int
    tool_format: str | None = None
    """The format of tool calls, if the request has asked to show markers and the format is known."""
    reasoning_format: str | None = None
    in_reasoning: bool | None = None
    """True if the prompt has begun the reasoning, so that the answer goes on with it."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The messages that follow continue the request from ``offsets``; earlier ones on the connection are void."""

    id: int
    offsets: list[int] | None = None
    """Those of the `resume` that is answered; None from servers that do not send them."""


@dataclass(slots=True)
class Tokens:
    """New tokens of one choice. Not frozen: one is made for every token, and a frozen one takes three times as long.

    ``text`` may lag behind ``token_ids``: it never ends inside a character or a possible stop string.
    """

    id: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[str, Any]] | None = None
    """Parallel to ``token_ids``: logprob, and top as [token id, logprob, text] triples."""
    finish_reason: str | None = None
    """Set in the last message of the choice."""
    stop_string: str | None = None
    """Set there too if one of ``stop`` has ended the choice: that string."""


@dataclass(frozen=True, slots=True)
class Finished:
    """All choices of the request have ended."""

    id: int
    finish_reasons: list[str]
    """One per choice."""
    prompt_tokens: int
    completion_tokens: int
    """All choices together."""
    cached_tokens: int
    """Prompt tokens of the first choice that came from the prefix cache."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a result. ``id`` is None when the cause cannot be tied to one request."""

    id: int | None
    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Keepalive:
    """The request is alive, though nothing else was sent for about a second."""

    id: int


@dataclass(frozen=True, slots=True)
class Health:
    id: int
    state: str
    """starting, ready, recovering, stalled, draining or stopped."""
    model: str
    max_seq_len: int
    kv_tokens: int
    in_flight: int
    """Requests of all clients."""
    uptime_s: float
    layout: str
    running: int = 0
    """Sequences on the workers."""
    waiting: int = 0
    """Sequences that wait for the workers."""
    last_step_age_s: float = 0.0
    """Since the last result of the workers."""
    restarts: int = 0
    """Restarts of the workers since the start."""
    last_recovery_s: float = 0.0
    """Duration of the last restart."""
    version: str = ""
    """Of mgpu, as the server runs it."""
    connections: int = 0
    """Open connections of all clients."""
    own_connections: int = 0
    """Those of the key that asks; without keys, of the process (ipc) or address."""


@dataclass(frozen=True, slots=True)
class Stats:
    id: int
    counters: dict[str, float]


@dataclass(frozen=True, slots=True)
class Models:
    id: int
    models: list[dict[str, Any]]
    """name, max_seq_len, vocab_size, chat (whether it has a chat template), tool_format, reasoning_format."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """What a prompt or chat becomes. Only what was asked for is set."""

    id: int
    num_tokens: int | None = None
    token_ids: bytes | None = None
    """Little-endian int32."""
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Detokenized:
    id: int
    text: str


ServerMessage = (
    Accepted | Resumed | Tokens | Finished | Failed | Keepalive | Health | Stats | Models | Tokenized | Detokenized
)

SERVER_TYPES: dict[str, type[Any]] = {cls.__name__.lower(): cls for cls in get_args(ServerMessage)}
_FIELDS = {kind: tuple(field.name for field in fields(cls)) for kind, cls in SERVER_TYPES.items()}


def to_map(message: ServerMessage) -> dict[str, object]:
    """Return the named map of a server message; fields that are None are left out."""
    kind = type(message).__name__.lower()
    values: dict[str, object] = {"type": kind}
    for name in _FIELDS[kind]:
        value = getattr(message, name)
        if value is not None:
            values[name] = value
    return values


def _fits(hint: Any) -> Callable[[object], bool]:
    """Return the test of whether a value has the annotated type. A boolean is no number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        tests = [_fits(each) for each in args]
        return lambda value: any(test(value) for test in tests)
    if origin is list:
        item = _fits(args[0])
        return lambda value: isinstance(value, list) and all(map(item, value))
    if origin is dict:
        item = _fits(args[1])
        return lambda value: isinstance(value, dict) and all(map(item, value.values()))
    if hint is int:
        return lambda value: type(value) is int
    if hint is float:
        return lambda value: type(value) is int or type(value) is float
    return (lambda _: True) if hint is Any else (lambda value: isinstance(value, hint))


_TESTS = {kind: {name: _fits(hint) for name, hint in get_type_hints(cls).items()} for kind, cls in SERVER_TYPES.items()}
_fits_retry, _fits_ids = _TESTS["failed"]["retry_after_s"], _TESTS["tokenized"]["token_ids"]
_TESTS["failed"]["retry_after_s"] = lambda value: _fits_retry(value) and 0 <= cast("float", value or 0) < math.inf
_TESTS["tokenized"]["token_ids"] = lambda value: _fits_ids(value) and len(cast("bytes", value or b"")) % 4 == 0


def parse_server_message(data: Mapping[object, object]) -> ServerMessage:
    """Build a server message from its map; fields unknown to this version are skipped. FieldError for a wrong map."""
    kind = str(data.get("type"))
    cls = SERVER_TYPES.get(kind)
    if cls is None:
        raise FieldError(f"unknown message type {kind[:40]!r}")
    known: dict[str, Any] = {}
    for name, fits in _TESTS[kind].items():
        if name in data:
            value = known[name] = data[name]
            if not fits(value):
                raise FieldError(f"{name} of {kind} is {shown(value)}")
    if cls is Failed:
        known.setdefault("id", None)
    try:
        return cast("ServerMessage", cls(**known))
    except TypeError as error:
        raise FieldError(f"incomplete {cls.__name__.lower()} message: {error}") from None
