"""Rules for the fields of Anthropic's messages, and their form of what this server returns."""

from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.orchestrator.http.requests.fields import MODEL, SAMPLING, Unsupported
from mgpu.orchestrator.http.requests.rules import Messages, parse_content
from mgpu.protocol.client.results import Usage
from mgpu.protocol.front.chat_messages import TEMPLATE_OPTIONS
from mgpu.protocol.front.fields import Array, FieldError, Flag, Rule, Text

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


@dataclass(frozen=True, slots=True)
class System:
    """The system prompt: a string, or text blocks. Returns its text."""

    allowed: str = "a string or an array of text blocks"

    def parse(self, field: str, value: object) -> str:
        return parse_content(field, value)


@dataclass(frozen=True, slots=True)
class Thinking:
    """Returns whether the model is to think aloud."""

    allowed: str = '{"type": "disabled"}: this server does not tell thoughts from answers yet'

    def parse(self, field: str, value: object) -> None:
        if not isinstance(value, Mapping) or value.get("type") not in ("disabled", "adaptive"):
            raise FieldError(f"{field} must be {self.allowed}")


PROMPT_RULES: dict[str, Rule] = {
    "model": MODEL,
    "messages": Messages(),
    "system": System(),
    "thinking": Thinking(),
    "tools": Unsupported("this server does not call tools here; use /v1/chat/completions", ([],)),
    "tool_choice": Unsupported(
        "this server does not call tools here; use /v1/chat/completions", ({"type": "none"}, {"type": "auto"})
    ),
    "chat_template_kwargs": TEMPLATE_OPTIONS,
}
RULES: dict[str, Rule] = {
    **{name: rule for name, rule in SAMPLING.items() if name not in ("n", "stop")},
    **PROMPT_RULES,
    "stop_sequences": Array(Text(256, 1), 16),
    "stream": Flag(),
}


def messages_of(values: Mapping[str, object]) -> list[dict[str, str]]:
    """Return the chat messages, the system prompt first."""
    messages, system = values["messages"], values.get("system")
    assert isinstance(messages, list)
    return [{"role": "system", "content": str(system)}, *messages] if system else messages


def usage_body(usage: Usage) -> dict[str, int]:
    """Return Anthropic's form: tokens from the cache are counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
