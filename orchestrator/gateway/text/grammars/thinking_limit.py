"""The grammar of an answer whose reasoning has at most a number of tokens.

It counts tokens and not text: `<[^9]>{0,100} <[9]>` is up to 100 tokens other than token 9, and then token 9. So it
needs markers that are single tokens, as reasoning models have them. An answer cannot end while the model thinks.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from mgpu.orchestrator.gateway.text.grammars.grammar import HEADER, GrammarError
from mgpu.protocol.chat import harmony
from mgpu.protocol.chat.formats import HARMONY, REASONING_FORMATS

_MOST_BEFORE = 2
"""Tokens before reasoning that the prompt has not begun, such as line breaks."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class ThinkingLimit:
    """How long the reasoning of an answer may be."""

    num_tokens: int
    """Between the markers."""
    reasoning_format: str
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer because the client says so."""


def grammar_with_reasoning(limit: ThinkingLimit, is_open: bool, form: str, encode: Encode) -> str:
    """Return the grammar of reasoning and then ``form``, a grammar for workers, or anything if that is empty.

    Empty if a marker of this model is several tokens. ``is_open``: the prompt has begun the reasoning. GrammarError if
    a marker ends the answer.
    """
    is_harmony = limit.reasoning_format == HARMONY
    if is_harmony:
        markers: tuple[str, ...] = (harmony.CHANNEL, harmony.MESSAGE, harmony.ENDS[0])
    else:
        known = REASONING_FORMATS[limit.reasoning_format]
        markers = (known.begin, known.end)
    ids = [encode(marker) for marker in markers]
    if any(len(each) != 1 for each in ids):
        return ""
    for marker, [token_id] in zip(markers, ids, strict=True):
        if token_id in limit.stop_ids:
            raise GrammarError(
                f"stop_token_ids has {token_id}, which is {marker}, and thinking_token_budget counts by it; "
                "leave one of the two out"
            )
    numbers = [token_id for [token_id] in ids]
    if is_harmony:
        return _channels(limit.num_tokens, *numbers)
    begin, end = numbers
    return _marked(limit.num_tokens, begin, end, is_open, form)


def _marked(most: int, begin: int, end: int, is_open: bool, form: str) -> str:
    thought = f"{_up_to(most, end)} <[{end}]>" if is_open else f"<[{begin}]> {_up_to(most, end)} <[{end}]>"
    if not form:
        may_begin = f"{_up_to(_MOST_BEFORE, begin)} {thought} <[*]>* | <[^{begin}]>*"
        return f"{HEADER}start: " + (f"{thought} <[*]>*" if is_open else may_begin)
    start = thought if is_open else f"(SPACE {thought})?"
    whole = f"{HEADER}start: {start} SPACE @form\nSPACE: /\\s{{0,2}}/"
    return json.dumps({"grammars": [{"lark_grammar": whole}, {"name": "form", "lark_grammar": form}]})


def _channels(most: int, channel: int, message: int, end: int) -> str:
    """Return the grammar of a message in the channel `analysis`, if any, and then of messages in other ones."""
    rest = f"<[^{channel}]>*"
    thought = f'"analysis" <[{message}]> {_up_to(most, end)} <[{end}]> {rest}'
    start = f"(<[{channel}]> {thought} | {rest}) (<[{channel}]> other)*"
    return f'{HEADER}start: {start}\nother: ("final" | "commentary") {rest}'


def _up_to(most: int, excluded_id: int) -> str:
    """Return the grammar of so many tokens at most; the library knows no repetition of 0 times."""
    return f"<[^{excluded_id}]>{{0,{most}}}" if most else ""
