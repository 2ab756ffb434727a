"""Build the message of a request and check it before it is sent."""

import json
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict, TypeVar, cast

from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.chat_messages import TOOL_CHOICES
from mgpu.protocol.front.client_messages import parse_client_message
from mgpu.protocol.front.fields import FieldError, TokenIds

T = TypeVar("T")


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of the client's generate, stream, chat and stream_chat.

    ``help(mgpu.Client.generate)`` says what they mean, may be and are by default.
    """

    model: str
    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logit_bias: Mapping[int, float]
    logprobs: int | None
    stop: str | list[str] | tuple[str, ...]
    stop_token_ids: list[int] | tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    structured_outputs: Mapping[str, object] | None
    json_schema: object
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    priority: int
    cache_salt: str
    account: str
    timeout_s: float
    tools: Sequence[Mapping[str, object]]
    tool_choice: str | Mapping[str, object]
    parallel_tool_calls: bool
    documents: Sequence[Mapping[str, object]]
    template_options: Mapping[str, object]
    thinking_token_budget: int | None


SHORTCUTS = ("json_schema", "regex", "choice", "grammar")
"""Options of their own for the forms of ``structured_outputs``."""


def prompt_field(prompt: str | Sequence[int]) -> dict[str, object]:
    """Return the field for a prompt of text or token ids. RequestFailed says what is wrong with it."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise RequestFailed("bad_request", "prompt must be text or a sequence of token ids, got bytes; use .decode()")
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], str):
        raise RequestFailed(
            "bad_request", "prompt must be one prompt, got several strings; generate and map take several"
        )
    try:
        ids: list[object] = _listed("prompt", prompt, "text or a sequence of token ids")
        if set(map(type, ids)) != {int}:
            ids = [plain(each) for each in ids]
        return {"prompt_ids": TokenIds().parse("prompt", ids)}
    except FieldError as error:
        raise RequestFailed("bad_request", str(error)) from None


def chat_fields(messages: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the fields for chat messages whose answer is parsed. RequestFailed says what is wrong with them."""
    return {**messages_field(messages), "show_markers": True}


def messages_field(messages: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the field for chat messages. RequestFailed says what is wrong with them."""
    allowed = 'a list such as [{"role": "user", "content": "Hello"}]'
    is_text = isinstance(messages, (str, bytes, bytearray, memoryview, Mapping))
    turns = [] if is_text else _listed("messages", messages, allowed)
    if is_text or any(isinstance(turn, (str, bytes)) for turn in turns):
        got = type(messages).__name__ if is_text else "a list of texts"
        raise RequestFailed("bad_request", f"messages must be {allowed}, got {got}")
    return {"messages": [dict(turn) if isinstance(turn, Mapping) else turn for turn in turns]}


def generate_message(
    request_id: int, what: Mapping[str, object], options: GenerateOptions, *, stream: bool, timeout_s: float
) -> dict[str, object]:
    """Build and check a generate message; ``what`` is its prompt or chat messages. RequestFailed says what is wrong.

    ``timeout_s`` is that of the options, or the client's if they name none.
    """
    values: dict[str, object] = {"type": "generate", "id": request_id, **what, "stream": stream}
    values |= {name: plain(value) for name, value in options.items()}
    values["timeout_s"] = plain(timeout_s)
    _join_forms(values)
    stop, bias = values.get("stop"), values.get("logit_bias")
    if isinstance(stop, str):
        values["stop"] = [stop]
    if isinstance(bias, Mapping):
        values["logit_bias"] = [[plain(token_id), plain(value)] for token_id, value in bias.items()]
    if isinstance(banned := values.get("stop_token_ids"), (list, tuple)):
        values["stop_token_ids"] = [plain(each) for each in banned]
    choice = values.get("tool_choice")
    if isinstance(choice, str) and choice not in TOOL_CHOICES:
        values["tool_choice"] = {"name": choice}
    return checked(values)


def _join_forms(values: dict[str, object]) -> None:
    """Make ``structured_outputs`` of the shortcuts. RequestFailed for several forms, or a schema that is none."""
    given = {name: value for name in SHORTCUTS if (value := values.pop(name, None)) is not None}
    form = values.get("structured_outputs")
    if (given and form is not None) or len(given) > 1:
        names = ", ".join([*given, *(["structured_outputs"] if form is not None else [])])
        raise RequestFailed("bad_request", f"give one form of the answer, got {names}")
    if given:
        values["structured_outputs"] = form = given
    if isinstance(form, Mapping) and form.get("json_schema") is not None:
        values["structured_outputs"] = {**form, "json_schema": _schema_text(form["json_schema"])}


def _schema_text(schema: object) -> str:
    """Return a JSON Schema as text: of a map, a text, or a class that can describe itself, such as pydantic's models.

    RequestFailed for anything else.
    """
    if isinstance(schema, str):
        return schema
    describe = getattr(schema, "model_json_schema", None)
    value = describe() if callable(describe) else schema
    if not isinstance(value, (Mapping, bool)):
        kind = type(schema).__name__
        raise RequestFailed("bad_request", f"json_schema must be a map, JSON text or a pydantic model, got {kind}")
    try:
        return json.dumps(value if isinstance(value, bool) else dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestFailed("bad_request", f"json_schema is no JSON: {str(error)[:200]}") from None


def plain(value: object) -> object:
    """Return a number of numpy or torch as Python's own; anything else as it is."""
    if isinstance(value, (bool, str)) or type(value) in (int, float) or value is None:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return float(value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # no integer, or a tensor of several, or one of a device that is gone
        return value


def checked(values: Mapping[str, object]) -> dict[str, object]:
    """Return a message without its empty fields, if the server's rules allow it. RequestFailed says what is wrong."""
    try:
        parse_client_message(cast("Mapping[object, object]", values))
    except FieldError as error:
        raise RequestFailed("bad_request", str(error)) from None
    return {name: value for name, value in values.items() if value is not None}


def _listed(name: str, value: Iterable[T], allowed: str) -> list[T]:
    """Return the items of what a caller passed. RequestFailed when it has none, such as None."""
    try:
        return list(value)
    except TypeError:
        raise RequestFailed("bad_request", f"{name} must be {allowed}, got {type(value).__name__}") from None
