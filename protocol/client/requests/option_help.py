"""Put the options of a request into the help and the signature of the client's methods.

Bounds and defaults are those of the rules by which the server checks the message, so that `help`, docs/protocol.md and
what is taken cannot differ.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from textwrap import fill
from typing import Any, TypeVar, get_type_hints

from mgpu.protocol.client.requests.request_message import SHORTCUTS, GenerateOptions
from mgpu.protocol.front.client_messages import GENERATE_RULES, Generate

F = TypeVar("F", bound=Callable[..., Any])

MEANINGS = {
    "model": "the request fails if the server has another model",
    "n": "how many answers",
    "max_tokens": "the longest answer",
    "min_tokens": "before so many tokens only max_tokens ends the answer",
    "temperature": "0 takes the likeliest token always (greedy)",
    "top_k": "sample from so many likeliest tokens; 0 or -1 is off",
    "top_p": "sample from the likeliest tokens of this total probability",
    "min_p": "sample from tokens of this probability, relative to the likeliest",
    "repetition_penalty": "above 1, tokens of prompt and answer become less likely",
    "presence_penalty": "above 0, tokens of the answer become less likely",
    "frequency_penalty": "the same, once for each time that the answer has the token",
    "seed": "the same seed gives the same answer",
    "logit_bias": "added to the logits of these tokens",
    "logprobs": "0 brings the log-probability of each token, N also those of the N likeliest",
    "stop": "the answer ends before any of these texts",
    "stop_token_ids": "the answer ends with any of these tokens",
    "ignore_eos": "go on after the end-of-sequence token",
    "skip_special_tokens": "leave special tokens out of the text",
    "structured_outputs": "the answer is of this form only; docs/structured.md",
    "json_schema": "the answer is a JSON document that fits",
    "regex": "the answer is a match of it",
    "choice": "the answer is one of these texts",
    "grammar": "the answer is a text of it",
    "priority": "of a client's waiting requests, the lower number runs first",
    "cache_salt": "prefixes are shared only between requests of the same salt",
    "account": "for a program that serves several clients: whose request this is",
    "timeout_s": "the request fails after so many seconds",
    "tools": "functions that the model may call, in OpenAI's form",
    "tool_choice": "whether it must call one; the name of one: this one",
    "parallel_tool_calls": "false: only the first call of an answer counts",
    "documents": "texts that the chat template shows the model",
    "template_options": "variables for the chat template",
    "thinking_token_budget": "the longest reasoning before the answer, in tokens",
}
DEFAULTS = {
    "model": "the one that is served",
    "max_tokens": "what the context still holds",
    "seed": "drawn by the server",
    "logit_bias": "none",
    "logprobs": "none",
    "stop": "none",
    "stop_token_ids": "none",
    "structured_outputs": "none",
    "json_schema": "none",
    "regex": "none",
    "choice": "none",
    "grammar": "none",
    "cache_salt": "empty",
    "account": "the connection's",
    "timeout_s": "none",
    "tools": "none",
    "tool_choice": "auto",
    "documents": "none",
    "template_options": "none",
    "thinking_token_budget": "no bound of its own",
}
"""Defaults whose value does not say what happens."""
_PYTHON_FORMS = {
    "structured_outputs": "a map of exactly one of json_schema, json_object, regex, choice, grammar",
    "json_schema": "a JSON Schema as a map or text, or a class with model_json_schema, such as a pydantic model",
    "regex": "a regular expression",
    "choice": "a list of up to 1024 texts",
    "grammar": "a context-free grammar in Lark's syntax or GBNF",
    "logit_bias": "a map of up to 1024 token ids to numbers from -100 to 100",
    "stop": "a text, or a list of up to 16, each of 1 to 256 characters",
}
_PYTHON_DEFAULTS = {"timeout_s": "that of the client"}
_VALUES = {**dict.fromkeys(SHORTCUTS), **{field.name: field.default for field in fields(Generate)}}
_WIDTH = 100


def with_options(method: F) -> F:
    """Return ``method``, which takes ``**options``, with the options in its docstring and signature."""
    if method.__doc__ is not None:  # else Python runs with -OO
        method.__doc__ = f"{inspect.cleandoc(method.__doc__)}\n\nOptions, by keyword:\n{option_lines()}\n"
    signature = inspect.signature(method)
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    setattr(method, "__signature__", signature.replace(parameters=[*named, *_parameters()]))  # noqa: B010 (for mypy)
    return method


def option_lines() -> str:
    """Return a paragraph for each option: its meaning, what it may be and its default."""
    paragraphs = []
    for name in GenerateOptions.__annotations__:
        allowed = _PYTHON_FORMS.get(name) or GENERATE_RULES[name].allowed
        default = _PYTHON_DEFAULTS.get(name) or default_words(name)
        text = f"{name}: {MEANINGS.get(name, '')} ({allowed}) [{default}]"
        paragraphs.append(fill(text, _WIDTH, initial_indent="    ", subsequent_indent="        "))
    return "\n".join(paragraphs)


def default_words(name: str) -> str:
    """Return the default of a field of `Generate` as docs/protocol.md writes it."""
    value = _VALUES[name]
    if isinstance(value, bool):
        return str(value).lower()
    return DEFAULTS.get(name) or f"{value:g}"


def _parameters() -> list[inspect.Parameter]:
    hints = get_type_hints(GenerateOptions)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, kind, default=_VALUES[name], annotation=hints[name]) for name in hints]
