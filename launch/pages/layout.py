"""The layout of a plan in 80 columns. `orchestrator/placement/reports/table.py` has the wide form, for logs."""

import textwrap
from collections.abc import Iterator, Sequence

from mgpu.orchestrator.placement.machine.devices import DeviceInfo
from mgpu.orchestrator.placement.planner import Plan
from mgpu.orchestrator.placement.rank_row import RankRow
from mgpu.orchestrator.placement.reports.table import layers_text, layout_text

WIDTH = 80
_LOG_TIME = 9
"""Columns of the time before the first line, in the log of serve."""
_COLUMNS = (
    ("", "rank"), ("", "device"), ("memory GiB", "free/total"), ("", "layers"), ("query", "heads"), ("KV", "heads"),
    ("weights", "GiB"), ("KV cache", "GiB"), ("KV cache", "tokens"),
)  # fmt: skip
_LINK_WORDS = {"nvlink": "NVLink", "pcie": "PCIe", "none": "none, only through the host"}


def layout_for(plan: Plan, columns: int | None) -> str:
    """Return the wide form where a terminal of that many columns shows it whole, or where there is none."""
    wide = layout_text(plan)
    return wide if columns is None or max(map(len, wide.splitlines())) <= columns else narrow_layout(plan)


def narrow_layout(plan: Plan) -> str:
    """Return what `layout_text` has, with ranges as people write them: 0-31 are 32 layers, x2 is held by two ranks."""
    wide = layout_text(plan).splitlines()
    first, last = 2 + len(plan.rows), len(wide) - len(plan.notes)
    matrix = [line for line in wide[first:last] if line.startswith("P2P")]
    start = wide.index(matrix[0]) if matrix else last
    lines = [
        *_wrapped(wide[0], WIDTH - _LOG_TIME),
        *_devices(plan),
        *_table([_cells(row, plan.facts.num_layers) for row in plan.rows]),
        *_replicas(plan),
        *(part for line in wide[first:start] for part in _wrapped(line)),
        *_links(plan, wide[start:last]),
        *(part for line in wide[last:] for part in _wrapped(line)),
    ]
    return "\n".join(lines)


def _wrapped(line: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)


def _devices(plan: Plan) -> Iterator[str]:
    """Yield which GPUs have which name."""
    if plan.machine.kind == "cpu":
        return
    by_name: dict[str, list[int]] = {}
    for device in dict.fromkeys(row.device for row in plan.rows if row.device.kind == "cuda"):
        by_name.setdefault(device.name, []).append(device.ordinal)
    for name, ordinals in by_name.items():
        yield from _wrapped(f"{'GPU' if len(ordinals) == 1 else 'GPUs'} {_ranges(ordinals)}: {name}")


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers in order, runs as ranges: 0-3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(_span(first, last + 1) for first, last in runs)


def _span(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def _cells(row: RankRow, num_layers: int) -> tuple[str, ...]:
    device, heads = row.device, row.heads
    has_layers = row.end_layer > row.first_layer
    replicas = f" x{heads.kv_replicas}" if heads.kv_replicas > 1 else ""
    return (
        str(row.rank),
        _short_name(device),
        f"{device.free_bytes / 2**30:.1f}/{device.total_bytes / 2**30:.1f}",
        layers_text(row, num_layers, _span(row.first_layer, row.end_layer)),
        _span(heads.q_start, heads.q_stop) if has_layers else "-",
        _span(heads.kv_start, heads.kv_stop) + replicas if has_layers else "-",
        f"{row.weight_bytes / 2**30:.2f}",
        f"{row.kv_bytes / 2**30:.2f}" if has_layers else "-",
        f"{row.kv_tokens:,}" if has_layers else "-",
    )


def _replicas(plan: Plan) -> list[str]:
    """Return what ``x2`` means, if a KV head is held by several ranks."""
    counts = sorted({row.heads.kv_replicas for row in plan.rows} - {1})
    return [f"x{count}: each of these KV heads is on {count} ranks" for count in counts]


def _short_name(device: DeviceInfo) -> str:
    return f"CPU {device.ordinal}" if device.kind == "cpu" else f"cuda[{device.ordinal}]"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    heads = [tuple(part[line] for part in _COLUMNS) for line in range(2)]
    lines = [*heads, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    return [gap.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _links(plan: Plan, matrix: list[str]) -> list[str]:
    """Return how GPUs reach each other: in a sentence if all do it in the same way, else the matrix if it fits."""
    if not matrix:
        return []
    gpus = len(plan.machine.gpus)
    kinds = {link for row in plan.machine.links[:gpus] for link in row[:gpus] if link != "self"}
    if len(kinds) == 1:
        count = len(plan.machine.gpus)
        return [f"peer access between {'both' if count == 2 else f'all {count}'} GPUs: {_LINK_WORDS[kinds.pop()]}"]
    if max(map(len, matrix)) > WIDTH:
        return ["peer access differs between pairs of GPUs: -v shows the matrix"]
    return matrix
