"""Bodies of HTTP requests, from bytes to the message that the front channel is sent."""

import json
from collections.abc import Callable, Mapping

from bench.fuzz.choices import Choices
from bench.fuzz.target import Target
from mgpu.orchestrator.http.edge.body import parse_object
from mgpu.orchestrator.http.edge.errors import HttpError
from mgpu.orchestrator.http.requests import anthropic_rules, response_rules
from mgpu.orchestrator.http.requests.fields import Fields, parse_fields
from mgpu.orchestrator.http.routes import chat, completions, messages
from mgpu.protocol.client.requests.request_message import checked, messages_field, prompt_field
from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.fields import Rule

CHAT: dict[str, object] = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 5, "n": 2,
    "temperature": 0.5, "stop": "x", "seed": -1, "logit_bias": {"5": 1.5}, "logprobs": True, "top_logprobs": 2,
    "stream": True, "stream_options": {"include_usage": True}, "user": "u", "response_format": {"type": "text"},
    "chat_template_kwargs": {"thinking": True},
}  # fmt: skip
TEXT: dict[str, object] = {
    "prompt": ["x", [5, 6]], "max_tokens": 5, "echo": False, "logprobs": 2, "best_of": 1, "suffix": "", "stream": False,
}  # fmt: skip
RESPONSES: dict[str, object] = {
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}],
    "instructions": "x", "max_output_tokens": 5, "metadata": {"a": "b"}, "store": False, "tool_choice": "auto",
    "text": {"format": None},
}  # fmt: skip
ANTHROPIC: dict[str, object] = {
    "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "system": [{"type": "text", "text": "x"}],
    "thinking": {"type": "disabled"}, "stop_sequences": ["x"], "tool_choice": {"type": "none"}, "top_k": 5,
}  # fmt: skip
WORDS = (
    *chat.RULES, *completions.RULES, *response_rules.RULES, *anthropic_rules.RULES, "role", "content", "type", "text",
    "refusal", "user", "assistant", "input_text", "50256", "json_object", "none", "auto", "include_usage", "image_url",
)  # fmt: skip


def read_body(data: bytes) -> None:
    """Read a body as one of the endpoints does: the first byte says which, and how the rest becomes JSON."""
    choices = Choices(data)
    kind = choices.number(11)
    example, read = _ENDPOINTS[kind % len(_ENDPOINTS)]
    prompts, options = read(choices.rest() if kind < len(_ENDPOINTS) else _body(choices, example))
    for prompt in prompts:
        checked({"type": "generate", "id": 1, **prompt, **options})


Read = tuple[list[dict[str, object]], Mapping[str, object]]
"""The prompts of a body, and the options of all of them."""


def _chat(body: bytes) -> Read:
    fields = _parsed(body, chat.RULES, "messages")
    return [messages_field(fields.values["messages"])], chat.chat_options(fields)


def _text(body: bytes) -> Read:
    fields = _parsed(body, completions.RULES, "prompt")
    return [prompt_field(prompt) for prompt in fields.values["prompt"]], completions._options(fields)


def _responses(body: bytes) -> Read:
    fields = _parsed(body, response_rules.RULES, "input")
    return [messages_field(fields.values["input"])], response_rules.response_options(fields.values, fields.options())


def _anthropic(body: bytes) -> Read:
    fields = _parsed(body, anthropic_rules.RULES, "messages", "max_tokens")
    return [messages_field(anthropic_rules.messages_of(fields.values))], messages._options(fields)


_ENDPOINTS: tuple[tuple[dict[str, object], Callable[[bytes], Read]], ...] = (
    (CHAT, _chat), (TEXT, _text), (RESPONSES, _responses), (ANTHROPIC, _anthropic),
)  # fmt: skip


def _body(choices: Choices, whole: Mapping[str, object]) -> bytes:
    return json.dumps(choices.changed(whole, WORDS), default=repr, ensure_ascii=bool(choices.number(1))).encode(
        "utf-8", "replace"
    )


def _parsed(body: bytes, rules: Mapping[str, Rule], *required: str) -> Fields:
    return parse_fields(parse_object(body), rules, *required)


def _seeds() -> list[bytes]:
    whole = [bytes([at]) + json.dumps(example).encode() for at, (example, _) in enumerate(_ENDPOINTS)]
    return [*whole, *(bytes([kind, 1]) for kind in range(12))]


HTTP: dict[str, Target] = {
    "http-body": Target(read_body, (HttpError, RequestFailed), _seeds, tuple(word.encode() for word in WORDS))
}
