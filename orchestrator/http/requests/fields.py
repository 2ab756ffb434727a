"""Check the fields of a body: a known field must be right, an unknown one is named in a warning and has no effect."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgpu.orchestrator.http.edge.errors import HttpError, bad_request
from mgpu.orchestrator.http.requests.forms import GUIDED, FormField, form_of
from mgpu.orchestrator.http.requests.rules import LogitBias, Seed, Stop
from mgpu.orchestrator.http.requests.tool_rules import choose
from mgpu.protocol.client.requests.request_message import GenerateOptions
from mgpu.protocol.front.client_messages import GENERATE_RULES
from mgpu.protocol.front.fields import INT32_MAX, FieldError, Integer, Rule, Text, shown

SAME_NAMES = (
    "n", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens", "priority", "cache_salt", "timeout_s",
)  # fmt: skip
"""Options that have the front channel's name and rule."""
SAMPLING: dict[str, Rule] = {
    **{name: GENERATE_RULES[name] for name in SAME_NAMES},
    "max_tokens": Integer(1, INT32_MAX),
    "stop": Stop(),
    "seed": Seed(),
    "logit_bias": LogitBias(),
    "structured_outputs": FormField(),
    **{name: FormField(kind) for name, kind in GUIDED.items()},
}
"""What decides how tokens are chosen, for all endpoints that generate."""
_MOST_NEAR, _LONG = 50, 40
"""Of unknown fields, those that are compared with one that is missing."""
OPTION_NAMES = frozenset(SAMPLING) - {"structured_outputs", *GUIDED}
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields for the provider's own books: they are to have no effect, so they need no warning."""
MODEL = Text(512, 1)
THINKING_BUDGET = GENERATE_RULES["thinking_token_budget"]


@dataclass(frozen=True, slots=True)
class Fields:
    """The checked fields of a body."""

    values: dict[str, Any]
    ignored: list[str] = field(default_factory=list)

    def options(self) -> GenerateOptions:
        """Return those that the front channel knows by the same name, and the form of the answer."""
        options: dict[str, Any] = {name: value for name, value in self.values.items() if name in OPTION_NAMES}
        if (form := form_of(self.values)) is not None:
            options["structured_outputs"] = form
        return options  # type: ignore[return-value]


def parse_fields(body: Mapping[str, object], rules: Mapping[str, Rule], *required: str) -> Fields:
    """Check a body. Null counts as absent. HttpError names the field, its value and what is allowed."""
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        rule = rules.get(name)
        if value is None:
            continue
        if rule is None:
            if name not in LABELS:
                ignored.append(name)
            continue
        try:
            values[name] = rule.parse(name, value)
        except FieldError as error:
            raise bad_request(str(error), name) from None
    for name in required:
        if name not in values:
            near = difflib.get_close_matches(name, [each for each in ignored[:_MOST_NEAR] if len(each) < _LONG], n=1)
            typed = f" (the body has {shown(near[0])})" if near else ""
            raise bad_request(
                f"{name} is missing{typed}; it must be {rules[name].allowed}", name, "missing_required_parameter"
            )
    return Fields(values, ignored)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A field whose wish would change the answer and that this server cannot fulfil; ``harmless`` values pass."""

    reason: str
    harmless: tuple[object, ...] = ()

    @property
    def allowed(self) -> str:
        return f"left out: {self.reason}"

    def parse(self, name: str, value: object) -> None:
        if value not in self.harmless:
            raise FieldError(f"{name}: {self.reason}")


def add_chat_options(values: Mapping[str, Any], options: GenerateOptions) -> None:
    """Add what decides how a chat becomes a prompt, and what may be called."""
    template = dict(values.get("chat_template_kwargs", {}))
    if effort := values.get("reasoning_effort"):
        template.setdefault("reasoning_effort", effort)
        if effort == "none":
            template.setdefault("enable_thinking", False)
    if template:
        options["template_options"] = template
    for name in ("model", "parallel_tool_calls", "documents", "thinking_token_budget"):
        if name in values:
            options[name] = values[name]
    try:
        choice, tools = choose(values.get("tool_choice"), values.get("tools", ()))
    except FieldError as error:
        raise bad_request(str(error), "tool_choice") from None
    if "tools" in values:
        options["tools"] = tools
    if choice is not None:
        options["tool_choice"] = choice


__all__ = [
    "MODEL",
    "SAMPLING",
    "THINKING_BUDGET",
    "Fields",
    "HttpError",
    "Unsupported",
    "add_chat_options",
    "parse_fields",
]
