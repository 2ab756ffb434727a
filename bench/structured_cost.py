"""What forms cost an answer: rows with a grammar beside the same rows without one, on one server in one run.

    python -m bench.structured_cost [--shape 8B] [--vocabulary 128256] [--streams 64] [--new-tokens 256] [--repeat 5]
                                    [--first-tokens 20] [--save FILE] [-- SERVE OPTIONS]

The weights are random, so the answers wander through the form: an array of objects that never ends. The tokenizer is
made here. Rounds with and without a form take turns.
"""

import argparse
import asyncio
import json
import random
import statistics
import string
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import Table
from bench.structured import large_schema
from mgpu.launch.bench.options import Wanted
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.bench.shapes import SHAPES, write_config
from mgpu.launch.bench.target import READY_S, prepared, started
from mgpu.protocol.client.async_client import AsyncClient

MOST_ADDED_SHARE = 0.05
"""Of the time of a step in which every row has a form."""
MOST_ADDED_S = 20e-3
"""To the first token, by a schema of 10 KiB that the server has not seen."""
Form = dict[str, str] | None
_BLANK = "\u0120"
"""As byte-level tokenizers write it."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    without: list[float]
    with_form: list[float]
    unit: str
    is_good: bool

    @property
    def line(self) -> str:
        pair = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (self.without, self.with_form)]
        return f"{self.what:<34} without {pair[0]}, with {pair[1]} {self.unit}: {'good' if self.is_good else 'MISSED'}"


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a byte-level tokenizer of ``size`` tokens, made like real ones.

    All bytes come first. The others are random pairs of tokens that came before: nine of ten are pieces of words, with
    and without a blank before them, the rest pairs of any two bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rng = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    letters, starts = list(string.ascii_letters), [*string.ascii_letters, _BLANK]
    while len(tokens) < size:
        is_word = rng.random() < 0.9
        first, second = (rng.choice(starts), rng.choice(letters)) if is_word else rng.choices(tokens[:256], k=2)
        if len(first) + len(second) > 10 or first + second in ids:
            continue
        merges.append((first, second))
        ids[first + second] = len(tokens)
        tokens.append(first + second)
        if is_word:
            starts.append(tokens[-1])
            if not first.startswith(_BLANK):
                letters.append(tokens[-1])
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def endless_form(number: int) -> Form:
    """Return a form whose answers are longer than any that is asked for; each ``number`` is compiled by itself."""
    fields = {
        "id": {"type": "integer"},
        f"note_{number}": {"type": "string"},
        "kind": {"enum": ["one", "two", "three"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,9}$"}},
    }
    entry = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"json_schema": json.dumps({"type": "array", "items": entry, "minItems": 1000})}


async def speed(client: AsyncClient, prompts: Sequence[Sequence[int]], new_tokens: int, forms: Sequence[Form]) -> float:
    """Return the tokens per second of the time between the first tokens of all and the last one of any."""
    first_s: list[float] = []
    counts: list[int] = []

    async def one(prompt: Sequence[int], form: Form, seed: int) -> None:
        options = {"max_tokens": new_tokens, "temperature": 1.0, "seed": seed, "structured_outputs": form}
        if form is None:
            options["ignore_eos"] = True
        count = 0
        async with client.stream(list(prompt), **options) as stream:
            async for delta in stream:
                if not count:
                    first_s.append(time.perf_counter())
                count += len(delta.token_ids)
        counts.append(count)

    await asyncio.gather(*(one(prompt, form, n) for n, (prompt, form) in enumerate(zip(prompts, forms, strict=True))))
    return (sum(counts) - len(counts)) / (time.perf_counter() - max(first_s))


async def first_token_ms(client: AsyncClient, prompt: Sequence[int], form: Form) -> float:
    began_s = time.perf_counter()
    async with client.stream(list(prompt), max_tokens=2, structured_outputs=form) as stream:
        async for _ in stream:
            return (time.perf_counter() - began_s) * 1e3
    raise RuntimeError("no token came")


async def measure(endpoint: str, vocabulary: int, wanted: argparse.Namespace) -> Table[Row]:
    table: Table[Row] = Table(wanted.save, describe("llguidance"))
    rng = random.Random(1)

    def prompts(count: int) -> list[list[int]]:
        return [[rng.randrange(256, vocabulary) for _ in range(128)] for _ in range(count)]

    async with AsyncClient(endpoint, timeout_s=3600, silence_timeout_s=60) as client:
        await speed(client, prompts(2), 8, [endless_form(-1), None])  # prepares the vocabulary
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(wanted.first_tokens):
            schema = {**large_schema(), "title": f"schema {number}"}
            for form in (None, {"json_schema": json.dumps(schema)}):
                times[form is not None].append(await first_token_ms(client, prompts(1)[0], form))
        added_ms = statistics.median(times[True]) - statistics.median(times[False])
        row = Row("first token, schema of 10 KiB", times[False], times[True], "ms", added_ms <= MOST_ADDED_S * 1e3)
        table.add(row)
        streams, rates = wanted.streams, {False: list[float](), True: list[float]()}
        for number in range(wanted.repeat):
            for has_form in (False, True):
                forms = [endless_form(number * streams + row) if has_form else None for row in range(streams)]
                rates[has_form].append(await speed(client, prompts(streams), wanted.new_tokens, forms))
        share = statistics.median(rates[False]) / statistics.median(rates[True]) - 1
        what = f"{streams} of {streams} rows with a form"
        table.add(Row(what, rates[False], rates[True], f"tokens/s, {share:+.1%} of a step", share <= MOST_ADDED_SHARE))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8B", choices=list(SHAPES))
    parser.add_argument("--vocabulary", type=int, help="tokens (default: the shape's)")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--first-tokens", type=int, default=20)
    parser.add_argument("--save", type=Path)
    parser.add_argument("serve_options", nargs="*")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mgpu-bench-") as folder:
        config = dict(SHAPES[wanted.shape])
        vocabulary = wanted.vocabulary or int(str(config["vocab_size"]))
        model = write_config(Path(folder) / wanted.shape, {**config, "vocab_size": vocabulary})
        write_tokenizer(model, vocabulary)
        options = (*wanted.serve_options, "--http", "none")
        with prepared(Wanted(str(model), None, "1GB/s", 1, None, options)) as target, started(target) as server:
            endpoint = server.wait_ready(READY_S)
            print(heading(describe("llguidance")), flush=True)
            table = asyncio.run(measure(endpoint, vocabulary, wanted))
    return 0 if table.is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
