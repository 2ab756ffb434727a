"""Messages from a client to the gateway: named maps that any language can build (docs/protocol.md).

Each field is annotated with the rule that bounds it. The client checks with these rules before it sends, the gateway
when it receives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

from mgpu.protocol.front.chat_messages import (
    CHAT,
    DOCUMENTS,
    MAX_TEXT_CHARS,
    TEMPLATE_OPTIONS,
    TOOL_CHOICE,
    TOOLS,
    check_choice,
)
from mgpu.protocol.front.fields import (
    INT32_MAX,
    Array,
    FieldError,
    Flag,
    Integer,
    Number,
    OneOf,
    Pairs,
    Rule,
    Text,
    TokenIds,
    parse_fields,
)
from mgpu.protocol.front.structured_outputs import StructuredOutputs

QueryKind = Literal["health", "stats", "models"]

TextResult = Literal["token_ids", "count", "text"]

MAX_CHOICES = 16
MAX_EMITTED_TOKENS = 1 << 16
"""Their text is made in one turn of the gateway's loop."""
REQUEST_ID = Integer(0, 2**63 - 1)
SESSION = Text(64, 16)


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for ``n`` continuations of exactly one of ``prompt``, ``prompt_ids`` and ``messages``."""

    id: Annotated[int, REQUEST_ID]
    """Chosen by the client; unique among its own requests in flight."""
    prompt: Annotated[str | None, Text(MAX_TEXT_CHARS, 1)] = None
    prompt_ids: Annotated[bytes | None, TokenIds()] = None
    """Little-endian int32."""
    messages: Annotated[tuple[dict[str, object], ...] | None, CHAT] = None
    """Chat turns, rendered by the model's own template."""
    tools: Annotated[tuple[dict[str, object], ...] | None, TOOLS] = None
    """Functions that the model may call."""
    tool_choice: Annotated[object, TOOL_CHOICE] = "auto"
    """A word, or a map with the name of the tool that must be called."""
    parallel_tool_calls: Annotated[bool, Flag()] = True
    """False: only the first call of an answer counts."""
    documents: Annotated[tuple[dict[str, object], ...] | None, DOCUMENTS] = None
    """Texts that the template shows the model, for models that know this."""
    template_options: Annotated[dict[str, object] | None, TEMPLATE_OPTIONS] = None
    thinking_token_budget: Annotated[int | None, Integer(0, INT32_MAX)] = None
    """None: no bound of its own. Else the longest reasoning before the answer, in tokens."""
    show_markers: Annotated[bool, Flag()] = False
    """Show the special tokens that mark tool calls and reasoning; `Accepted` says what their format is."""
    model: Annotated[str | None, Text(512, 1)] = None
    stream: Annotated[bool, Flag()] = False
    """False: one `Tokens` per choice, at its end."""
    n: Annotated[int, Integer(1, MAX_CHOICES)] = 1
    max_tokens: Annotated[int | None, Integer(1, INT32_MAX)] = None
    """None: as many as the context still holds."""
    min_tokens: Annotated[int, Integer(0, INT32_MAX)] = 0
    """No end-of-sequence, stop token or stop string before this many tokens."""
    temperature: Annotated[float, Number(0, 100)] = 0.0
    """0: greedy."""
    top_k: Annotated[int, Integer(-1, INT32_MAX)] = 0
    """0 or -1: off."""
    top_p: Annotated[float, Number(0, 1, low_open=True)] = 1.0
    min_p: Annotated[float, Number(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Number(0, 10, low_open=True)] = 1.0
    presence_penalty: Annotated[float, Number(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Number(-2, 2)] = 0.0
    seed: Annotated[int | None, Integer(0, 2**64 - 1)] = None
    """None: the gateway draws one and tells it in `Accepted`."""
    logit_bias: Annotated[tuple[tuple[int, float], ...], Pairs(Number(-100, 100), 1024)] = ()
    logprobs: Annotated[int | None, Integer(0, 20)] = None
    """None: none; 0: of the chosen token; N: of the N likeliest too."""
    stop: Annotated[tuple[str, ...], Array(Text(256, 1), 16)] = ()
    stop_token_ids: Annotated[tuple[int, ...], Array(Integer(0, INT32_MAX), 64)] = ()
    ignore_eos: Annotated[bool, Flag()] = False
    skip_special_tokens: Annotated[bool, Flag()] = True
    structured_outputs: Annotated[dict[str, object] | None, StructuredOutputs()] = None
    """What the text must be: a JSON document, a match of an expression, one of some texts, or of a grammar."""
    priority: Annotated[int, Integer(-1000, 1000)] = 0
    cache_salt: Annotated[str, Text(256)] = ""
    """Prefixes are shared only between requests of the same salt."""
    account: Annotated[str, Text(128)] = ""
    """From a server that speaks for several clients, such as the HTTP process: whose request this is."""
    timeout_s: Annotated[float | None, Number(0, 86400, low_open=True)] = None
    """The gateway ends the request with deadline_exceeded after this many seconds."""
    session: Annotated[str | None, SESSION] = None
    """The client's secret, the same in all its requests. Without it a request ends with its connection's gateway."""
    keep_s: Annotated[float, Number(0, 60)] = 0.0
    """With a session: how long the request goes on after its connection is lost, so that it can be resumed."""
    emitted_ids: Annotated[bytes | None, TokenIds()] = None
    """The tokens that another server has answered to the same request with the same seed: this one goes on from there.

    Little-endian int32.
    """


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """Continue a request on a new connection, from where this client has read."""

    id: Annotated[int, REQUEST_ID]
    session: Annotated[str, SESSION]
    offsets: Annotated[tuple[int, ...], Array(Integer(-1, INT32_MAX), MAX_CHOICES, 1)]
    """Per choice: tokens received, or -1 when its finish reason was."""


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """End a request of this connection. An unknown id is ignored, since the request may just have finished."""

    id: Annotated[int, REQUEST_ID]


@dataclass(frozen=True, slots=True)
class TakeBatches:
    """Say that this client reads arrays of messages. It has no answer."""

    id: Annotated[int, REQUEST_ID]


@dataclass(frozen=True, slots=True)
class Query:
    """Ask for health, stats or models."""

    kind: QueryKind
    id: int


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Ask what the server makes of exactly one of ``prompt`` and ``messages`` before the model sees it."""

    id: Annotated[int, REQUEST_ID]
    prompt: Annotated[str | None, Text(MAX_TEXT_CHARS)] = None
    messages: Annotated[tuple[dict[str, object], ...] | None, CHAT] = None
    tools: Annotated[tuple[dict[str, object], ...] | None, TOOLS] = None
    documents: Annotated[tuple[dict[str, object], ...] | None, DOCUMENTS] = None
    template_options: Annotated[dict[str, object] | None, TEMPLATE_OPTIONS] = None
    model: Annotated[str | None, Text(512, 1)] = None
    returns: Annotated[TextResult, OneOf(get_args(TextResult))] = "token_ids"
    """The token ids, only their number, or the text that the chat template makes of ``messages``."""
    add_special_tokens: Annotated[bool, Flag()] = True
    """Begin a ``prompt`` with the beginning-of-sequence token if the model wants one, as `Generate` does."""
    timeout_s: Annotated[float | None, Number(0, 86400, low_open=True)] = None


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Ask for the text of token ids."""

    id: Annotated[int, REQUEST_ID]
    token_ids: Annotated[bytes, TokenIds()]
    model: Annotated[str | None, Text(512, 1)] = None
    skip_special_tokens: Annotated[bool, Flag()] = False
    timeout_s: Annotated[float | None, Number(0, 86400, low_open=True)] = None


TextQuery = Tokenize | Detokenize
ClientMessage = Generate | ResumeRequest | CancelRequest | TakeBatches | Query | TextQuery


def _rules_of(message: type) -> dict[str, Rule]:
    hints = get_type_hints(message, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


GENERATE_RULES = _rules_of(Generate)
_RESUME_RULES = _rules_of(ResumeRequest)
_ID_RULES = _rules_of(CancelRequest)
TOKENIZE_RULES = _rules_of(Tokenize)
DETOKENIZE_RULES = _rules_of(Detokenize)
_TYPE = OneOf(("generate", "resume", "cancel", "batch", "tokenize", "detokenize", *get_args(QueryKind)))


def parse_client_message(data: Mapping[object, object]) -> ClientMessage:
    """Check a decoded map against the rules. FieldError names the field, its value and what is allowed."""
    kind = _TYPE.parse("type", data.get("type"))
    rest = {name: value for name, value in data.items() if name != "type"}
    if kind == "generate":
        return _parse_generate(rest)
    if kind == "resume":
        return ResumeRequest(**_parsed(rest, _RESUME_RULES, *_RESUME_RULES))
    if kind == "tokenize":
        return _parse_tokenize(rest)
    if kind == "detokenize":
        return Detokenize(**_parsed(rest, DETOKENIZE_RULES, "id", "token_ids"))
    request_id = _parsed(rest, _ID_RULES, "id")["id"]
    if kind == "batch":
        return TakeBatches(request_id)
    return CancelRequest(request_id) if kind == "cancel" else Query(cast("QueryKind", kind), request_id)


def _parse_generate(data: Mapping[object, object]) -> Generate:
    parsed = _parsed(data, GENERATE_RULES, "id")
    request = Generate(**parsed)
    given = [name for name in ("prompt", "prompt_ids", "messages") if name in parsed]
    if len(given) != 1:
        raise FieldError(f"give exactly one of prompt, prompt_ids and messages, got {' and '.join(given) or 'none'}")
    _check_chat(request, "apply")
    check_choice(request.tools, request.tool_choice)
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise FieldError(f"min_tokens ({request.min_tokens}) is above max_tokens ({request.max_tokens})")
    if request.emitted_ids is not None:
        _check_emitted(len(request.emitted_ids) // 4, request.n)
    if request.thinking_token_budget is not None:
        _check_thinking(request)
    if request.structured_outputs is not None and (request.ignore_eos or request.min_tokens):
        option = "ignore_eos" if request.ignore_eos else "min_tokens"
        raise FieldError(f"{option} does not go with structured_outputs, which alone decides when an answer may end")
    return request


def _check_thinking(request: Generate) -> None:
    if request.messages is None:
        raise FieldError("thinking_token_budget only applies to messages")
    if request.ignore_eos:
        raise FieldError("ignore_eos does not go with thinking_token_budget; leave one of the two out")


def _check_emitted(num_tokens: int, n: int) -> None:
    if n != 1:
        raise FieldError(f"emitted_ids continue one choice, and n is {n}")
    if num_tokens > MAX_EMITTED_TOKENS:
        raise FieldError(f"emitted_ids are {num_tokens} tokens; at most {MAX_EMITTED_TOKENS} can be continued")


def _parse_tokenize(data: Mapping[object, object]) -> Tokenize:
    query = Tokenize(**_parsed(data, TOKENIZE_RULES, "id"))
    if (query.prompt is None) == (query.messages is None):
        given = "both" if query.messages is not None else "neither"
        raise FieldError(f"give exactly one of prompt and messages, got {given}")
    if query.messages is None and query.returns == "text":
        raise FieldError("returns 'text' only applies to messages")
    _check_chat(query, "applies")
    return query


def _check_chat(request: Generate | Tokenize, verb: str) -> None:
    """Raise FieldError for fields of a chat without messages."""
    for name in ("template_options", "tools", "documents"):
        if request.messages is None and getattr(request, name, None):
            raise FieldError(f"{name} only {verb} to messages")


def _parsed(data: Mapping[object, object], rules: Mapping[str, Rule], *required: str) -> dict[str, Any]:
    parsed = parse_fields(data, rules)
    for name in required:
        if name not in parsed:
            raise FieldError(f"{name} is missing; it must be {rules[name].allowed}")
    return parsed
