"""Rules for the fields of Anthropic's messages, and their form of what this server returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgpu.orchestrator.http.requests.anthropic_messages import AnthropicMessages, AnthropicToolChoice, AnthropicTools
from mgpu.orchestrator.http.requests.fields import MODEL, SAMPLING, THINKING_BUDGET, add_chat_options
from mgpu.orchestrator.http.requests.rules import parse_content
from mgpu.protocol.client.requests.request_message import GenerateOptions
from mgpu.protocol.client.requests.results import Usage
from mgpu.protocol.front.chat_messages import TEMPLATE_OPTIONS
from mgpu.protocol.front.fields import Array, FieldError, Flag, Rule, Text

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(frozen=True, slots=True)
class System:
    """The system prompt: a string, or text blocks. Returns its text."""

    allowed: str = "a string or an array of text blocks"

    def parse(self, field: str, value: object) -> str:
        return parse_content(field, value)


@dataclass(frozen=True, slots=True)
class Thinking:
    """Returns the options of a model that is to think aloud; none if it is not to."""

    allowed: str = '{"type": "enabled", "budget_tokens": 2000}, {"type": "adaptive"} or {"type": "disabled"}'

    def parse(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping) or value.get("type") not in ("disabled", "adaptive", "enabled"):
            raise FieldError(f"{field} must be {self.allowed}")
        if value["type"] == "disabled":
            return {}
        thinking: dict[str, object] = {"enable_thinking": True}
        if value["type"] == "enabled" and (budget := value.get("budget_tokens")) is not None:
            thinking["budget"] = THINKING_BUDGET.parse(f"{field}.budget_tokens", budget)
        return thinking


PROMPT_RULES: dict[str, Rule] = {
    "model": MODEL,
    "messages": AnthropicMessages(),
    "system": System(),
    "thinking": Thinking(),
    "tools": AnthropicTools(),
    "tool_choice": AnthropicToolChoice(),
    "chat_template_kwargs": TEMPLATE_OPTIONS,
}
RULES: dict[str, Rule] = {
    **{name: rule for name, rule in SAMPLING.items() if name not in ("n", "stop")},
    **PROMPT_RULES,
    "stop_sequences": Array(Text(256, 1), 16),
    "stream": Flag(),
}


def messages_of(values: Mapping[str, object]) -> list[dict[str, object]]:
    """Return the chat messages, the system prompt first."""
    messages, system = values["messages"], values.get("system")
    assert isinstance(messages, list)
    return [{"role": "system", "content": str(system)}, *messages] if system else messages


def add_anthropic_options(values: Mapping[str, Any], options: GenerateOptions) -> None:
    """Add the options of a chat. The model thinks only if it is asked to, as far as its template lets it choose."""
    chat = {name: values[name] for name in ("model", "tools", "chat_template_kwargs") if name in values}
    thinking = values.get("thinking", {})
    chat["chat_template_kwargs"] = {"enable_thinking": bool(thinking)} | chat.get("chat_template_kwargs", {})
    if "budget" in thinking:
        chat["thinking_token_budget"] = thinking["budget"]
    if "tool_choice" in values:
        chat["tool_choice"], chat["parallel_tool_calls"] = values["tool_choice"]
    add_chat_options(chat, options)


def stop_body(finish_reason: str, stop_string: str | None) -> dict[str, str | None]:
    """Return why an answer has ended. Calls come before the stop sequence that followed them: they want results."""
    if finish_reason == "stop" and stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
    return {"stop_reason": _STOP_REASONS.get(finish_reason, "end_turn"), "stop_sequence": None}


def usage_body(usage: Usage) -> dict[str, int]:
    """Return Anthropic's form: tokens from the cache are counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
