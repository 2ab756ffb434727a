"""Print a plan as the table that `serve` logs and `plan` shows, and as JSON."""

from collections.abc import Sequence

from mgpu.orchestrator.placement.cpu_experts import cpu_expert_layers
from mgpu.orchestrator.placement.fit import gib
from mgpu.orchestrator.placement.machine.nvml import Link
from mgpu.orchestrator.placement.planner import Plan
from mgpu.orchestrator.placement.rank_row import RankRow
from mgpu.orchestrator.placement.reports.stored_formats import stored_json, stored_lines
from mgpu.orchestrator.placement.split.sizes import active_bytes
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import DTYPE_BYTES
from mgpu.protocol.model.placement import Mode, TensorPart
from mgpu.protocol.model.quantization import formats_of, weight_format

_TITLES: dict[Mode, str] = {
    "cpu": "one worker on the CPU",
    "single": "whole model on one GPU",
    "tensor-parallel": "tensor-parallel",
    "layer-mapped": "layer-mapped",
    "hybrid": "layer-mapped stages, tensor-parallel inside",
}
_COLUMNS = ("rank", "device", "memory free/total", "layers", "q heads", "KV heads", "weights", "KV cache", "KV tokens")
_PCIE_NAMES = {10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""One switch, several, a host bridge, a NUMA node, between sockets."""
_LINK_NAMES = {"self": "-", "nvlink": "NVL", "pcie": "PCI", "none": "no", "broken": "bad"}


def layout_text(plan: Plan) -> str:
    """Return mode and reason, one row per rank, the size of the KV cache, and the peer access of several GPUs."""
    lines = [_headline(plan), *_table(_COLUMNS, [_cells(row, plan.facts.num_layers) for row in plan.rows])]
    lines += _shares_lines(plan)
    lines += stored_lines(plan)
    if plan.facts.experts is not None:
        lines.append(_experts_line(plan, plan.facts.experts))
    narrow = " in fp8 (e4m3)" if plan.layout.kv_cache_dtype == "fp8" else ""
    lines.append(
        f"KV cache{narrow}: {plan.kv_tokens:,} tokens, {plan.concurrency:.1f} requests at the full context of "
        f"{plan.limits.max_seq_len:,}{_shortened(plan)}"
    )
    lines += _latent_lines(plan) + _states_lines(plan) + _windows_lines(plan)
    if plan.layout.placement.world_size > 1:
        lines.append(_transport_line(plan))
    if plan.machine.hosts:
        lines.append(_hosts_line(plan.machine.hosts))
    elif len(plan.machine.gpus) > 1:
        lines += _matrix(plan)
    return "\n".join(lines + [f"note: {note}" for note in plan.notes])


def _headline(plan: Plan) -> str:
    title, count = _TITLES[plan.mode], plan.layout.placement.world_size
    if count > 1:
        title += f" over {_counted(plan)}"
    name = weight_format(plan.layout.quant).name
    quantized = f", linear layers in {name}" if name else ""
    return f"layout: {title} in {plan.layout.dtype}{quantized} ({plan.reason})"


def _counted(plan: Plan) -> str:
    """Return the devices in numbers, each kind by itself."""
    used = {row.device.ordinal: row.device.kind for row in plan.rows}
    gpus, workers = (sum(kind == each for each in used.values()) for kind in ("cuda", "cpu"))
    parts = [f"{gpus} GPU{'s' * (gpus > 1)}"] * bool(gpus) + [f"{workers} CPU worker{'s' * (workers > 1)}"] * bool(
        workers
    )
    return " and ".join(parts)


def layers_text(row: RankRow, last_layer: int, layers: str) -> str:
    """Return ``layers``, or what a stage without layers has."""
    if row.end_layer > row.first_layer:
        return layers
    return "head" if row.end_layer == last_layer else "embedding"


def _shares_lines(plan: Plan) -> list[str]:
    """Return what unequal shares of the heads mean for the rest of a layer."""
    lines = []
    for stage in (stage for stage in plan.layout.placement.stages if stage.shares):
        parts = [TensorPart(rank, len(stage.shares), stage.shares) for rank in range(len(stage.shares))]
        step = formats_of(plan.facts, stage.first_layer, plan.layout.quant).down.splits_at
        columns = [len(part.columns(plan.facts.intermediate_size, step)) for part in parts]
        rows = [len(each) for each in parts[0].vocabulary(plan.facts.vocab_size)]
        lines.append(
            f"shares {' + '.join(map(str, stage.shares))} of {plan.facts.num_kv_heads} KV heads: MLP columns "
            f"{' + '.join(map(str, columns))}, vocabulary {' + '.join(map(str, rows))}"
        )
    return lines


def _experts_line(plan: Plan, experts: ExpertFacts) -> str:
    layout = plan.layout
    total, active = active_bytes(plan.facts, DTYPE_BYTES[layout.dtype], layout.quant)
    line = (
        f"experts: {experts.count} in {sum(experts.sparse_layers)} of {plan.facts.num_layers} layers, "
        f"{experts.active} active: a token uses {gib(active)} of {gib(total)} of weights"
    )
    if layout.cpu_experts:
        held = [f"{gib(row.host_bytes)} of rank {row.rank}" for row in plan.rows if row.host_bytes]
        line += f"; on the CPU without their layers: {', '.join((cpu_expert_layers(layout), *held))}"
    most = max(len(stage.devices) for stage in layout.placement.stages)
    if most == 1:
        return line
    if layout.expert_split == "tensor":
        width = -(-experts.width // most)
        return f"{line}; each rank has {width} of {experts.width} columns of every expert ({plan.expert_reason})"
    count = -(-experts.count // most)
    return f"{line}; each rank has up to {count} whole experts ({plan.expert_reason})"


def _latent_lines(plan: Plan) -> list[str]:
    """Return what latent attention caches, and what it costs that each rank of a stage has a copy; else nothing."""
    latent, largest = plan.facts.latent, max(plan.rows, key=lambda row: row.kv_token_bytes)
    if latent is None:
        return []
    line = (
        f"latent cache: {latent.width} values per token in each of {plan.facts.num_layers} layers, for all heads: "
        f"{largest.kv_token_bytes / 1024:.1f} KiB per token on rank {largest.rank}"
    )
    everything = sum(row.kv_bytes for row in plan.rows)
    copies = everything - sum(row.kv_bytes for row in plan.rows if row.heads.q_start == 0)
    if copies:
        line += f"; all ranks of a stage hold the same, so {gib(copies)} of {gib(everything)} are copies"
    return [line]


def _states_lines(plan: Plan) -> list[str]:
    """Return what sequences keep in linear layers; nothing if there are none."""
    facts, largest = plan.facts, max(plan.rows, key=lambda row: row.state_bytes)
    if facts.linear is None:
        return []
    room = f"room for {largest.states} requests and {largest.snapshots} prefixes: {gib(largest.all_state_bytes)}"
    held = "in all" if len(plan.rows) == 1 else f"on rank {largest.rank}"
    return [
        f"states: {gib(largest.state_bytes)} per request {held}, in {sum(facts.linear.layers)} linear layers of "
        f"{facts.num_layers}; {room}"
    ]


def _windows_lines(plan: Plan) -> list[str]:
    """Return what layers with a window keep, if they keep less than the others."""
    facts, (window, in_chunks) = plan.facts, plan.facts.sight
    largest = max(plan.rows, key=lambda row: row.window_token_bytes)
    if not largest.window_tokens:
        return []
    longest, seen = plan.limits.max_seq_len, min(plan.limits.max_seq_len, largest.least_window_tokens)
    held = "" if len(plan.rows) == 1 else f" on rank {largest.rank}"
    return [
        f"windows: {sum(facts.sliding_layers)} of {facts.num_layers} layers keep what a "
        f"{'chunk' if in_chunks else 'window'} of {window:,} tokens shows, in a pool of {largest.window_tokens:,} "
        f"tokens, {gib(largest.window_tokens * largest.window_token_bytes)}; a request of {longest:,} tokens takes "
        f"{gib(largest.pool_bytes(longest, seen))} of both pools{held}, not {gib(largest.pool_bytes(longest, 0))}"
    ]


def _shortened(plan: Plan) -> str:
    if plan.limits.max_seq_len == plan.facts.max_position:
        return ""
    return f" (the model allows {plan.facts.max_position:,})"


def _cells(row: RankRow, num_layers: int) -> tuple[str, ...]:
    device, heads = row.device, row.heads
    has_layers = row.end_layer > row.first_layer
    held = f"own [{heads.kv_start}, {heads.kv_stop})"
    if heads.kv_replicas > 1:
        held = f"[{heads.kv_start}, {heads.kv_stop}) on {heads.kv_replicas} ranks"
    return (
        str(row.rank),
        device.name if device.kind == "cpu" else f"cuda[{device.ordinal}] {device.name}",
        f"{device.free_bytes / 2**30:.1f}/{device.total_bytes / 2**30:.1f} GiB",
        layers_text(row, num_layers, f"[{row.first_layer}, {row.end_layer})"),
        *((f"{heads.num_q} [{heads.q_start}, {heads.q_stop})", f"{heads.num_kv} {held}") if has_layers else ("-", "-")),
        gib(row.weight_bytes),
        gib(row.kv_bytes) if has_layers else "-",
        f"{row.kv_tokens:,}" if has_layers else "-",
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    ]


def _transport_line(plan: Plan) -> str:
    parts = []
    if plan.layout.transport != "none":
        parts.append(f"partial sums by {plan.layout.transport}")
    if plan.layout.stage_transport != "none":
        parts.append(f"activations between stages by {plan.layout.stage_transport}")
        if plan.layout.stage_transport == "peer" and plan.layout.staged:
            pairs = ", ".join(f"{a} to {b}" for a, b in plan.layout.staged)
            parts.append(f"through pinned host memory from rank {pairs}")
    return "transport: " + ", ".join(parts)


def _hosts_line(hosts: Sequence[str]) -> str:
    """Return which ranks are where."""
    ranks = {host: [str(rank) for rank, its in enumerate(hosts) if its == host] for host in hosts}
    parts = [f"{host} has rank{'s' * (len(each) > 1)} {', '.join(each)}" for host, each in ranks.items()]
    return f"hosts: {'; '.join(parts)}"


def _matrix(plan: Plan) -> list[str]:
    ordinals = [str(device.ordinal) for device in plan.machine.gpus]
    count = len(ordinals)
    links = (row[:count] for row in plan.machine.links[:count])
    rows = [
        [ordinal, *(_link_name(plan, first, second, link) for second, link in enumerate(row))]
        for first, (ordinal, row) in enumerate(zip(ordinals, links, strict=True))
    ]
    return _table(["P2P", *ordinals], rows)


def _link_name(plan: Plan, first: int, second: int, link: Link) -> str:
    """Return a link as `nvidia-smi topo -m` names it, where it is known over what it goes."""
    if link != "pcie" or not plan.machine.distances:
        return _LINK_NAMES[link]
    return _PCIE_NAMES.get(plan.machine.distances[first][second], _LINK_NAMES[link])


def layout_json(plan: Plan) -> dict[str, object]:
    """Return the same as plain data. Sizes are bytes, ranges half-open."""
    return {
        "mode": plan.mode,
        "reason": plan.reason,
        "dtype": plan.layout.dtype,
        "quant": plan.layout.quant,
        "checkpoint_formats": stored_json(plan),
        "kv_cache_dtype": plan.layout.kv_cache_dtype,
        "transport": plan.layout.transport,
        "stage_transport": plan.layout.stage_transport,
        "staged": [list(pair) for pair in plan.layout.staged],
        "num_layers": plan.facts.num_layers,
        "experts": _experts_json(plan),
        "kv_tokens": plan.kv_tokens,
        "max_seq_len": plan.limits.max_seq_len,
        "max_position": plan.facts.max_position,
        "concurrency": round(plan.concurrency, 3),
        "stages": [
            {"layers": [stage.first_layer, stage.end_layer], "devices": list(stage.devices)}
            | ({"shares": list(stage.shares)} if stage.shares else {})
            for stage in plan.layout.placement.stages
        ],
        "ranks": [_rank_json(row) for row in plan.rows],
        "p2p": [list(row) for row in plan.machine.links],
        "notes": list(plan.notes),
    }


def _experts_json(plan: Plan) -> dict[str, object] | None:
    if plan.facts.experts is None:
        return None
    total, active = active_bytes(plan.facts, DTYPE_BYTES[plan.layout.dtype], plan.layout.quant)
    return {
        "count": plan.facts.experts.count,
        "active": plan.facts.experts.active,
        "layers": sum(plan.facts.experts.sparse_layers),
        "split": plan.layout.expert_split,
        "reason": plan.expert_reason,
        "cpu_layers": list(plan.layout.cpu_experts),
        "total_weight_bytes": total,
        "active_weight_bytes": active,
    }


def _rank_json(row: RankRow) -> dict[str, object]:
    device, heads = row.device, row.heads
    return {
        "rank": row.rank,
        "stage": row.stage_index,
        "device": device.ordinal,
        "kind": device.kind,
        "name": device.name,
        "uuid": device.uuid,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "layers": [row.first_layer, row.end_layer],
        "q_heads": [heads.q_start, heads.q_stop],
        "kv_heads": [heads.kv_start, heads.kv_stop],
        "kv_replicas": heads.kv_replicas,
        "weight_bytes": row.weight_bytes,
        "host_weight_bytes": row.host_bytes,
        "reserve_bytes": row.reserve_bytes,
        "kv_bytes": row.kv_bytes,
        "kv_token_bytes": row.kv_token_bytes,
        "kv_tokens": row.kv_tokens,
        "window_token_bytes": row.window_token_bytes,
        "window_tokens": row.window_tokens,
        "state_bytes": row.state_bytes,
        "states": row.states if row.state_bytes else 0,
        "snapshots": row.snapshots,
    }
