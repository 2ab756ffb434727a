"""JSON schemas of the rules, for the OpenAPI document: what is checked and what is documented cannot differ."""

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from mgpu.orchestrator.http.requests.anthropic_messages import AnthropicMessages, AnthropicToolChoice, AnthropicTools
from mgpu.orchestrator.http.requests.anthropic_rules import System, Thinking
from mgpu.orchestrator.http.requests.fields import Unsupported
from mgpu.orchestrator.http.requests.forms import FormField, ResponseFormat, TextSettings
from mgpu.orchestrator.http.requests.response_input import REASONING_PARTS, Input, ResponseTools
from mgpu.orchestrator.http.requests.response_rules import Metadata, ReasoningSettings
from mgpu.orchestrator.http.requests.rules import (
    MAX_MESSAGES,
    MAX_PROMPTS,
    ROLES,
    LogitBias,
    Maybe,
    Messages,
    Prompt,
    Seed,
    Stop,
    StreamOptions,
)
from mgpu.orchestrator.http.requests.tool_rules import ToolChoiceField
from mgpu.protocol.front.chat_messages import MAX_CALLS, MAX_TOOLS, TOOL_CHOICES, JsonMap, TemplateOptions, Tools
from mgpu.protocol.front.fields import INT32_MAX, Array, Flag, Integer, Number, OneOf, Record, Rule, Text

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": INT32_MAX}
_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}
_CONTENT: Schema = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_TOOL_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_CALL: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "maxLength": 256},
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": _TOOL_NAME, "arguments": _TEXT}, "required": ["name"]},
    },
    "required": ["id", "function"],
}
_NAME: Schema = {"type": "string", "maxLength": 256}
_TURN: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": [role for role in ROLES if role not in ("assistant", "tool")]},
        "content": _CONTENT,
    },
    "required": ["role", "content"],
}
_ANSWER: Schema = {
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": _CONTENT,
        "tool_calls": {"type": "array", "items": _CALL, "maxItems": MAX_CALLS},
        "reasoning_content": _TEXT,
    },
    "required": ["role"],
}
_RESULT: Schema = {
    "type": "object",
    "properties": {"role": {"const": "tool"}, "content": _CONTENT, "tool_call_id": _NAME},
    "required": ["role", "content"],
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {"role": {"enum": list(ROLES)}, "name": _NAME},
    "anyOf": [_TURN, _ANSWER, _RESULT],
}
_TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": _TOOL_NAME,
                "description": _TEXT,
                "parameters": {"type": "object"},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_THOUGHTS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"enum": list(REASONING_PARTS)}, "text": _TEXT},
        "required": ["type", "text"],
    },
}
_ITEM: Schema = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"const": "message"}, "role": {"enum": list(ROLES)}, "content": _CONTENT},
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "function_call"},
                "call_id": _NAME,
                "name": _TOOL_NAME,
                "arguments": _TEXT,
            },
            "required": ["type", "call_id", "name"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "function_call_output"}, "call_id": _NAME, "output": _CONTENT},
            "required": ["type", "call_id", "output"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "reasoning"}, "content": _THOUGHTS, "summary": _THOUGHTS},
            "required": ["type"],
        },
    ]
}
_MESSAGES: Schema = {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MAX_MESSAGES}


@singledispatch
def schema_of(rule: Rule) -> Schema:
    """Return the schema of what a rule takes."""
    raise TypeError(f"no schema for {type(rule).__name__}")


@schema_of.register
def _(rule: Number) -> Schema:
    low = {"exclusiveMinimum": rule.low} if rule.low_open else {"minimum": rule.low}
    return {"type": "number", **low, "maximum": rule.high}


@schema_of.register
def _(rule: Integer) -> Schema:
    return {"type": "integer", "minimum": rule.low, "maximum": rule.high}


@schema_of.register
def _(rule: Flag) -> Schema:
    return {"type": "boolean"}


@schema_of.register
def _(rule: Text) -> Schema:
    return {"type": "string", "minLength": rule.min_chars, "maxLength": rule.max_chars}


@schema_of.register
def _(rule: OneOf) -> Schema:
    return {"enum": list(rule.names)}


@schema_of.register
def _(rule: Array) -> Schema:
    return {"type": "array", "items": schema_of(rule.item), "minItems": rule.min_items, "maxItems": rule.max_items}


@schema_of.register
def _(rule: Record) -> Schema:
    return {
        "type": "object",
        "properties": {name: schema_of(each) for name, each in rule.rules.items()},
        "additionalProperties": False,
        "required": [] if rule.optional else list(rule.rules),
    }


@schema_of.register
def _(rule: Stop) -> Schema:
    text = {"type": "string", "minLength": 1, "maxLength": 256}
    return {"anyOf": [text, {"type": "array", "items": text, "maxItems": 16}]}


@schema_of.register
def _(rule: Seed) -> Schema:
    return {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}


@schema_of.register
def _(rule: LogitBias) -> Schema:
    bias = {"type": "number", "minimum": -100, "maximum": 100}
    return {"type": "object", "patternProperties": {"^[0-9]{1,9}$": bias}, "additionalProperties": False}


@schema_of.register
def _(rule: Maybe) -> Schema:
    return {"anyOf": [{"const": rule.other}, schema_of(rule.rule)]}


@schema_of.register
def _(rule: Prompt) -> Schema:
    ids, text = {"type": "array", "items": _TOKEN_ID, "minItems": 1}, {"type": "string", "minLength": 1}
    return {"anyOf": [text, ids, {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_PROMPTS},
                      {"type": "array", "items": ids, "minItems": 1, "maxItems": MAX_PROMPTS}]}  # fmt: skip


@schema_of.register
def _(rule: Messages) -> Schema:
    return _MESSAGES


@schema_of.register
def _(rule: Tools) -> Schema:
    return {"type": "array", "items": _TOOL, "maxItems": MAX_TOOLS}


@schema_of.register
def _(rule: AnthropicMessages) -> Schema:
    turn = {
        "type": "object",
        "properties": {"role": {"enum": list(ROLES)}, "content": _CONTENT},
        "required": ["role", "content"],
    }
    return {"type": "array", "items": turn, "minItems": 1, "maxItems": MAX_MESSAGES}


@schema_of.register(AnthropicTools)
@schema_of.register(ResponseTools)
def _(rule: Rule) -> Schema:
    return {"type": "array", "items": {"type": "object"}, "description": rule.allowed}


@schema_of.register
def _(rule: AnthropicToolChoice) -> Schema:
    return {"type": "object", "description": rule.allowed}


@schema_of.register
def _(rule: ToolChoiceField) -> Schema:
    return {"anyOf": [{"enum": list(TOOL_CHOICES)}, {"type": "object"}], "description": rule.allowed}


@schema_of.register(JsonMap)
@schema_of.register(TemplateOptions)
def _(rule: Rule) -> Schema:
    return {"type": "object", "description": rule.allowed}


@schema_of.register
def _(rule: Input) -> Schema:
    return {"anyOf": [_TEXT, {**_MESSAGES, "items": _ITEM}]}


@schema_of.register
def _(rule: System) -> Schema:
    return _CONTENT


@schema_of.register
def _(rule: StreamOptions) -> Schema:
    return {"type": "object", "properties": {"include_usage": {"type": "boolean"}}}


@schema_of.register(Thinking)
@schema_of.register(TextSettings)
@schema_of.register(ResponseFormat)
@schema_of.register(Metadata)
@schema_of.register(ReasoningSettings)
def _(rule: Rule) -> Schema:
    return {"type": "object", "description": rule.allowed}


@schema_of.register
def _(rule: FormField) -> Schema:
    kinds = {"regex": "string", "grammar": "string", "choice": "array"}
    return {"type": kinds.get(rule.kind, "object"), "description": rule.allowed}


@schema_of.register
def _(rule: Unsupported) -> Schema:
    return {"enum": list(rule.harmless), "description": rule.reason} if rule.harmless else {"type": "null"}


def body_schema(rules: Mapping[str, Rule], required: tuple[str, ...]) -> Schema:
    """Return the schema of a body. Fields that are not named are accepted and have no effect."""
    properties = {name: schema_of(rule) for name, rule in rules.items()}
    return {"type": "object", "properties": properties, "required": list(required)}
