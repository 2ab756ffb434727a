"""Bodies of HTTP requests, from bytes to the message that the front channel is sent."""

import json
from collections.abc import Mapping

from bench.fuzz.choices import Choices
from bench.fuzz.target import Target
from mgpu.orchestrator.http.edge.body import parse_object
from mgpu.orchestrator.http.edge.errors import HttpError
from mgpu.orchestrator.http.requests.fields import Fields, parse_fields
from mgpu.orchestrator.http.routes import chat, completions
from mgpu.protocol.client.request_message import checked, messages_field, prompt_field
from mgpu.protocol.errors import RequestFailed

CHAT: dict[str, object] = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 5, "n": 2,
    "temperature": 0.5, "stop": "x", "seed": -1, "logit_bias": {"5": 1.5}, "logprobs": True, "top_logprobs": 2,
    "stream": True, "stream_options": {"include_usage": True}, "user": "u", "response_format": {"type": "text"},
    "chat_template_kwargs": {"thinking": True},
}  # fmt: skip
TEXT: dict[str, object] = {
    "prompt": ["x", [5, 6]], "max_tokens": 5, "echo": False, "logprobs": 2, "best_of": 1, "suffix": "", "stream": False,
}  # fmt: skip
WORDS = (
    *chat.RULES, *completions.RULES, "role", "content", "type", "text", "refusal", "user", "assistant", "input_text",
    "50256", "json_object", "none", "auto", "include_usage", "image_url",
)  # fmt: skip


def read_body(data: bytes) -> None:
    """Read a body as one of the two endpoints does: the first byte says which, and how the rest becomes JSON."""
    choices = Choices(data)
    kind = choices.number(7)
    body = choices.rest() if kind < 2 else _body(choices, (CHAT, TEXT)[kind % 2])
    if kind % 2 == 0:
        fields = _parsed(body, chat.RULES, "messages")
        options = dict(chat.chat_options(fields))
        prompts = [messages_field(fields.values["messages"])]
    else:
        fields = _parsed(body, completions.RULES, "prompt")
        options = dict(completions._options(fields))
        prompts = [prompt_field(prompt) for prompt in fields.values["prompt"]]
    for prompt in prompts:
        checked({"type": "generate", "id": 1, **prompt, **options})


def _body(choices: Choices, whole: Mapping[str, object]) -> bytes:
    return json.dumps(choices.changed(whole, WORDS), default=repr, ensure_ascii=bool(choices.number(1))).encode(
        "utf-8", "replace"
    )


def _parsed(body: bytes, rules: Mapping[str, object], required: str) -> Fields:
    return parse_fields(parse_object(body), rules, required)  # type: ignore[arg-type]


def _seeds() -> list[bytes]:
    return [
        b"\0" + json.dumps(CHAT).encode(),
        b"\1" + json.dumps(TEXT).encode(),
        *(bytes([kind, 1]) for kind in range(8)),
    ]


HTTP: dict[str, Target] = {
    "http-body": Target(read_body, (HttpError, RequestFailed), _seeds, tuple(word.encode() for word in WORDS))
}
