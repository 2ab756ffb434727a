"""Build the message of a request and check it before it is sent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.client_messages import parse_client_message
from mgpu.protocol.front.fields import FieldError, TokenIds

T = TypeVar("T")


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of the client's generate, stream, chat and stream_chat; the fields of `Generate`."""

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
    priority: int
    cache_salt: str
    timeout_s: float
    template_options: Mapping[str, object]


def generate_map(
    request_id: int, prompt: str | Sequence[int], stream: bool, **options: Unpack[GenerateOptions]
) -> dict[str, object]:
    """Build and check the generate message for a prompt of text or token ids. RequestFailed says what is wrong."""
    if isinstance(prompt, str):
        return _checked(request_id, {"prompt": prompt}, stream, options)
    try:
        ids = TokenIds().parse("prompt", _listed("prompt", prompt, "text or a sequence of token ids"))
    except FieldError as error:
        raise RequestFailed("bad_request", str(error)) from None
    return _checked(request_id, {"prompt_ids": ids}, stream, options)


def chat_map(
    request_id: int, messages: Sequence[Mapping[str, str]], stream: bool, **options: Unpack[GenerateOptions]
) -> dict[str, object]:
    """Build and check the generate message for chat turns. RequestFailed says what is wrong."""
    given = _listed("messages", messages, 'a list such as [{"role": "user", "content": "Hi"}]')
    turns = [dict(message) if isinstance(message, Mapping) else message for message in given]
    return _checked(request_id, {"messages": turns}, stream, options)


def _listed(name: str, value: Iterable[T], allowed: str) -> list[T]:
    """Give the items of what a caller passed. RequestFailed when it has none, such as None."""
    try:
        return list(value)
    except TypeError:
        raise RequestFailed("bad_request", f"{name} must be {allowed}, got {type(value).__name__}") from None


def _checked(request_id: int, what: dict[str, object], stream: bool, options: Mapping[str, Any]) -> dict[str, object]:
    values = {"type": "generate", "id": request_id, **what, "stream": stream, **options}
    stop, bias = values.get("stop"), values.get("logit_bias")
    if isinstance(stop, str):
        values["stop"] = [stop]
    if isinstance(bias, Mapping):
        values["logit_bias"] = [[token_id, value] for token_id, value in bias.items()]
    try:
        parse_client_message(dict(values.items()))
    except FieldError as error:
        raise RequestFailed("bad_request", str(error)) from None
    return {name: value for name, value in values.items() if value is not None}
