"""Recommend layouts and formats: all that fit a machine, with context, speed and bits, the best first. Pure."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.planner import Plan, plan
from mgpu.orchestrator.placement.reports.speed import MANY, PROMPT, Speed, estimate_speed, number, seconds, speed_json
from mgpu.orchestrator.placement.split.divisibility import compatible_sizes
from mgpu.orchestrator.placement.split.layer_map import even_stages, map_text
from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.model.facts import DTYPE_BYTES, KvCacheDtype, ModelFacts
from mgpu.protocol.model.quantization import FLOAT8_CAPABILITY, Quant

ENOUGH_CONTEXT = 8192
"""Tokens of context that a layout should have room for, if the user asks for no number."""
_SHOWN, _WIDTH = 8, 80
_BITS: dict[Quant, float] = {"8": 8, "fp8": 8, "4": 5}
"""Per weight, with the scales of int4's groups."""
_FEW_BITS = 5.5
"""Formats below lose quality that one sees (docs/quantization.md)."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One layout in one format. ``options`` is what to add to the command."""

    options: str
    plan: Plan
    speed: Speed | None
    bits: float
    """Of a weight: those of the format, or of the file if that has fewer."""
    wanted: int
    """The context that was asked for, else `ENOUGH_CONTEXT`."""

    @property
    def has_context(self) -> bool:
        return self.plan.limits.max_seq_len >= self.wanted

    @property
    def rank(self) -> tuple[bool, bool, float, int]:
        """The order of the table: enough context, then enough bits, then speed, then what needs few options."""
        return (
            not self.has_context,
            self.bits <= _FEW_BITS,
            -_score(self.speed) if self.speed else -self.bits,
            len(self.options),
        )


def _score(speed: Speed) -> float:
    """Weigh one stream and many streams alike."""
    return speed.one_stream * (speed.many_streams or speed.one_stream)


def recommend(facts: ModelFacts, machine: Machine, options: LayoutOptions, stored_bits: float) -> list[Recommendation]:
    """Return what fits, best first; nothing without GPUs. ``options`` holds for all but layout and format."""
    if machine.kind == "cpu":
        return []
    found: dict[tuple[object, ...], Recommendation] = {}
    for typed, tried in _choices(facts, machine, options):
        try:
            planned = plan(facts, machine, tried)
        except UserError:  # it does not fit, or this machine cannot do it
            continue
        wanted = min(options.max_seq_len or ENOUGH_CONTEXT, facts.max_position)
        bits = min(stored_bits, _BITS.get(tried.quant, 8.0 * DTYPE_BYTES[planned.layout.dtype]))
        each = Recommendation(typed, planned, estimate_speed(planned), bits, wanted)
        found.setdefault((planned.layout, planned.limits), each)
    return sorted((each for each in found.values() if _is_needed(each, found.values())), key=lambda each: each.rank)


def _is_needed(each: Recommendation, found: Iterable[Recommendation]) -> bool:
    """Return False for a narrower cache where the same layout has room for the context without it."""
    layout = each.plan.layout
    wide = [other for other in found if other.plan.layout == replace(layout, kv_cache_dtype="auto")]
    return layout.kv_cache_dtype == "auto" or not any(other.has_context for other in wide)


def _choices(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> Iterator[tuple[str, LayoutOptions]]:
    """Yield options to try, with what to type for them: sizes, formats, and a narrower cache where context is short."""
    count = len(machine.devices)
    has_float8 = all(each.capability is None or each.capability >= FLOAT8_CAPABILITY for each in machine.devices)
    quants: tuple[Quant, ...] = ("none", "fp8", "8", "4") if has_float8 else ("none", "8", "4")
    if facts.formats:  # quantizing it a second time would only lose quality
        quants = ("none",)
    caches: tuple[KvCacheDtype, ...] = ("auto", "fp8") if options.kv_cache_dtype == "auto" else ("fp8",)
    for quant in quants:
        for cache in caches:
            free = replace(options, tp=None, tp_shares=None, device_layers=None, topology=None)
            base = replace(free, quant=quant, kv_cache_dtype=cache)
            added = (f" --quant {quant}" if quant != "none" else "") + (
                " --kv-cache-dtype fp8" if cache == "fp8" else ""
            )
            yield added.strip(), base  # what the server chooses by itself goes first: it needs no option
            sizes = compatible_sizes(facts, quant, options.experts)
            for size in sizes:
                if size <= count:
                    yield f"--tp {size}{added}", replace(base, tp=size)
            if 1 < count <= facts.num_layers and not (count in sizes and _all_reach(machine)):
                layers = map_text(even_stages(facts.num_layers, range(count)))
                yield f'-n "{layers}"{added}', replace(base, device_layers=layers)


def _all_reach(machine: Machine) -> bool:
    """Return True if tensor parallelism can use its own sums: a map of layers has no advantage then."""
    return all(link != "none" for row in machine.links for link in row)


def stored_bits(tensors: Mapping[str, TensorEntry]) -> float:
    """Return the bits per weight that a model's files hold."""
    matrices = [entry for entry in tensors.values() if len(entry.shape) > 1 and entry.nbytes]
    elements = sum(entry.shape[0] * _product(entry.shape[1:]) for entry in matrices)
    return 8 * sum(entry.nbytes for entry in matrices) / elements if elements else 16.0


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def recommendation_lines(command: str, found: Sequence[Recommendation]) -> list[str]:
    """Return the table in at most 80 columns, the rule of its order, and ``command`` with the best one's options."""
    if not found:
        return []
    shown = found[:_SHOWN]
    has_speed = any(each.speed for each in shown)
    columns = ("add", "bits", "context", *(("of 1", f"of {MANY}", f"{PROMPT // 1024}k prompt") if has_speed else ()))
    rows = [_cells(each)[: len(columns)] for each in shown]
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    about = f"; estimated tokens/s of 1 and {MANY} streams" if has_speed else ""
    lines = [f"what fits, best first (bits per weight{about}):"]
    for row in (columns, *rows):
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    more = f" ({len(found) - len(shown)} more fit)" if len(found) > len(shown) else ""
    last = "speed" if has_speed else "many bits"
    lines.append(f"order: room for {shown[0].wanted:,} tokens, more than {_FEW_BITS:g} bits, {last}{more}")
    whole = f"type: {command} {shown[0].options}".rstrip()
    return [*lines, *([whole] if len(whole) <= _WIDTH else [f"type: {command} \\", f"  {shown[0].options}"])]


def _short(options: str) -> str:
    """Return options that fit the table: a long map of layers is cut."""
    return options if len(options) <= 34 else re.sub(r'-n "([^;]*;).*"', r'-n "\1…"', options)


def _cells(each: Recommendation) -> tuple[str, ...]:
    speed = each.speed
    many = number(speed.many_streams) if speed and speed.many_streams is not None else "?"
    first = seconds(speed.first_token_s) if speed and speed.first_token_s is not None else "?"
    one = number(speed.one_stream) if speed else "?"
    return (
        _short(each.options) or "(nothing)",
        f"{each.bits:.3g}",
        f"{each.plan.limits.max_seq_len:,}",
        one,
        many,
        first,
    )


def recommendation_json(found: Sequence[Recommendation]) -> list[dict[str, object]]:
    """Return the whole table as plain data."""
    return [
        {
            "options": each.options,
            "bits": round(each.bits, 2),
            "max_seq_len": each.plan.limits.max_seq_len,
            "speed": speed_json(each.speed),
        }
        for each in found
    ]
