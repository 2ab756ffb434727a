"""Ask a real model for answers of random forms, and check each with another library.

    python -m bench.structured [--count 2000] [--seed 1] [--save FILE]

Half of the forms are JSON schemas with the shapes of real ones (nested objects and arrays, enums, bounds, patterns,
formats, unions, references), half are regular expressions. The built-in model is served on the CPU, and its tokens are
drawn at temperature 1, so that answers wander. Every answer that ends by itself must be valid: jsonschema says so of
documents, re of texts. Answers that the length cuts are counted apart.

Then the costs: the CPU time of a mask, and the time to the first token with a schema of 10 KiB and without one.
"""

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Table
from mgpu import Client, Completion, RequestFailed
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.server_process import ServerProcess

Schema = dict[str, Any]
MAX_TOKENS = 160
TOGETHER = 32
TIMED = 15
"""Requests of each kind whose first token is timed."""
_WORDS = (
    "id",
    "name",
    "kind",
    "value",
    "items",
    "tags",
    "unit",
    "note",
    "from",
    "to",
    "é_1",
    "a/b",
    "$x",
    "first name",
)
_PATTERNS = ("^[a-z]{2,6}$", "^[A-Z]{3}-[0-9]{2}$", "^(red|green|blue)$", "^x+y?$")
_FORMATS = ("date", "time", "ipv4", "uuid")


# -- forms -------------------------------------------------------------------------------------------------------------


def random_schema(rng: random.Random) -> Schema:
    """Return a schema of an object whose documents are short."""
    shared = {"point": {"type": "object", "properties": {"x": _number(rng), "y": _number(rng)}, "required": ["x"],
                        "additionalProperties": False}}  # fmt: skip
    schema = _object(rng, depth=2)
    if "#/$defs/point" in json.dumps(schema):
        schema["$defs"] = shared
    return schema


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> Schema:
    leaves = (_string, _number, _enum, _constant)
    nested = (_object_of, _array, _union, _reference)
    return rng.choice((*leaves, *nested) if depth > 0 else leaves)(rng, depth)


def _object_of(rng: random.Random, depth: int) -> Schema:
    return _object(rng, depth)


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 1)
    return {"type": "array", "items": _value(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(1, 2)}


def _union(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth - 1), rng.choice(({"type": "null"}, {"type": "boolean"}))]}


def _reference(rng: random.Random, depth: int) -> Schema:
    return {"$ref": "#/$defs/point"}


def _string(rng: random.Random, depth: int = 0) -> Schema:
    kind = rng.randrange(3)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS), "maxLength": 12}
    if kind == 1:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 9)}


def _number(rng: random.Random, depth: int = 0) -> Schema:
    low = rng.randint(-50, 50)
    kind = rng.choice(("integer", "number"))
    schema: Schema = {"type": kind, "minimum": low, "maximum": low + rng.randint(1, 500)}
    return schema if kind == "number" else rng.choice((schema, {"type": "integer", "multipleOf": 5, "minimum": 0}))


def _enum(rng: random.Random, depth: int = 0) -> Schema:
    return {"enum": rng.sample([*_WORDS, 1, 2.5, None, True, ["a"], {"k": 1}], rng.randint(1, 5))}


def _constant(rng: random.Random, depth: int = 0) -> Schema:
    return {"const": rng.choice([*_WORDS, 0, False])}


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """Return an expression of which every match is short."""
    kind = rng.randrange(6) if depth else rng.randrange(3)
    if kind == 0:
        return rng.choice(("[a-f]", r"\d", "[A-Z0-9_]", "[^aeiou\\n]", "[ .,]", "[à-ü]"))
    if kind == 1:
        return "".join(rng.choice("abcxyz 0189-é") for _ in range(rng.randint(1, 4)))
    if kind == 2:
        return re.escape(rng.choice(("a/b", 'say "x"', "1+1", "(ok)", "c:\\d", "#[]")))
    inner = random_regex(rng, depth - 1)
    if kind == 3:
        return f"({inner}|{random_regex(rng, depth - 1)})"
    if kind == 4:
        return f"({inner}){rng.choice(('?', '{1,3}', '{2}', '{0,2}'))}"
    return inner + random_regex(rng, depth - 1)


def random_forms(count: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield forms of ``structured_outputs``, schemas and expressions in turn."""
    rng = random.Random(seed)
    for number in range(count):
        yield {"regex": random_regex(rng)} if number % 2 else {"json_schema": json.dumps(random_schema(rng))}


def fault_of(form: Mapping[str, object], text: str) -> str:
    """Return why a text does not have the form, by libraries that the server does not use; empty if it has it."""
    if "regex" in form:
        return "" if re.fullmatch(str(form["regex"]), text) else "no match"
    import jsonschema

    checker = jsonschema.Draft202012Validator(
        json.loads(str(form["json_schema"])), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    try:
        return "; ".join(error.message for error in checker.iter_errors(json.loads(text)))
    except ValueError as error:
        return f"no JSON: {error}"


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The answers of one kind of forms."""

    kind: str
    valid: int = 0
    cut: int = 0
    tokens: int = 0
    refused: int = 0
    first_fault: str = ""
    faults: int = 0

    @property
    def is_good(self) -> bool:
        return not self.faults and not self.refused

    @property
    def line(self) -> str:
        counts = f"{self.valid:,} valid | {self.cut:,} cut | {self.refused:,} refused | {self.faults:,} invalid"
        return f"| {self.kind} | {counts} | {self.tokens:,} tokens | {self.first_fault} |"


def answers_of(client: Client, forms: list[dict[str, object]], seed: int) -> Iterator[Completion | RequestFailed]:
    """Yield an answer for each form; ``TOGETHER`` of them are made at a time."""
    for start in range(0, len(forms), TOGETHER):
        streams = []
        for number, form in enumerate(forms[start : start + TOGETHER], start):
            prompt = "Write an example.\n"
            options = {"max_tokens": MAX_TOKENS, "temperature": 1.0, "seed": seed + number}
            streams.append(client.stream(prompt, structured_outputs=form, **options))
        for stream in streams:
            try:
                yield stream.completion()
            except RequestFailed as error:
                yield error


def check(client: Client, count: int, seed: int) -> list[Row]:
    """Ask for ``count`` answers and check them."""
    rows = {"json_schema": Row("schemas"), "regex": Row("expressions")}
    forms = list(random_forms(count, seed))
    for form, answer in zip(forms, answers_of(client, forms, seed), strict=True):
        row = rows[next(iter(form))]
        if isinstance(answer, RequestFailed):
            row.refused += 1
            row.first_fault = row.first_fault or f"{form}: {answer}"
            continue
        row.tokens += len(answer.token_ids)
        fault = fault_of(form, answer.text) if answer.finish_reason == "stop" else ""
        row.faults += bool(fault)
        row.cut += answer.finish_reason != "stop"
        row.valid += answer.finish_reason == "stop" and not fault
        row.first_fault = row.first_fault or (f"{form}: {answer.text!r}: {fault}" if fault else "")
    return list(rows.values())


def first_token_ms(client: Client, form: dict[str, object] | None) -> float:
    """Return the median time to the first token of a short prompt."""
    times = []
    for number in range(TIMED + 1):
        began_s = time.perf_counter()
        options = {"max_tokens": 4, "seed": number, "structured_outputs": form}
        with client.stream(f"An example {number}: ", **options) as stream:
            next(stream)
            times.append((time.perf_counter() - began_s) * 1e3)
    return statistics.median(times[1:])


def large_schema() -> Schema:
    """Return a schema of more than 10 KiB."""
    field = {"type": "string", "description": "x" * 60, "enum": ["one", "two", "three", "four"]}
    names = [f"field_{number}" for number in range(80)]
    return {
        "type": "object",
        "properties": dict.fromkeys(names, field),
        "required": names,
        "additionalProperties": False,
    }


def mask_us(count: int, seed: int) -> tuple[float, float]:
    """Return mean and largest CPU time of a token in the threads of a worker, in µs, for answers drawn at random."""
    import llguidance

    from mgpu.orchestrator.gateway.text.grammars.grammar import checked_grammar
    from mgpu.orchestrator.gateway.text.tokenizer import load_codec
    from mgpu.orchestrator.models.find import read_model, resolve_model
    from mgpu.protocol.internal.grammars import new_matcher, token_table
    from mgpu.worker.sampling.grammar_masks import MaskMaker
    from mgpu.worker.sampling.grammar_state import GrammarState

    model = resolve_model("demo")
    facts = read_model(model).facts
    codec = load_codec(str(model.path), "gguf")
    assert codec is not None
    tokens, rng, times = token_table(codec.vocabulary(facts.vocab_size)), random.Random(seed), []
    maker = MaskMaker(llguidance.LLExecutor(num_threads=1), facts.vocab_size)
    for form in random_forms(count, seed):
        state = GrammarState(new_matcher(tokens, checked_grammar(form)), [2], facts.vocab_size)
        token_id = -1
        for _ in range(40):
            began_s = time.thread_time()
            state.take([token_id] if token_id >= 0 else [], 60.0)
            state.is_suspect = True  # computed in this thread, so that its time is seen
            mask = int.from_bytes(maker.masks([state]).numpy().tobytes(), "little")
            times.append((time.thread_time() - began_s) * 1e6)
            allowed = [each for each, bit in enumerate(reversed(bin(mask)[2:])) if bit == "1"]
            if (token_id := rng.choice(allowed)) == 2:
                break
    return statistics.mean(times), max(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, help="write the rows to this file as JSON")
    arguments = parser.parse_args()
    table: Table[Row] = Table(arguments.save, describe())
    print(heading(table.machine))
    mean_us, most_us = mask_us(200, arguments.seed)
    table.say(f"a token in the threads of a worker: {mean_us:.0f} µs of CPU time, {most_us:.0f} µs at most")
    with (
        ServerProcess("-m", "demo", "--device", "cpu", "--max-seq-len", "1024") as server,
        Client(server.wait_ready(), timeout_s=3600) as client,
    ):
        large: dict[str, object] = {"json_schema": json.dumps(large_schema())}
        for name, form in (("no form", None), ("json_object", {"json_object": True}), ("a schema of 10 KiB", large)):
            table.say(f"first token with {name}: {first_token_ms(client, form):.1f} ms")
        for row in check(client, arguments.count, arguments.seed):
            table.add(row)
    return 0 if table.is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
