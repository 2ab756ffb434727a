"""The table of docs/performance.md, made of what `bench/performance` saved.

The targets, and the numbers of vLLM and SGLang, are those that mgpu was to be measured against.
"""

from dataclasses import dataclass
from pathlib import Path

from bench.performance.records import Result, Results, machine_lines
from bench.performance.rows import (
    BURST,
    DECODE,
    FAILED,
    FIRST_TOKEN,
    GAP,
    IDLE,
    OCCUPANCY,
    PREFILL,
    READY,
    READY_COLD,
    READY_FILES,
    READY_PEER,
)  # fmt: skip

BEGIN, END = (
    "<!-- bench.performance --write: begin -->",
    "<!-- bench.performance --write: end -->",
)
HEAD = """| what | mgpu: median (least to greatest) | share of limit | transformers | vLLM, SGLang ¹ | target | met |
| --- | --- | --- | --- | --- | --- | --- |"""
NOTE = "¹ The better of vLLM 0.26.0 and SGLang 0.5.16 on another H200: offline engine, in process, prefix cache off."
BATCHED, BATCHED_NOTE = " ²", "² Continuous batching; else `generate` with a static batch."
GENERATE, CONTINUOUS = "transformers", "transformers-continuous"
NONE = "\N{EN DASH}"
SECONDS, MILLISECONDS, MICROSECONDS, SHARE, TOKENS = "s", "ms", "µs", "%", "tok/s"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: which row of which part it shows, beside what others reach and what was aimed at."""

    title: str
    part: str
    what: str
    count: int = 0
    length: int = 0
    unit: str = TOKENS
    peers: str = NONE
    target: float | None = None
    is_more_better: bool = True
    peer_parts: tuple[str, ...] = ()
    peer_what: str = ""
    """Under which name transformers' row is kept, if it is another."""
    field: str = "value"
    limit: float | None = None
    """For what has no limit of its own: what the arithmetic units or the memory allow at best."""


def _decode(part: str, name: str, batch: int, context: int, peers: str = NONE, target: float | None = None) -> Line:
    """Make a line of decoding; transformers decodes in bf16 only."""
    by = {"bf16": (GENERATE, CONTINUOUS), "32b": ("transformers-32b",)}.get(part, ()) if context <= 1024 else ()
    return Line(f"{name}, batch {batch}, {context:,} context", part, DECODE, batch, context, TOKENS, peers, target,
                peer_parts=by)  # fmt: skip


EIGHT, LARGE = "Llama-3.1-8B", "Qwen3-32B"
LINES = (
    _decode("bf16", f"{EIGHT} bf16", 1, 128, "210", 250),
    _decode("bf16", "bf16", 8, 128, "1,615", 1900),
    _decode("bf16", "bf16", 64, 128, "10,737", 11500),
    _decode("bf16", "bf16", 256, 128),
    _decode("bf16", "bf16", 1, 1024),
    _decode("bf16", "bf16", 8, 1024),
    _decode("bf16", "bf16", 64, 1024, "8,400", 9800),
    _decode("bf16", "bf16", 256, 1024, "14,256", 17500),
    _decode("bf16", "bf16", 1, 8000),
    _decode("bf16", "bf16", 8, 8000),
    _decode("bf16", "bf16", 64, 8000),
    Line("prefill, 32 x 1,024 tokens", "bf16", PREFILL, 32, 1024, TOKENS, "43,730", 43000, peer_parts=(GENERATE,),
         limit=48000),
    Line("prefill, 4 x 8,192 tokens", "bf16", PREFILL, 4, 8192, TOKENS, "38,692", 38000, peer_parts=(GENERATE,),
         limit=48000),
    _decode("fp8", f"{EIGHT} fp8", 1, 128),
    _decode("fp8", "fp8", 1, 1024, "288", 430),
    _decode("fp8", "fp8", 64, 1024),
    _decode("fp8", "fp8", 256, 1024, "16,211", 19000),
    Line("fp8, prefill, 32 x 1,024 tokens", "fp8", PREFILL, 32, 1024),
    _decode("fp8-kv", "fp8 with an fp8 cache", 1, 1024),
    _decode("fp8-kv", "fp8 with an fp8 cache", 64, 1024),
    _decode("fp8-kv", "fp8 with an fp8 cache", 256, 1024),
    _decode("int8", f"{EIGHT} int8", 1, 128, target=430),
    _decode("int8", "int8", 8, 128),
    _decode("int4", f"{EIGHT} int4", 1, 128, target=600),
    _decode("int4", "int4", 8, 128),
    _decode("32b", f"{LARGE} bf16", 1, 1024, "53", 60),
    _decode("32b", f"{LARGE} bf16", 64, 1024, "2,608", 2900),
    Line(f"{EIGHT} bf16, 256 requests of 1,024 in, 256 out, at once: output", "bf16", BURST, 256, 1024, TOKENS,
         "6,047 in process", 6500, peer_parts=(GENERATE, CONTINUOUS)),
    Line("time to first token, 128-token prompt, idle server", "bf16", FIRST_TOKEN, 1, 128, MILLISECONDS,
         "11.5 in process", 7, is_more_better=False, peer_parts=(GENERATE, CONTINUOUS), limit=3.5),
    Line("ready, dummy weights, kernels compiled before", "ready", READY, unit=SECONDS, peers="75 to 95", target=8,
         is_more_better=False),
    Line("ready, dummy weights, no kernel compiled", "ready", READY_COLD, unit=SECONDS, peers="75 to 95", target=8,
         is_more_better=False),
    Line("ready, 16 GB from the page cache", "ready", READY_FILES, unit=SECONDS, target=12, is_more_better=False,
         peer_parts=("ready",), peer_what=READY_PEER),
    Line("GPU idle before a decode step, batch 1", "gaps", GAP, 1, 128, MICROSECONDS, target=20, is_more_better=False),
    Line("GPU idle before a decode step, batch 64", "gaps", GAP, 64, 128, MICROSECONDS, target=20,
         is_more_better=False),
    Line("GPU busy while decoding, batch 1", "gaps", OCCUPANCY, 1, 128, SHARE, target=0.975),
    Line("GPU busy while decoding, batch 64", "gaps", OCCUPANCY, 64, 128, SHARE, target=0.975),
    Line("time with a step in flight, batch 1", "bf16", DECODE, 1, 128, SHARE, target=0.975, field="occupancy_share"),
    Line("time with a step in flight, batch 64", "bf16", DECODE, 64, 128, SHARE, target=0.975,
         field="occupancy_share"),
    Line("idle server, of a core", "bf16", IDLE, unit=SHARE, target=0.01, is_more_better=False),
)  # fmt: skip


def find(results: Results, part: str, what: str, count: int, length: int) -> Result:
    """Return a row that a part saved, or a row with a note that says why it is missing."""
    rows: list[Result] = results.get(part, {}).get("rows", [])
    for row in rows:
        if (row["what"], row["count"], row["length"]) == (what, count, length):
            return row
    failed = [row["note"] for row in rows if row["what"] == FAILED]
    return {"note": failed[0] if failed else "not measured"}


def number(value: float, unit: str) -> str:
    """Write a number with three digits or all that are before the point."""
    if unit == SHARE:
        return f"{value:.1%}" if value >= 0.1 else f"{value:.2%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def cells(line: Line, results: Results) -> list[str]:
    """Return the cells of one line."""
    row = find(results, line.part, line.what, line.count, line.length)
    value = row.get(line.field)
    target = NONE if line.target is None else f"{'≥' if line.is_more_better else '≤'} {number(line.target, line.unit)}"
    mine = [short(row.get("note", "not measured")), NONE]
    if value is not None:
        spread = (number(row[f"{line.field}_{end}"], line.unit) for end in ("low", "high"))
        mine = [f"{with_unit(value, line.unit)} ({' to '.join(spread)})", share_of_limit(line, row)]
    return [line.title, *mine, of_peer(line, results), line.peers, target, verdict(line, value)]


def share_of_limit(line: Line, row: Result) -> str:
    """Say how much of what is possible was reached."""
    if line.limit:
        share = row["value"] / line.limit if line.is_more_better else line.limit / row["value"]
        return f"{share:.0%}"
    return f"{row['share']:.0%}" if line.field == "value" and row.get("share") else NONE


def with_unit(value: float, unit: str) -> str:
    """Write a number with its unit; tokens per second are what most lines are about and need none."""
    return number(value, unit) + ("" if unit in (TOKENS, SHARE) else f" {unit}")


def verdict(line: Line, value: float | None) -> str:
    """Say whether the target is met, else by how much it is missed."""
    if line.target is None or value is None:
        return NONE
    is_met = value >= line.target if line.is_more_better else value <= line.target
    return "yes" if is_met else f"no, {value / line.target - 1:+.1%}"


def of_peer(line: Line, results: Results) -> str:
    """Return the better of transformers' two results, on the machine of that result."""
    what = line.peer_what or line.what
    rows = [(part, find(results, part, what, line.count, line.length)) for part in line.peer_parts]
    found = [(row["value"], part) for part, row in rows if row.get("value") is not None]
    if not found:
        notes = [row["note"] for _, row in rows if row["note"] != "not measured"]
        return short(notes[0]) if notes else NONE
    value, part = (max if line.is_more_better else min)(found)
    return with_unit(value, line.unit) + (BATCHED if part == CONTINUOUS else "")


def short(note: str) -> str:
    """Put a note into a cell."""
    text = " ".join(note.replace("|", "/").split())
    return text if len(text) <= 90 else text[:89] + "…"


def table(results: Results) -> str:
    """Return the whole Markdown text between the markers."""
    lines = "\n".join(f"| {' | '.join(cells(line, results))} |" for line in LINES)
    notes = f"{NOTE}\n{BATCHED_NOTE}" if f"{BATCHED} |" in lines else NOTE
    machines = "\n".join(f"- {line}" for line in machine_lines(results.items()))
    return f"{HEAD}\n{lines}\n\n{notes}\n\nMeasured on:\n\n{machines}\n"


def insert(page: str, text: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """Put text between the markers of a page. ValueError when it has not both."""
    before, begin, rest = page.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not (begin and end):
        raise ValueError(f"the page needs the two lines {markers[0]} and {markers[1]}")
    return f"{before}{begin}\n{text}{end}{after}"


def write_between(page: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Put text between the markers of a file. SystemExit when it cannot be."""
    try:
        page.write_text(insert(page.read_text(), text, markers))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {page}: {error}") from error
