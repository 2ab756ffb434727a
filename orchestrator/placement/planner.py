"""Choose the layout of a model on a machine: a pure function, checked in full before any process is started."""

from dataclasses import dataclass, replace
from typing import get_args

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.choose import choose_placement, devices_text, dtype_of
from mgpu.orchestrator.placement.costs import cost_notes, way_notes
from mgpu.orchestrator.placement.cpu_experts import check_cpu_experts, cpu_expert_notes
from mgpu.orchestrator.placement.cpu_workers import added_workers, mixed_stage, with_cpu_workers
from mgpu.orchestrator.placement.fit import Sizing, check_float8, fit_tokens, gib, rank_rows
from mgpu.orchestrator.placement.gguf import facts_as_held
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine
from mgpu.orchestrator.placement.options import BLOCK_SIZE, LayoutOptions, step_tokens
from mgpu.orchestrator.placement.rank_row import RankRow
from mgpu.orchestrator.placement.split.divisibility import expert_split
from mgpu.orchestrator.placement.topology.select import check_rules, chosen_formats, experts_on_cpu
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import Mode, PlacementPlan, Transport
from mgpu.protocol.model.quantization import Quant
from mgpu.protocol.model.weight_format import uniform, weight_format

__all__ = ["LayoutOptions", "Plan", "RankRow", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A chosen layout with its arithmetic: what `serve` starts and what the layout table shows."""

    facts: ModelFacts
    machine: Machine
    layout: Layout
    limits: StepLimits
    mode: Mode
    reason: str
    rows: tuple[RankRow, ...]
    """One per rank."""
    kv_tokens: int
    """Tokens that the KV pool holds: the least over the ranks, in whole blocks."""
    kv_memory: int
    """KV bytes of every worker; 0 on CUDA, where workers measure, unless the user fixed it."""
    notes: tuple[str, ...]
    """Lines for the start-up log."""
    expert_reason: str = ""
    """Why the ranks share experts as they do."""

    @property
    def concurrency(self) -> float:
        """How many requests of full length the KV pools hold."""
        in_windows = [row.window_tokens / row.least_window_tokens for row in self.rows if row.window_tokens]
        return min([self.kv_tokens / self.limits.max_seq_len, *in_windows])


def plan(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> Plan:
    """Choose stages, transports and sizes.

    PlacementError or LimitsError, with the numbers and what to type, when the model cannot be placed as asked.
    """
    options = replace(options, block_size=options.block_size or BLOCK_SIZE[machine.kind])
    _check_experts(facts, options)
    _check_borrowed(facts, options)
    facts, options = with_named_formats(facts_as_held(facts, machine, dtype_of(machine, options)), options)
    added = added_workers(machine, options)
    placement, reason = choose_placement(facts, machine, options)
    machine = with_cpu_workers(machine, added)
    if (mixed := mixed_stage(placement, machine)) is not None:
        raise PlacementError(
            f"{reason}: layers {mixed.first_layer} to {mixed.end_layer - 1} cannot be split over GPUs and CPU workers; "
            'give each its own layers, such as -n "0:N;cpu:M"'
        )
    _check_one_stage(facts, placement)
    check_float8(machine, placement, options)
    layout = _layout(facts, machine, placement, options)
    kind = "cpu" if layout.waits_for_cpu else machine.kind  # the slowest part bounds a step
    max_batch_tokens = step_tokens(options, kind, machine.least_bytes, placement.num_stages, facts.experts is not None)
    sizing = Sizing(facts, machine, layout, options)
    rows = rank_rows(sizing)
    check_cpu_experts(sizing, rows, _source(options))
    kv_tokens, max_seq_len = fit_tokens(sizing, rows)
    # The rank with most bytes bounds the pool, and reaches ``kv_tokens`` with exactly this.
    window_tokens = min(row.window_tokens for row in rows)
    kv_memory = max(row.pool_bytes(kv_tokens, window_tokens) + row.all_state_bytes for row in rows)
    max_rows, snapshots = min(row.states for row in rows), min(row.snapshots for row in rows)
    return Plan(
        facts=facts,
        machine=machine,
        layout=replace(layout, placement=_on_real_devices(placement, machine)),
        limits=StepLimits(options.block_size, max_rows, max_batch_tokens, max_seq_len, snapshots),
        mode=_mode(placement, machine),
        reason=reason,
        rows=rows,
        kv_tokens=kv_tokens,
        kv_memory=0 if _is_measured(machine, placement, options) else kv_memory,
        expert_reason=_expert_reason(layout, options),
        notes=(
            *machine.notes,
            *_code_note(facts),
            *_notes(machine, layout, rows),
            *cpu_expert_notes(sizing, rows),
            *_rope_note(facts, max_seq_len),
            *_states_note(options, rows),
            *(f"{part} is left out: tokens come one at a time" for part in facts.left_out),
        ),
    )


def _check_one_stage(facts: ModelFacts, placement: PlacementPlan) -> None:
    """Raise PlacementError for several stages of a model whose layers need what the first ones have."""
    sharing = [layer for layer in range(facts.num_layers) if facts.cache_source(layer) != layer]
    if placement.num_stages == 1 or not (sharing or facts.per_layer):
        return
    why = [f"each of {facts.num_layers} layers has inputs from the token itself"] * (facts.per_layer is not None)
    if sharing:
        sources = " and ".join(map(str, sorted({facts.cache_source(layer) for layer in sharing})))
        why.append(f"layers {sharing[0]} to {sharing[-1]} read the keys and values of layers {sources}")
    raise PlacementError(
        f"this model cannot be split into {placement.num_stages} stages: {'; '.join(why)}. Use one GPU, or --tp"
    )


def with_named_formats(facts: ModelFacts, options: LayoutOptions) -> tuple[ModelFacts, LayoutOptions]:
    """Return the facts with the formats that a topology file names; where all are alike, ``--quant`` says it all."""
    topology = options.topology
    if topology is None:
        return facts, options
    check_rules(topology, facts)
    if not topology.quantizes:
        return facts, options
    if facts.borrowed is not None:
        raise PlacementError(
            f"{topology.source}: quant is not tested with transformers' code, which runs this {facts.architecture} "
            "model; leave it out"
        )
    formats = chosen_formats(topology, facts, options.quant)
    for quant in get_args(Quant):
        if set(formats) == {uniform(weight_format(quant))} and (quant != "none" or not facts.formats):
            return facts, replace(options, quant=quant)
    return replace(facts, formats=formats), replace(options, quant="none")


def _is_measured(machine: Machine, placement: PlacementPlan, options: LayoutOptions) -> bool:
    """Return True if workers measure their KV pools: on GPUs that no two stages share, if nobody asked for a size."""
    devices = [device for stage in placement.stages for device in stage.devices]
    return machine.kind == "cuda" and not options.kv_memory and len(set(devices)) == len(devices)


def _check_experts(facts: ModelFacts, options: LayoutOptions) -> None:
    if options.experts is not None and facts.experts is None:
        raise PlacementError(f"--experts {options.experts}: this model has no experts to split; leave it out")


def _check_borrowed(facts: ModelFacts, options: LayoutOptions) -> None:
    if facts.borrowed is not None and options.quant != "none":
        raise PlacementError(
            f"--quant {options.quant}: not tested with transformers' code, which runs this {facts.architecture} model; "
            "leave it out"
        )


def _layout(facts: ModelFacts, machine: Machine, placement: PlacementPlan, options: LayoutOptions) -> Layout:
    transport, stage_transport = _transports(placement, machine)
    ranks = [len(stage.devices) for stage in placement.stages]
    return Layout(
        placement=placement,
        dtype=dtype_of(machine, options),
        transport=transport,
        stage_transport=stage_transport,
        staged=staged_ranks(placement, machine) if stage_transport in ("peer", "pinned") else (),
        cpu_ranks=cpu_ranks(placement, machine),
        cpu_experts=experts_on_cpu(options.topology, facts) if options.topology is not None else (),
        broken=broken_ranks(placement, machine),
        quant=options.quant,
        kv_cache_dtype=options.kv_cache_dtype,
        expert_split=options.experts or expert_split(facts, ranks, options.quant),
    )


def _source(options: LayoutOptions) -> str:
    return "" if options.topology is None else options.topology.source


def _expert_reason(layout: Layout, options: LayoutOptions) -> str:
    if options.experts is not None:
        return f"--experts {options.experts}"
    if layout.expert_split == "tensor":
        return "so all ranks have the same work, whatever the router chooses"
    return "slices of them are too narrow" if options.quant != "4" else "slices of them would cut int4 groups"


def _on_real_devices(placement: PlacementPlan, machine: Machine) -> PlacementPlan:
    """Name a shared GPU by one ordinal in all of its ranks, so that its workers can count each other."""
    if machine.kind == "cpu":
        return placement
    first = {device.uuid: device.ordinal for device in reversed(machine.gpus)}

    def real(ordinal: int) -> int:
        device = machine.devices[ordinal]
        return first[device.uuid] if device.kind == "cuda" else ordinal

    return PlacementPlan(tuple(replace(stage, devices=tuple(map(real, stage.devices))) for stage in placement.stages))


def _mode(placement: PlacementPlan, machine: Machine) -> Mode:
    if placement.world_size == 1:
        return "cpu" if machine.kind == "cpu" else "single"
    if placement.num_stages == 1:
        return "tensor-parallel"
    return "hybrid" if any(len(stage.devices) > 1 for stage in placement.stages) else "layer-mapped"


def _transports(placement: PlacementPlan, machine: Machine) -> tuple[Transport, Transport]:
    """Return how partial sums move inside stages, and activations between them."""
    on_cpu = cpu_ranks(placement, machine)
    splits = any(
        len(stage.devices) > 1 and (not on_cpu or machine.devices[stage.devices[0]].kind == "cuda")
        for stage in placement.stages
    )
    crosses = placement.num_stages > 1
    if machine.kind == "cpu":
        way: Transport = "shared-memory" if machine.shared_memory else "gloo"
        return way if splits else "none", way if crosses else "none"
    if machine.nccl and not has_shared_devices(placement) and not on_cpu:
        return "nccl" if splits else "none", "nccl" if crosses else "none"
    if machine.hosts:
        return "gloo" if splits else "none", "gloo" if crosses else "none"
    all_staged = len(staged_ranks(placement, machine)) == len(boundary_ranks(placement))
    boundary: Transport = "pinned" if all_staged else "peer"
    return "gloo" if splits else "none", boundary if crosses else "none"


def has_shared_devices(placement: PlacementPlan) -> bool:
    """Return True if two ranks are on one device, as the stage of an embedding or a head can be."""
    devices = [device for stage in placement.stages for device in stage.devices]
    return len(set(devices)) < len(devices)


def cpu_ranks(placement: PlacementPlan, machine: Machine) -> tuple[int, ...]:
    """Return the ranks on CPU workers beside others on GPUs."""
    if machine.kind == "cpu":
        return ()
    ranks = range(placement.world_size)
    return tuple(rank for rank in ranks if machine.devices[placement.place_of(rank).device].kind == "cpu")


def boundary_ranks(placement: PlacementPlan) -> list[tuple[int, int]]:
    """List the ranks between which activations move: rank j of a stage feeds every rank i of the next, i % size = j."""
    pairs = []
    for index in range(placement.num_stages - 1):
        senders, receivers = placement.ranks_of_stage(index), placement.ranks_of_stage(index + 1)
        pairs += [(senders[i % len(senders)], rank) for i, rank in enumerate(receivers)]
    return pairs


def staged_ranks(placement: PlacementPlan, machine: Machine) -> tuple[tuple[int, int], ...]:
    """List the boundary ranks whose devices cannot reach each other's memory."""
    pairs = boundary_ranks(placement)
    return tuple(pair for pair in pairs if not machine.peers(*(placement.place_of(rank).device for rank in pair)))


def broken_ranks(placement: PlacementPlan, machine: Machine) -> tuple[tuple[int, int], ...]:
    """List the pairs of ranks, in both orders, whose devices are announced as peers and are none."""
    ranks = range(placement.world_size if machine.has_broken_pairs else 0)
    devices = {rank: placement.place_of(rank).device for rank in ranks}
    return tuple((a, b) for a in ranks for b in ranks if machine.links[devices[a]][devices[b]] == "broken")


def _notes(machine: Machine, layout: Layout, rows: tuple[RankRow, ...]) -> list[str]:
    notes, placement = [], layout.placement
    devices = [tuple(placement.place_of(rank).device for rank in pair) for pair in layout.staged]
    between_gpus = [pair for pair in devices if all(machine.devices[device].kind == "cuda" for device in pair)]
    if between_gpus:
        pairs = ", ".join(f"{a} and {b}" for a, b in between_gpus)
        notes.append(f"no peer access between GPUs {pairs}: activations are staged through pinned host memory")
    if layout.transport == "gloo" and machine.kind == "cuda":
        shared = "NCCL connects GPUs only" if layout.cpu_ranks else "NCCL refuses two ranks on one GPU"
        problem = machine.nccl_problem or shared
        notes.append(f"partial sums go over the host (gloo), which is slow: {problem}")
    notes += cost_notes(machine, layout, rows)
    notes += way_notes(machine, layout)
    used = {device for stage in placement.stages for device in stage.devices}
    if idle := [device for device in machine.devices if device.ordinal not in used]:
        notes.append(f"not used: {devices_text(machine, [device.ordinal for device in idle])}")
    if machine.kind == "cuda" and len(placement.stages) == 1 and len(rows) > 1:
        notes += _uneven_note([row.device for row in rows])
    return notes


def _code_note(facts: ModelFacts) -> list[str]:
    if facts.borrowed is None:
        return []
    return [
        f"mgpu runs this {facts.architecture} model through transformers' modelling code: slower than a family of its "
        "own"
    ]


def _states_note(options: LayoutOptions, rows: tuple[RankRow, ...]) -> list[str]:
    """Say that fewer requests run at once than were asked for, because their states would leave no room."""
    largest = max(rows, key=lambda row: row.state_bytes)
    if not largest.state_bytes or largest.states == options.max_rows:
        return []
    return [
        f"{largest.states} requests at once instead of {options.max_rows} (--max-rows): the states of each take "
        f"{gib(largest.state_bytes)}, and of all at most half of the cache. A larger --kv-memory has room for more"
    ]


def _rope_note(facts: ModelFacts, max_seq_len: int) -> list[str]:
    scaling = facts.rope_scaling
    if scaling is None or not scaling.long_divisors:
        return []
    original = scaling.original_max_position
    if max_seq_len <= original:
        return [f"LongRoPE: rotary factors for short contexts, as requests have at most {original:,} tokens"]
    return [
        f"LongRoPE: rotary factors for long contexts, as requests may exceed {original:,} tokens. "
        f"--max-seq-len {original} uses those for short ones"
    ]


def _uneven_note(devices: list[DeviceInfo]) -> list[str]:
    least = min(devices, key=lambda device: device.free_bytes)
    most = max(devices, key=lambda device: device.free_bytes)
    if least.free_bytes >= 0.9 * most.free_bytes:
        return []
    return [
        f"GPU {least.ordinal} has {least.free_bytes / 2**30:.1f} GiB free and GPU {most.ordinal} "
        f"{most.free_bytes / 2**30:.1f}: the smallest bounds the KV cache of all. -n divides layers, "
        "and --tp-shares heads, unevenly"
    ]
