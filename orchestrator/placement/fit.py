"""Check that a layout fits its devices, and count the tokens of KV cache that are left."""

import bisect
from dataclasses import dataclass, replace

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.cpu_workers import with_cpu_workers
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine
from mgpu.orchestrator.placement.options import LayoutOptions, step_tokens
from mgpu.orchestrator.placement.pools import least_window_tokens, pool_tokens
from mgpu.orchestrator.placement.rank_row import RankRow
from mgpu.orchestrator.placement.split import sizes
from mgpu.orchestrator.placement.split.divisibility import compatible_sizes, expert_split, split_problems
from mgpu.orchestrator.placement.split.layer_map import map_text
from mgpu.orchestrator.placement.states import held_states, kept_states
from mgpu.protocol.model.facts import DTYPE_BYTES, ModelFacts, kv_element_bytes
from mgpu.protocol.model.layout import Layout, StepLimits, cpu_pool_bytes
from mgpu.protocol.model.placement import PlacementPlan, RankPlace, Stage
from mgpu.protocol.model.quantization import FLOAT8_CAPABILITY, Quant
from mgpu.protocol.model.shared_memory_layout import relay_sizes

LEAST_TOKENS = 512
"""A smaller pool is refused, unless the model's own context is shorter: it would serve hardly any request."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """A layout on a machine whose fit is to be computed."""

    facts: ModelFacts
    machine: Machine
    layout: Layout
    options: LayoutOptions

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.layout.dtype]


def device_budget(device: DeviceInfo, options: LayoutOptions) -> int:
    """Return the bytes of a device that its worker may use: of a GPU, its share minus what other processes hold."""
    share = int(device.total_bytes * options.memory_fraction)
    if device.kind == "cpu":
        return min(share, device.free_bytes)
    return max(0, share - (device.total_bytes - device.free_bytes))


def host_budget(machine: Machine, options: LayoutOptions) -> int:
    """Return the bytes of the memory beside the GPUs that workers may use."""
    total, free = machine.host_bytes
    return min(int(total * options.memory_fraction), free)


def weight_capacity(device: DeviceInfo, options: LayoutOptions) -> int:
    """Return the bytes of a device for layers, embedding and KV cache, to balance layers by."""
    return device_budget(device, options) - _fixed_bytes(device)


def rank_rows(sizing: Sizing) -> tuple[RankRow, ...]:
    """Compute what every rank holds, whether it fits or not."""
    ranks = range(sizing.layout.placement.world_size)
    alone = [_row(sizing, rank) for rank in ranks]
    states = min(row.states for row in alone), min(row.snapshots for row in alone)
    return tuple(row if (row.states, row.snapshots) == states else _row(sizing, row.rank, states) for row in alone)


def _row(sizing: Sizing, rank: int, most_states: tuple[int, int] | None = None) -> RankRow:
    """Compute what a rank holds, with states of at most so many running sequences, and so many beside them."""
    facts = whole = sizing.facts
    layout, options = sizing.layout, sizing.options
    place = layout.placement.place_of(rank)
    stage, device = layout.placement.stages[place.stage_index], sizing.machine.devices[place.device]
    part = place.part
    if place.shares:
        facts = sizes.part_facts(facts, part, layout.quant, layout.expert_split)
        sizing, place = replace(sizing, facts=facts), replace(place, tp_rank=0, tp_size=1, shares=())
    types = sizing.dtype_bytes, layout.quant, layout.expert_split
    on_host = _host_bytes(sizing, place)
    weights = sizes.rank_weight_bytes(facts, layout.placement, place, *types) - on_host
    reserve = _reserve_bytes(sizing, place)
    budget = device_budget(device, options) - _edges_on(sizing, place) - _experts_beside(sizing, place)
    layers = range(stage.first_layer, stage.end_layer)
    element_bytes = kv_element_bytes(layout.kv_cache_dtype, layout.dtype)
    per_token = sizes.kv_token_bytes(facts, layers, place.tp_size, element_bytes)
    per_state = sizes.state_bytes(facts, layers, place.tp_size, sizing.dtype_bytes)
    pool = options.kv_memory or _pool_bytes(device, budget - weights - reserve, is_offload=sizing.machine.kind != "cpu")
    left = pool - _least_tokens(options, facts) * per_token
    states = held_states(most_states[0] if most_states else options.max_rows, pool, left, per_state)
    snapshots = kept_states(states, pool, left, per_state) if facts.linear and options.prefix_cache else 0
    snapshots = min(snapshots, most_states[1]) if most_states else snapshots
    limits = StepLimits(options.block_size, states, _step_tokens(sizing), options.max_seq_len or facts.max_position)
    of_window = [layer for layer in layers if facts.sight[0] and facts.sliding_layers[layer]]
    per_window = sizes.kv_token_bytes(facts, of_window, place.tp_size, element_bytes)
    room = max(0, pool - (states + snapshots) * per_state)
    in_window = facts.sight, limits, options.max_seq_len is not None
    tokens, window_tokens = pool_tokens(room, per_token, per_window, *in_window)
    return RankRow(
        rank=rank,
        device=device,
        stage_index=place.stage_index,
        first_layer=stage.first_layer,
        end_layer=stage.end_layer,
        heads=part.heads(whole.num_q_heads, whole.num_kv_heads),
        weight_bytes=weights,
        reserve_bytes=reserve,
        budget_bytes=budget,
        kv_token_bytes=per_token,
        kv_tokens=tokens,
        window_token_bytes=per_window,
        window_tokens=window_tokens,
        least_window_tokens=least_window_tokens(facts.sight, limits),
        state_bytes=per_state,
        states=states,
        snapshots=snapshots,
        host_bytes=on_host,
    )


def _host_bytes(sizing: Sizing, place: RankPlace) -> int:
    """Return the bytes of experts that a rank on a GPU keeps in the machine's memory."""
    layout, layers = sizing.layout, sizing.layout.cpu_experts_of(place.stage_index)
    if not layers or sizing.machine.devices[place.device].kind == "cpu":
        return 0
    types = sizing.dtype_bytes, layout.quant, layout.expert_split
    return sizes.expert_bytes(sizing.facts, layers, place.tp_size, *types)


def _experts_beside(sizing: Sizing, place: RankPlace) -> int:
    """Return what ranks on GPUs take of a CPU worker's share of the machine's memory."""
    if place.rank not in sizing.layout.cpu_ranks or not sizing.layout.cpu_experts:
        return 0
    plan = sizing.layout.placement
    taken = sum(_host_bytes(sizing, plan.place_of(rank)) for rank in range(plan.world_size))
    return taken // len(sizing.layout.cpu_ranks)


def _edges_on(sizing: Sizing, place: RankPlace) -> int:
    """Return what stages of the embedding or the head alone take of a device that also has layers."""
    plan = sizing.layout.placement
    if not plan.stages[place.stage_index].num_layers:
        return 0
    others = [plan.place_of(rank) for rank in range(plan.world_size) if rank != place.rank]
    return sum(
        sizes.rank_weight_bytes(sizing.facts, plan, other, sizing.dtype_bytes) + _reserve_bytes(sizing, other)
        for other in others
        if other.device == place.device and not plan.stages[other.stage_index].num_layers
    )


def _pool_bytes(device: DeviceInfo, left: int, is_offload: bool) -> int:
    """Return the KV pool that was not asked for: the rest of a GPU, or a modest share of the host's memory.

    A CPU worker beside GPUs may take half of what its weights leave: a small pool there would bound those of the GPUs.
    """
    if device.kind == "cpu":
        left = left // 2 if is_offload else min(left, cpu_pool_bytes(device.free_bytes))
    return max(0, left)


def _reserve_bytes(sizing: Sizing, place: RankPlace) -> int:
    last = place.stage_index == sizing.layout.placement.num_stages - 1
    options, machine, tokens = sizing.options, sizing.machine, _step_tokens(sizing)
    step = sizes.step_bytes(sizing.facts, place.tp_size, last, sizing.dtype_bytes, tokens, options.max_rows)
    if sizing.layout.quant != "none" or sizing.facts.formats:
        # One matrix is dense while it is loaded, and again in every step of many tokens on a GPU.
        split = sizing.layout.expert_split
        step += sizes.largest_matrix_bytes(sizing.facts, place.tp_size, sizing.dtype_bytes, split)
    if machine.devices[place.device].kind == "cuda" and place.stage_index > 0:
        limits = StepLimits(options.block_size, options.max_rows, tokens, max_seq_len=0)
        step += relay_sizes(sizing.layout, limits, sizing.facts.hidden_size).inbox_bytes
    uses_nccl = "nccl" in (sizing.layout.transport, sizing.layout.stage_transport)
    return step + _fixed_bytes(machine.devices[place.device]) + (sizes.NCCL_BYTES if uses_nccl else 0)


def _step_tokens(sizing: Sizing) -> int:
    """Return the most tokens of a step."""
    kind = "cpu" if sizing.layout.waits_for_cpu else sizing.machine.kind
    stages, has_experts = sizing.layout.placement.num_stages, sizing.facts.experts is not None
    return step_tokens(sizing.options, kind, sizing.machine.least_bytes, stages, has_experts)


def _fixed_bytes(device: DeviceInfo) -> int:
    return sizes.CUDA_FIXED_BYTES if device.kind == "cuda" else 0


def fit_tokens(sizing: Sizing, rows: tuple[RankRow, ...]) -> tuple[int, int]:
    """Return the tokens of the KV pool and the longest request. PlacementError when the model does not fit as asked.

    Without --max-seq-len, requests may be as long as the model and the pool allow.
    """
    asked, context = sizing.options.max_seq_len, sizing.facts.max_position
    if asked is not None and not 1 <= asked <= context:
        raise PlacementError(f"--max-seq-len {asked}: the context of this model is 1 to {context} tokens")
    least = _least_tokens(sizing.options, sizing.facts)
    tight = max(rows, key=lambda row: _least_bytes(row, sizing.options) - row.budget_bytes)
    if _least_bytes(tight, sizing.options) > tight.budget_bytes:
        raise _too_big(sizing, tight, least)
    tokens = min(row.kv_tokens for row in rows)
    if tokens < least:
        raise _too_long(sizing, min(rows, key=lambda row: row.kv_tokens), least)
    return tokens, asked or min(context, tokens)


def _least_bytes(row: RankRow, options: LayoutOptions) -> int:
    """Return what a rank needs without keys and values; --kv-memory counts whole, and the states are part of it."""
    return row.weight_bytes + row.reserve_bytes + max(options.kv_memory, row.state_bytes)


def _least_tokens(options: LayoutOptions, facts: ModelFacts) -> int:
    """Return the tokens that a KV pool must hold."""
    return _up_to_blocks(options.max_seq_len or min(LEAST_TOKENS, facts.max_position), options)


def _up_to_blocks(tokens: int, options: LayoutOptions) -> int:
    return -(-tokens // options.block_size) * options.block_size


def _too_big(sizing: Sizing, row: RankRow, tokens: int) -> PlacementError:
    """Return the error that weights, or weights and --kv-memory, exceed a device."""
    needed = _least_bytes(row, sizing.options)
    pool = f" + {gib(sizing.options.kv_memory)} of --kv-memory" if sizing.options.kv_memory else ""
    if row.state_bytes and not pool:
        pool = f" + {gib(row.state_bytes)} for the states of one sequence"
    return PlacementError(
        f"the model does not fit: {_where(row)} has {gib(row.budget_bytes)} to use, and rank {row.rank} needs "
        f"{gib(needed)} ({gib(row.weight_bytes)} of weights + {gib(row.reserve_bytes)} to compute{pool}). "
        f"{_ways_out(sizing, tokens)}"
    )


def _too_long(sizing: Sizing, row: RankRow, tokens: int) -> PlacementError:
    """Return the error that the KV cache has no room for one request."""
    asked = sizing.options.max_seq_len
    left = gib(sizing.options.kv_memory or max(0, row.budget_bytes - row.weight_bytes - row.reserve_bytes))
    text = (
        f"{tokens} tokens of KV cache{f' (--max-seq-len {asked})' if asked else ''} do not fit: {_where(row)} has "
        f"{left} left beside {gib(row.weight_bytes)} of weights, which is {row.kv_tokens} tokens of "
        f"{row.kv_token_bytes / 1024:.1f} KiB{_beside_states(row)}; "
        f"{gib(row.least_pool(tokens))} are needed. "
    )
    shorter = f"Use --max-seq-len {row.kv_tokens} or less. " if asked and row.kv_tokens else ""
    least = -(-row.least_pool(tokens) // (1 << 20))
    out = (
        f"Raise --kv-memory to {least}MiB or more, or leave it out"
        if sizing.options.kv_memory
        else _ways_out(sizing, tokens)
    )
    return PlacementError(text + shorter + _narrower_cache(sizing, tokens) + out)


def _beside_states(row: RankRow) -> str:
    if window := row.least_window_tokens * row.window_token_bytes:
        return f", of which layers with a window keep {row.least_window_tokens}, {gib(window)}"
    return f" beside the states of one sequence, {gib(row.state_bytes)}" if row.state_bytes else ""


def _narrower_cache(sizing: Sizing, tokens: int) -> str:
    """Return the advice to use a float8 cache if it would hold so many tokens."""
    if sizing.layout.kv_cache_dtype == "fp8" or device_without_fp8(sizing.machine, sizing.layout.placement) is not None:
        return ""
    held = min(row.kv_tokens for row in rank_rows(replace(sizing, layout=replace(sizing.layout, kv_cache_dtype="fp8"))))
    return f"--kv-cache-dtype fp8 would hold {held} tokens. " if held >= tokens else ""


def _where(row: RankRow) -> str:
    if row.device.kind == "cpu":
        return row.device.name
    memory = f"{gib(row.device.free_bytes)} free of {gib(row.device.total_bytes)}"
    return f"GPU {row.device.ordinal} ({row.device.name}, {memory})"


def _ways_out(sizing: Sizing, tokens: int) -> str:
    """Return what to change. If a long --max-seq-len is what rules a simpler way out, that is said."""
    ways, asked = _ways_for(sizing, tokens), sizing.options.max_seq_len
    least = _up_to_blocks(min(LEAST_TOKENS, sizing.facts.max_position), sizing.options)
    if asked is None or asked <= least or (shorter := _ways_for(sizing, least)) == ways:
        return ways
    return f"For --max-seq-len {asked}: {ways}. With a shorter one, or without it: {shorter}"


def _ways_for(sizing: Sizing, tokens: int) -> str:
    if sizing.options.kv_memory:
        return "Lower --kv-memory, or leave it out"
    if sizing.machine.kind == "cpu":
        half = "" if sizing.dtype_bytes == 2 else "; --dtype bfloat16 halves that"
        return f"It would need a machine with more memory{half}"
    size, quant = _size_that_fits(sizing, tokens), _quant_that_fits(sizing, tokens)
    ways = [f"--quant {quant} would fit on these"] * bool(quant)
    if size is not None:
        ways.append(f"{size} GPUs of this size would hold it, split tensor-parallel")
    if layers := _experts_that_fit(sizing, tokens):
        entry = f"{layers[0]}-{layers[-1] + 1}: {{experts: cpu}}"
        ways.append(f'a --topology file with "{entry}" would have these layers\' experts computed by the CPU')
    if offloaded := _offload_that_fits(sizing, tokens):
        ways.append(f'-n "{offloaded}" would run its last layers on the CPU, slowly')
    return "; ".join(ways) or "No number of such GPUs would hold it; use larger GPUs"


def _offload_that_fits(sizing: Sizing, tokens: int) -> str:
    """Return a map with as few of the last layers on a CPU worker as needed; empty if none fits."""
    layout, machine = sizing.layout, sizing.machine
    stages = layout.placement.stages
    if not machine.host_bytes[0] or layout.cpu_ranks or any(len(stage.devices) > 1 for stage in stages):
        return ""
    count, last = len(machine.devices), stages[-1]

    def offloaded(number: int) -> PlacementPlan:
        border = last.end_layer - number
        on_cpu = Stage(border, last.end_layer, (count,))
        return PlacementPlan((*stages[:-1], replace(last, end_layer=border), on_cpu))

    def fits(number: int) -> bool:
        tried = replace(
            layout, placement=offloaded(number), transport="none", stage_transport="pinned", cpu_ranks=(len(stages),)
        )
        rows = rank_rows(replace(sizing, machine=with_cpu_workers(machine, 1), layout=tried))
        return all(row.needs(tokens) <= row.budget_bytes for row in rows)

    number = bisect.bisect_left(range(1, last.num_layers), True, key=fits) + 1
    return map_text(offloaded(number), count) if number < last.num_layers and fits(number) else ""


def _experts_that_fit(sizing: Sizing, tokens: int) -> tuple[int, ...]:
    """Return the fewest of the last layers whose experts must be on the CPU; empty if that is not enough."""
    layout, facts, machine = sizing.layout, sizing.facts, sizing.machine
    if layout.waits_for_cpu or facts.borrowed is not None or machine.hosts:
        return ()
    sparse = [layer for layer in range(facts.num_layers) if facts.experts_of(layer) is not None]

    def fits(number: int) -> bool:
        tried = replace(layout, cpu_experts=tuple(sparse[-number:]))
        rows = rank_rows(replace(sizing, layout=tried))
        has_room = sum(row.host_bytes for row in rows) <= host_budget(machine, sizing.options)
        return has_room and all(row.needs(tokens) <= row.budget_bytes for row in rows)

    number = bisect.bisect_left(range(1, len(sparse)), True, key=fits) + 1
    return tuple(sparse[-number:]) if sparse and fits(number) else ()


def _quant_that_fits(sizing: Sizing, tokens: int) -> Quant | None:
    """Return the mildest quantization with which the layout fits; None if there is none."""
    others: dict[Quant, tuple[Quant, ...]] = {"none": ("8", "4"), "8": ("4",), "fp8": ("4",), "4": ()}
    for quant in others[sizing.layout.quant]:
        ranks = [len(stage.devices) for stage in sizing.layout.placement.stages]
        if any(split_problems(sizing.facts, size, quant, sizing.options.experts) for size in ranks):
            continue
        split = sizing.options.experts or expert_split(sizing.facts, ranks, quant)
        rows = rank_rows(replace(sizing, layout=replace(sizing.layout, quant=quant, expert_split=split)))
        if all(row.needs(tokens) <= row.budget_bytes for row in rows):
            return quant
    return None


def _size_that_fits(sizing: Sizing, tokens: int) -> int | None:
    """Return the smallest tensor-parallel size whose ranks fit the smallest device in use; None if there is none."""
    stages = sizing.layout.placement.stages
    used = [sizing.machine.devices[device] for stage in stages for device in stage.devices]
    used = [device for device in used if device.kind == "cuda"]
    smallest = min(used, key=lambda device: device_budget(device, sizing.options))
    for size in compatible_sizes(sizing.facts, sizing.layout.quant, sizing.options.experts):
        placement = PlacementPlan((Stage(0, sizing.facts.num_layers, tuple(range(size))),))
        machine = replace(sizing.machine, devices=(smallest,) * size)
        layout = replace(
            sizing.layout, placement=placement, transport="nccl" if size > 1 else "none", stage_transport="none"
        )
        row = _row(replace(sizing, machine=machine, layout=layout), 0)
        if row.needs(tokens) <= row.budget_bytes:
            return size
    return None


def gib(nbytes: int) -> str:
    """Write bytes as people read memory sizes: 1.5 GiB, 12.0 MiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 100 << 20 else f"{nbytes / 2**20:.1f} MiB"


def device_without_fp8(machine: Machine, placement: PlacementPlan) -> DeviceInfo | None:
    """Return a device that cannot convert float8. The CPU can, and a GPU of unknown capability counts as if."""
    for stage in placement.stages:
        for device in (machine.devices[index] for index in stage.devices):
            if device.capability is not None and device.capability < FLOAT8_CAPABILITY:
                return device
    return None


def check_float8(machine: Machine, placement: PlacementPlan, options: LayoutOptions) -> None:
    """Raise PlacementError for a float8 cache on a GPU without float8: plain torch would be many times slower."""
    device = device_without_fp8(machine, placement)
    if options.kv_cache_dtype != "fp8" or device is None:
        return
    needed, has = (".".join(map(str, each)) for each in (FLOAT8_CAPABILITY, device.capability or ()))
    raise PlacementError(
        f"--kv-cache-dtype fp8 needs GPUs of compute capability {needed} or later, and GPU {device.ordinal} "
        f"({device.name}) has {has}. Leave it out, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    )
