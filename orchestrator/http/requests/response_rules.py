"""Rules for the fields of OpenAI's responses. The server keeps none: each request has its whole conversation."""

from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.orchestrator.http.requests.fields import MODEL, SAMPLING, Unsupported
from mgpu.orchestrator.http.requests.forms import TextSettings
from mgpu.orchestrator.http.requests.rules import MAX_MESSAGES, ROLES, parse_content
from mgpu.protocol.client.results import Usage
from mgpu.protocol.front.chat_messages import TEMPLATE_OPTIONS
from mgpu.protocol.front.fields import INT32_MAX, FieldError, Flag, Integer, Rule, Text, wrong

STATELESS = "this server keeps no responses; send the whole conversation in input"


@dataclass(frozen=True, slots=True)
class Input:
    """A text, or items of type message. Returns chat messages."""

    allowed: str = f"a string, or an array of 1 to {MAX_MESSAGES} messages, each with role and content"

    def parse(self, field: str, value: object) -> list[dict[str, str]]:
        if isinstance(value, str):
            return [{"role": "user", "content": parse_content(field, value)}]
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
            raise wrong(field, value, self.allowed)
        return [self._message(f"{field}[{at}]", item) for at, item in enumerate(value)]

    def _message(self, field: str, item: object) -> dict[str, str]:
        if not isinstance(item, Mapping):
            raise wrong(field, item, 'an object such as {"role": "user", "content": "Hi"}')
        if item.get("type", "message") != "message":
            raise FieldError(
                f"{field}.type is {str(item['type'])[:40]!a}: this server takes items of type message only"
            )
        role = item.get("role")
        if role not in ROLES:
            raise wrong(f"{field}.role", role, "one of " + ", ".join(ROLES))
        return {"role": role, "content": parse_content(f"{field}.content", item.get("content"))}


@dataclass(frozen=True, slots=True)
class Metadata:
    """Comes back as it was sent."""

    allowed: str = "an object"

    def parse(self, field: str, value: object) -> Mapping[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        return value


RULES: dict[str, Rule] = {
    **{name: rule for name, rule in SAMPLING.items() if name not in ("n", "max_tokens")},
    "model": MODEL,
    "input": Input(),
    "instructions": Text(2**27 - 1),
    "max_output_tokens": Integer(1, INT32_MAX),
    "stream": Flag(),
    "store": Flag(),
    "metadata": Metadata(),
    "text": TextSettings(),
    "chat_template_kwargs": TEMPLATE_OPTIONS,
    "tools": Unsupported("this server does not call tools here; use /v1/chat/completions", ([],)),
    "tool_choice": Unsupported("this server does not call tools here; use /v1/chat/completions", ("none", "auto")),
    "previous_response_id": Unsupported(STATELESS),
    "conversation": Unsupported(STATELESS),
    "background": Unsupported("this server answers while you wait", (False,)),
}


def usage_body(usage: Usage) -> dict[str, object]:
    """Return the form of responses."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
