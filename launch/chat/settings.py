"""The options that `/set` changes, with the bounds by which the server checks them."""

from collections.abc import Mapping
from typing import Any

from mgpu.protocol.client.requests.option_help import MEANINGS, default_words
from mgpu.protocol.front.chat_messages import TEMPLATE_OPTIONS
from mgpu.protocol.front.client_messages import GENERATE_RULES
from mgpu.protocol.front.fields import Array, FieldError, Flag, Integer, Number, Rule

TEMPLATE_RULES = TEMPLATE_OPTIONS.rules
RULES: dict[str, Rule] = {
    **{
        name: GENERATE_RULES[name]
        for name in (
            "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "seed", "stop", "min_tokens", "timeout_s", "thinking_token_budget",
        )
    },
    **TEMPLATE_RULES,
}  # fmt: skip
DEFAULT_WORDS = ("default", "none")
_FLAGS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


class Settings:
    """The options of the answers to come."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._values = dict(options)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for `Client.stream_chat`."""
        template = {name: value for name, value in self._values.items() if name in TEMPLATE_RULES}
        options = {name: value for name, value in self._values.items() if name not in TEMPLATE_RULES}
        return {**options, "template_options": template} if template else options

    def set(self, rest: str) -> str:
        """Do what `/set` is asked to: ``OPTION VALUE``, or show one or all. Return what the user is told."""
        name, _, value = rest.partition(" ")
        name, value = name.lstrip("-").replace("-", "_"), value.strip()
        if not name:
            return self._all()
        if name not in RULES:
            return f"{name} is no option; the options are {', '.join(RULES)}"
        if not value:
            return self._described(name)
        if value in DEFAULT_WORDS:
            self._values.pop(name, None)
            return ""
        try:
            self._values[name] = _parsed(name, value)
        except FieldError as error:
            return str(error)
        return ""

    def _all(self) -> str:
        now = ", ".join(f"{name} {value}" for name, value in self._values.items()) or "nothing"
        return f"set: {now}\ntype /set OPTION VALUE, or /set OPTION default; the options are {', '.join(RULES)}"

    def _described(self, name: str) -> str:
        default = "that of the model" if name in TEMPLATE_RULES else default_words(name)
        meaning = f": {MEANINGS[name]}" if name in MEANINGS else ": a variable of the chat template"
        return f"{name} {self._values.get(name, f'[{default}]')}{meaning} ({RULES[name].allowed})"


def _parsed(name: str, text: str) -> object:
    """Return the value that a text stands for. FieldError if it is not allowed."""
    rule = RULES[name]
    value: object = text
    try:
        if isinstance(rule, Integer):
            value = int(text)
        elif isinstance(rule, Number):
            value = float(text)
        elif isinstance(rule, Flag):
            value = _FLAGS.get(text.lower(), text)
        elif isinstance(rule, Array):
            value = [text]
    except ValueError:
        pass  # the rule says what is allowed
    return rule.parse(name, value)
