"""The grammar of a call as gpt-oss writes it, after a message of reasoning if the model wants to have one.

The markers are special tokens, which a grammar names. The marker of the end of a call ends the answer too, so there is
one call.
"""

import json
from collections.abc import Mapping
from typing import Any

from mgpu.orchestrator.gateway.text.grammars.demanded_parts import without_brackets
from mgpu.protocol.chat.harmony import CHANNEL, ENDS, MESSAGE, START


def first_rules(most_thinking_tokens: int | None) -> list[str]:
    """Return the rules of the whole answer, which ask for a rule `call`; None: nothing bounds the reasoning."""
    bound = "" if most_thinking_tokens is None else f"[max_tokens={most_thinking_tokens}]"
    thinking = "" if most_thinking_tokens == 0 else "thinking"
    return [
        "start: thought? call",
        f'thought: {CHANNEL} "analysis" {MESSAGE} {thinking} {ENDS[0]} {START} "assistant"',
        *([f"thinking{bound}: /(?s:.*)/"] if thinking else []),
    ]


def call_rules(at: int, name: str, schema: Mapping[str, Any]) -> list[str]:
    """Return the rules of a call of one tool."""
    arguments = without_brackets(json.dumps(schema))
    header = json.dumps(f"commentary to=functions.{name} ")
    return [
        f'call_{at}: {CHANNEL} {header} <|constrain|> "json" {MESSAGE} arguments_{at}',
        f"arguments_{at}: %json {arguments}",
    ]
