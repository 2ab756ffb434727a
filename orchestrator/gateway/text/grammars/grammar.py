"""Make a grammar for the workers of what a client asks of an answer, and refuse what they could not follow.

A grammar is compiled here first, in a process that is killed when it takes too long (encoder_process.py), with the
limits that the workers have. So nothing reaches a worker that has not been compiled before. The tokens that may come
first are computed from the model's own: of some grammars that takes 20 s, and from single bytes 0.03 s.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING, Any

from mgpu.protocol.internal.grammars import CHECK_STACK_BYTES, CLIENT_RULES, new_matcher, with_stack_size

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CPU_S = 0.5
"""To compile a grammar and to find out how it begins. Ordinary ones take milliseconds, and a step waits for it."""
_WALKS, _WALK_TOKENS = 4, 4
"""Beginnings of answers that are tried, so that a grammar that is slow only after a token or two is found."""
_LOOK_S = 0.02
"""How often a check looks at the time it has taken."""
_MAX_TRIALS = 500
"""Subschemas to compile when the one at fault is looked for."""
HEADER = '%llguidance {"no_forcing": true}\n'
"""Allow every way to cut a text into tokens. Else only the library's own way would be allowed, which the model does not
choose by itself."""
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""At most one blank after a comma or colon, and no other white space: small models may never end it."""
_SUBSCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Tokenizer = Callable[[], "LLTokenizer"]


class GrammarError(ValueError):
    """No answer of this form can be enforced. The text says why, with the place in the schema."""


class GrammarTooSlow(GrammarError):
    """A thread of this process may still work on it, and can be ended with the process only."""


def checked_grammar(wanted: Mapping[str, object], tokenizer: Tokenizer | None = None) -> str:
    """Return the grammar for a checked ``structured_outputs``. GrammarError if workers could not follow it.

    ``tokenizer`` makes one of the model's tokens; None: of single bytes.
    """
    [(kind, value)] = wanted.items()
    library_tokenizer = tokenizer() if tokenizer else _byte_tokenizer()
    began_s = time.process_time()
    schema: object = {"type": "object"}
    if kind in ("json_schema", "json_object"):
        schema = _parsed_schema(str(value)) if kind == "json_schema" else schema
        text = _of_schema(schema)
    elif kind == "regex":
        text = _of_regex(str(value))
    elif kind == "choice":
        text = _of_choice(value)
    elif kind == "grammar":
        text = f"{_of_lark(str(value))}{CLIENT_RULES}\n"
    else:  # "demanded": the form of a call that tool_choice demands
        text = _of_lark(str(value))
    try:
        error = _error_of(text, library_tokenizer, began_s + MAX_CPU_S)
    except TimeoutError:
        raise GrammarTooSlow(
            f"structured_outputs.{kind}: it takes more than {MAX_CPU_S:g} s of CPU time to compile and to find the "
            "tokens that may come first; ask for less, such as fewer rules or alternatives that begin alike"
        ) from None
    if error:
        if kind == "json_schema":
            error = _with_place(schema, error)
        raise GrammarError(f"structured_outputs.{kind}: {error}")
    return text


def _parsed_schema(text: str) -> object:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise GrammarError("structured_outputs.json_schema: it is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"structured_outputs.json_schema: not JSON: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise GrammarError("structured_outputs.json_schema: a schema is an object, true or false")
    return schema


def _of_schema(schema: object) -> str:
    """Return the grammar of a schema. Options of its own, under ``x-guidance``, go before ours."""
    if isinstance(schema, dict):
        own = schema.get("x-guidance")
        schema = {**schema, "x-guidance": {**_JSON_OPTIONS, **(own if isinstance(own, dict) else {})}}
    return f"{HEADER}start: %json {json.dumps(schema)}"


def _of_regex(pattern: str) -> str:
    import llguidance

    return f"{HEADER}start: /{llguidance.regex_to_lark(pattern, '')}/"


def _of_choice(texts: object) -> str:
    assert isinstance(texts, (list, tuple))
    return f"{HEADER}start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _of_lark(text: str) -> str:
    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except Exception as error:  # it raises bare Exception among others
            raise GrammarError(f"structured_outputs.grammar: not a GBNF grammar: {_first_line(error)}") from None
    return f"{text}\n{HEADER}"  # after it, so that line numbers of errors are the text's


# -- compiling ---------------------------------------------------------------------------------------------------------


@cache
def _byte_tokenizer() -> "LLTokenizer":
    import llguidance

    return llguidance.LLTokenizer("byte")


def _error_of(grammar: str, tokenizer: "LLTokenizer", until_cpu_s: float = math.inf) -> str:
    """Compile a grammar and find out how a text may begin; return in a line what fails, or nothing.

    TimeoutError if this process has more CPU time than ``until_cpu_s`` before that is done. On a small stack: what
    overflows it ends this process, and workers have room for all that passes.
    """
    pool = ThreadPoolExecutor(1)
    try:
        found: Future[str] = with_stack_size(CHECK_STACK_BYTES, lambda: pool.submit(_error_here, grammar, tokenizer))
        while not wait([found], _LOOK_S).done:
            if time.process_time() > until_cpu_s:
                raise TimeoutError
    finally:
        pool.shutdown(wait=False)
    if time.process_time() > until_cpu_s:
        raise TimeoutError
    return found.result()


def _error_here(grammar: str, tokenizer: "LLTokenizer") -> str:
    matcher = new_matcher(tokenizer, grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        for number in range(_WALKS):
            _walk(matcher.deep_copy(), number)
        return ""
    error = matcher.get_error()
    if "NoExtension" in error:
        return "no text fits it"
    return _first_line(error)


def _walk(matcher: "LLMatcher", number: int) -> None:
    """Follow one of `_WALKS` ways through a grammar for its time only: what fails here may never be chosen."""
    for _ in range(_WALK_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or matcher.is_stopped() or not mask:
            return
        # Number 0 takes the last token that is allowed, the others the last one within a part of the vocabulary.
        part = mask & (1 << mask.bit_length() * (_WALKS - number) // _WALKS) - 1
        if not matcher.consume_token((part or mask).bit_length() - 1):
            return


def _first_line(error: object) -> str:
    """Return what an error says first: what follows are excerpts of the grammar."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if line and line[0] not in "<|"), "it cannot be compiled")
    if "failed to compile JSON schema: " in text:
        text = text.split("failed to compile JSON schema: ", 1)[1]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return "; ".join([text[:200], *reasons])[:400]


# -- the place of a fault in a schema ----------------------------------------------------------------------------------


def _with_place(schema: object, error: str) -> str:
    """Return why a schema cannot be enforced, with the path of the smallest subschema that cannot be.

    The library says what is wrong but not where. So each subschema is tried by itself, and the search goes on inside
    the first that fails too. Example: `{"anyOf": [{"type": "string"}, {"not": {}}]}` fails, ``anyOf/0`` does not,
    ``anyOf/1`` does and has no part that fails: the path is ``/anyOf/1``.
    """
    root = schema if isinstance(schema, dict) else {}
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    place, trials, inside, goes_on = "", 0, schema, True
    while goes_on:
        goes_on = False
        for step, part in _parts_of(inside):
            alone = {**shared, **part} if isinstance(part, dict) else part
            if trials < _MAX_TRIALS and (found := _error_of(_of_schema(alone), _byte_tokenizer())):
                place, error, inside, goes_on = place + step, found, part, True
                break
            trials += 1
    return f"{error} (at #{place[:200]})" if place else error


def _parts_of(schema: object) -> Iterator[tuple[str, object]]:
    """Yield the subschemas of a schema, each with the step to it."""
    if not isinstance(schema, dict):
        return
    known: dict[str, Any] = schema
    for name in _MAPS:
        if isinstance(each := known.get(name), dict):
            yield from ((f"/{name}/{_escaped(key)}", part) for key, part in each.items())
    for name in _LISTS:
        if isinstance(each := known.get(name), list):
            yield from ((f"/{name}/{index}", part) for index, part in enumerate(each))
    yield from ((f"/{name}", known[name]) for name in _SUBSCHEMAS if isinstance(known.get(name), dict))


def _escaped(key: str) -> str:
    """Return a key as JSON pointers write it, shortened."""
    return key[:60].replace("~", "~0").replace("/", "~1")
