"""Rules for the fields of OpenAI's responses. The server keeps none: each request has its whole conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgpu.orchestrator.http.requests.fields import MODEL, SAMPLING, THINKING_BUDGET, Unsupported, add_chat_options
from mgpu.orchestrator.http.requests.forms import TextSettings
from mgpu.orchestrator.http.requests.response_input import Input, ResponseTools
from mgpu.orchestrator.http.requests.tool_rules import AllowedTools, ToolChoiceField
from mgpu.protocol.client.requests.request_message import GenerateOptions
from mgpu.protocol.client.requests.results import Usage
from mgpu.protocol.front.chat_messages import TEMPLATE_OPTIONS
from mgpu.protocol.front.fields import INT32_MAX, Array, Flag, Integer, Rule, Text, wrong

LOGPROBS = "message.output_text.logprobs"
"""What ``include`` of responses calls the log-probabilities of the text."""
STATELESS = "this server keeps no responses; send the whole conversation in input"


@dataclass(frozen=True, slots=True)
class Metadata:
    """Comes back as it was sent."""

    allowed: str = "an object"

    def parse(self, field: str, value: object) -> Mapping[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        return value


@dataclass(frozen=True, slots=True)
class ReasoningSettings:
    """``reasoning`` of responses: how much the model is to think. Returns the effort, None if it is not named."""

    allowed: str = 'an object such as {"effort": "low"}'

    def parse(self, field: str, value: object) -> str | None:
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        effort = value.get("effort")
        return None if effort is None else Text(32, 1).parse(f"{field}.effort", effort)


RULES: dict[str, Rule] = {
    **{name: rule for name, rule in SAMPLING.items() if name not in ("n", "max_tokens")},
    "model": MODEL,
    "input": Input(),
    "instructions": Text(2**27 - 1),
    "max_output_tokens": Integer(1, INT32_MAX),
    "stream": Flag(),
    "store": Flag(),
    "include": Array(Text(64, 1), 64),
    "top_logprobs": Integer(0, 20),
    "metadata": Metadata(),
    "text": TextSettings(),
    "chat_template_kwargs": TEMPLATE_OPTIONS,
    "reasoning": ReasoningSettings(),
    "thinking_token_budget": THINKING_BUDGET,
    "tools": ResponseTools(),
    "tool_choice": ToolChoiceField(),
    "parallel_tool_calls": Flag(),
    "previous_response_id": Unsupported(STATELESS),
    "conversation": Unsupported(STATELESS),
    "background": Unsupported("this server answers while you wait", (False,)),
}


def response_options(values: Mapping[str, Any], options: GenerateOptions) -> GenerateOptions:
    """Return the front channel's options for the checked fields of a body; ``options`` has those of the same names."""
    if "max_output_tokens" in values:
        options["max_tokens"] = values["max_output_tokens"]
    if values.get("top_logprobs") or LOGPROBS in values.get("include", ()):
        options["logprobs"] = values.get("top_logprobs", 0)
    add_chat_options({**values, "reasoning_effort": values.get("reasoning")}, options)
    return options


def echoed(values: Mapping[str, Any]) -> dict[str, object]:
    """Return the fields of a body that an answer has again."""
    return {
        "instructions": values.get("instructions"),
        "max_output_tokens": values.get("max_output_tokens"),
        "metadata": values.get("metadata", {}),
        "temperature": values.get("temperature"),
        "top_p": values.get("top_p"),
        "top_logprobs": values.get("top_logprobs", 0),
        "parallel_tool_calls": values.get("parallel_tool_calls", True),
        "reasoning": {"effort": values.get("reasoning"), "summary": None},
        "text": {"format": (values.get("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": _choice_body(values.get("tool_choice", "auto")),
        "tools": [{"type": "function", "strict": None, **tool["function"]} for tool in values.get("tools", ())],
    }


def _choice_body(choice: object) -> object:
    if isinstance(choice, AllowedTools):
        tools = [{"type": "function", "name": name} for name in choice.names]
        return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
    return {"type": "function", **choice} if isinstance(choice, Mapping) else choice


def usage_body(usage: Usage) -> dict[str, object]:
    """Return the form of responses."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
