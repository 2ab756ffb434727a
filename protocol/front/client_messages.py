"""Messages from a client to the gateway: named maps that any language can build (docs/protocol.md).

The tables below hold the bounds of all fields. The client checks with them before it sends, the gateway when it
receives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from mgpu.protocol.front.fields import (
    INT32_MAX,
    Choice,
    FieldError,
    Flag,
    Integer,
    Number,
    Pairs,
    Record,
    Rule,
    Sequence,
    Text,
    TokenIds,
    parse_fields,
)

QueryKind = Literal["health", "stats", "models"]

MAX_CHOICES = 16
REQUEST_ID = Integer(0, 2**63 - 1)
MAX_TEXT_CHARS = 2**27 - 1
"""Bound of one string; the frame size is the tighter one."""

SESSION = Text(64, 16)
ROLE = Choice(("system", "developer", "user", "assistant", "tool"))
CHAT_MESSAGE = Record({"role": ROLE, "content": Text(MAX_TEXT_CHARS)})
TEMPLATE_OPTIONS = Record(
    {"enable_thinking": Flag(), "thinking": Flag(), "reasoning_effort": Text(32), "date_string": Text(64)},
    optional=True,
)

GENERATE_RULES: dict[str, Rule] = {
    "id": REQUEST_ID,
    "prompt": Text(MAX_TEXT_CHARS, 1),
    "prompt_ids": TokenIds(),
    "messages": Sequence(CHAT_MESSAGE, 2048, 1),
    "template_options": TEMPLATE_OPTIONS,
    "model": Text(512, 1),
    "stream": Flag(),
    "n": Integer(1, MAX_CHOICES),
    "max_tokens": Integer(1, INT32_MAX),
    "min_tokens": Integer(0, INT32_MAX),
    "temperature": Number(0, 100),
    "top_k": Integer(-1, INT32_MAX),
    "top_p": Number(0, 1, low_open=True),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(0, 10, low_open=True),
    "presence_penalty": Number(-2, 2),
    "frequency_penalty": Number(-2, 2),
    "seed": Integer(0, 2**64 - 1),
    "logit_bias": Pairs(Number(-100, 100), 1024),
    "logprobs": Integer(0, 20),
    "stop": Sequence(Text(256, 1), 16),
    "stop_token_ids": Sequence(Integer(0, INT32_MAX), 64),
    "ignore_eos": Flag(),
    "skip_special_tokens": Flag(),
    "priority": Integer(-1000, 1000),
    "cache_salt": Text(256),
    "timeout_s": Number(0, 86400, low_open=True),
    "session": SESSION,
}
RESUME_RULES: dict[str, Rule] = {
    "id": REQUEST_ID,
    "session": SESSION,
    "offsets": Sequence(Integer(-1, INT32_MAX), MAX_CHOICES, 1),
}
QUERY_RULES: dict[str, Rule] = {"id": REQUEST_ID}
CLIENT_TYPE = Choice(("generate", "resume", "cancel", *get_args(QueryKind)))


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for ``n`` continuations of exactly one of ``prompt``, ``prompt_ids`` and ``messages``."""

    id: int
    """Chosen by the client; unique among its own requests in flight."""
    prompt: str | None = None
    prompt_ids: bytes | None = None
    """Little-endian int32."""
    messages: tuple[dict[str, str], ...] | None = None
    """Chat turns with role and content, rendered by the model's own template."""
    template_options: dict[str, object] | None = None
    model: str | None = None
    stream: bool = False
    """False: one `Tokens` per choice, at its end."""
    n: int = 1
    max_tokens: int | None = None
    """None: as many as the context still holds."""
    min_tokens: int = 0
    """No end-of-sequence, stop token or stop string before this many tokens."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0 or -1: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: the gateway draws one and tells it in `Accepted`."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """None: none; 0: of the chosen token; N: of the N likeliest too."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""
    """Prefixes are shared only between requests of the same salt."""
    timeout_s: float | None = None
    """The gateway ends the request with deadline_exceeded after this many seconds."""
    session: str | None = None
    """The client's secret, the same in all its requests; without it a request ends with its connection's gateway."""


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """End a request of this connection; an unknown id is ignored, since it may just have finished."""

    id: int


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """Go on with a request after the connection was lost, from where this client has read."""

    id: int
    session: str
    offsets: tuple[int, ...]
    """Per choice: tokens received, or -1 when its finish reason was."""


@dataclass(frozen=True, slots=True)
class Query:
    """Ask for health, stats or models."""

    kind: QueryKind
    id: int


ClientMessage = Generate | ResumeRequest | CancelRequest | Query


def parse_client_message(data: Mapping[object, object]) -> ClientMessage:
    """Check a decoded map against the tables. FieldError says which field, its value and what is allowed."""
    kind = CLIENT_TYPE.parse("type", data.get("type"))
    rest = {name: value for name, value in data.items() if name != "type"}
    if kind == "generate":
        return _parse_generate(rest)
    if kind == "resume":
        return ResumeRequest(**_parsed(rest, RESUME_RULES, *RESUME_RULES))
    request_id = _parsed(rest, QUERY_RULES, "id")["id"]
    return CancelRequest(request_id) if kind == "cancel" else Query(cast("QueryKind", kind), request_id)


def _parsed(data: Mapping[object, object], rules: Mapping[str, Rule], *required: str) -> dict[str, Any]:
    parsed = parse_fields(data, rules)
    for name in required:
        if name not in parsed:
            raise FieldError(f"{name} is missing; it must be {rules[name].allowed}")
    return parsed


def _parse_generate(data: Mapping[object, object]) -> Generate:
    parsed = _parsed(data, GENERATE_RULES, "id")
    request = Generate(**parsed)
    given = [name for name in ("prompt", "prompt_ids", "messages") if name in parsed]
    if len(given) != 1:
        raise FieldError(f"give exactly one of prompt, prompt_ids and messages, got {' and '.join(given) or 'none'}")
    if request.template_options and request.messages is None:
        raise FieldError("template_options only apply to messages")
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise FieldError(f"min_tokens ({request.min_tokens}) is above max_tokens ({request.max_tokens})")
    return request
