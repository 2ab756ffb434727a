"""Choose the layout of a model on a machine: a pure function, checked in full before any process is started."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.described import kinds_text
from mgpu.orchestrator.placement.devices import DeviceInfo, Machine, selectors
from mgpu.orchestrator.placement.divisibility import (
    advice_without_groups,
    compatible_sizes,
    expert_split,
    sizes_text,
    split_problems,
)
from mgpu.orchestrator.placement.fit import RankRow, Sizing, check_float8, fit_tokens, rank_rows, weight_capacity
from mgpu.orchestrator.placement.layer_map import balanced_stages, even_stages, map_text, parse_layer_map, quick_stages
from mgpu.orchestrator.placement.options import BLOCK_SIZE, LayoutOptions, step_tokens
from mgpu.orchestrator.placement.sizes import edge_elements, layers_bytes
from mgpu.protocol.model.facts import DTYPE_BYTES, Dtype, ModelFacts
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import Mode, PlacementPlan, Stage, Transport

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
        """How many requests of full length the KV pool holds."""
        return self.kv_tokens / self.limits.max_seq_len


_Choice = tuple[PlacementPlan, str]
"""A placement and the reason for it."""


def plan(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> Plan:
    """Choose stages, transports and sizes.

    PlacementError or LimitsError, with the numbers and what to type, when the model cannot be placed as asked.
    """
    options = replace(options, block_size=options.block_size or BLOCK_SIZE[machine.kind])
    _check_experts(facts, options)
    placement, reason = _choose(facts, machine, options)
    check_float8(machine, placement, options)
    max_batch_tokens = step_tokens(options, machine.kind, machine.least_bytes, placement.num_stages)
    layout = _layout(facts, machine, placement, options)
    sizing = Sizing(facts, machine, layout, options)
    rows = rank_rows(sizing)
    kv_tokens, max_seq_len = fit_tokens(sizing, rows)
    # The rank with most bytes per token bounds the pool, and reaches ``kv_tokens`` with exactly this.
    kv_memory = kv_tokens * max(row.kv_token_bytes for row in rows)
    return Plan(
        facts=facts,
        machine=machine,
        layout=replace(layout, placement=_on_real_devices(placement, machine)),
        limits=StepLimits(options.block_size, options.max_rows, max_batch_tokens, max_seq_len),
        mode=_mode(placement, machine),
        reason=reason,
        rows=rows,
        kv_tokens=kv_tokens,
        kv_memory=0 if machine.kind == "cuda" and not options.kv_memory else kv_memory,
        expert_reason=_expert_reason(layout, options),
        notes=(*machine.notes, *_notes(machine, layout, rows), *_rope_note(facts, max_seq_len)),
    )


def _check_experts(facts: ModelFacts, options: LayoutOptions) -> None:
    if options.experts is not None and facts.experts is None:
        raise PlacementError(f"--experts {options.experts}: this model has no experts to split; leave it out")


def _layout(facts: ModelFacts, machine: Machine, placement: PlacementPlan, options: LayoutOptions) -> Layout:
    transport, stage_transport = _transports(placement, machine)
    ranks = [len(stage.devices) for stage in placement.stages]
    return Layout(
        placement=placement,
        dtype=_dtype(machine, options),
        transport=transport,
        stage_transport=stage_transport,
        staged=staged_ranks(placement, machine) if stage_transport in ("peer", "pinned") else (),
        quant=options.quant,
        kv_cache_dtype=options.kv_cache_dtype,
        expert_split=options.experts or expert_split(facts, ranks, options.quant),
    )


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
    first = {device.uuid: device.ordinal for device in reversed(machine.devices)}
    return PlacementPlan(
        tuple(
            replace(stage, devices=tuple(first[machine.devices[device].uuid] for device in stage.devices))
            for stage in placement.stages
        )
    )


def _dtype(machine: Machine, options: LayoutOptions) -> Dtype:
    return options.dtype or ("bfloat16" if machine.kind == "cuda" else "float32")


def _choose(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> _Choice:
    """Choose by the layer map or the size that was typed, else by the visible devices (the table in docs)."""
    if options.device_layers is not None:
        return _choose_map(facts, machine, options, options.device_layers)
    if options.tp is not None:
        return _choose_size(facts, machine, options, options.tp)
    count = len(machine.devices)
    if count == 1:
        return _one_stage(facts, (0,)), "one CPU worker" if machine.kind == "cpu" else "one GPU is visible"
    if machine.kind == "cuda" and not machine.nccl:
        return _choose_balanced(facts, machine, options, machine.nccl_problem)
    sizes = compatible_sizes(facts, options.quant, options.experts)
    if sizes == (1,):
        cause = f"{facts.num_q_heads} query heads" if compatible_sizes(facts) == (1,) else "int4 groups would be cut"
        reason = f"the model has no tensor-parallel size above 1 ({cause})"
        return _choose_balanced(facts, machine, options, reason)
    if count in sizes:
        return _one_stage(facts, range(count)), _split_reason(facts, machine, count)
    if options.fewer_devices:
        return _choose_fewer(facts, machine, options)
    raise _split_error(facts, machine, options, count, f"{count} {_noun(machine, count)}")


def _choose_fewer(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> _Choice:
    count = len(machine.devices)
    taken = _emptiest(
        machine, max(size for size in compatible_sizes(facts, options.quant, options.experts) if size <= count)
    )
    return _one_stage(facts, taken), (
        f"{_named(machine, taken)} of {count}, because {facts.num_q_heads} query heads and {facts.num_kv_heads} KV "
        f"heads do not split over {count}; sizes that do: {sizes_text(facts, options.quant, options.experts)}"
    )


def _emptiest(machine: Machine, count: int) -> list[int]:
    """Return the ordinals of the devices with most free memory, in order."""
    ordered = sorted(machine.devices, key=lambda device: (-device.free_bytes, device.ordinal))
    return sorted(device.ordinal for device in ordered[:count])


def _named(machine: Machine, ordinals: Sequence[int]) -> str:
    return f"{_noun(machine, len(ordinals))} {', '.join(map(str, ordinals))}"


def _noun(machine: Machine, count: int) -> str:
    word = "GPU" if machine.kind == "cuda" else "CPU worker"
    return word if count == 1 else word + "s"


def _one_stage(facts: ModelFacts, ordinals: Sequence[int]) -> PlacementPlan:
    return PlacementPlan((Stage(0, facts.num_layers, tuple(ordinals)),))


def _split_reason(facts: ModelFacts, machine: Machine, size: int) -> str:
    mlp = f"MLP width {facts.intermediate_size}"
    if facts.experts is not None:
        experts = f"{facts.experts.count} experts of width {facts.experts.width}"
        mlp = f"{mlp} or {experts}" if facts.has_dense_layers else experts
    parts = f"{facts.num_q_heads} query heads, {facts.num_kv_heads} KV heads and {mlp}"
    usable = "NCCL is usable and " if machine.nccl else ""
    return f"{usable}{parts} split over {size}"


def _choose_map(facts: ModelFacts, machine: Machine, options: LayoutOptions, text: str) -> _Choice:
    if options.tp is not None:
        raise PlacementError(
            f'-n "{text}" and --tp {options.tp} contradict each other: a layer map already says which devices are '
            f'used. Drop one of them, or write a hybrid such as -n "0+1:{facts.num_layers}"'
        )
    placement = parse_layer_map(text, facts, len(machine.devices), _noun(machine, 1), options.quant, options.experts)
    return placement, f'-n "{text}"'


def _choose_size(facts: ModelFacts, machine: Machine, options: LayoutOptions, size: int) -> _Choice:
    count, sizes = len(machine.devices), compatible_sizes(facts, options.quant, options.experts)
    if not 1 <= size <= count:
        best = max(fitting for fitting in sizes if fitting <= count)
        raise PlacementError(
            f"--tp {size}: {count} {_noun(machine, count)} can be used; use --tp {best}"
            f"{_more_devices(machine, sizes, size)} (compatible sizes: {', '.join(map(str, sizes))})"
        )
    if size not in sizes:
        raise _split_error(facts, machine, options, size, f"--tp {size}: {size} {_noun(machine, size)}")
    return _one_stage(facts, range(size)), f"--tp {size}"


def _split_error(
    facts: ModelFacts, machine: Machine, options: LayoutOptions, size: int, subject: str
) -> PlacementError:
    sizes = compatible_sizes(facts, options.quant, options.experts)
    best = max(fitting for fitting in sizes if fitting <= size)
    problems = split_problems(facts, size, options.quant, options.experts)
    text = (
        f"{subject} cannot split this model: {'; '.join(problems)}. "
        f"Compatible sizes: {sizes_text(facts, options.quant, options.experts)}. "
        f"Use {_fewer_devices(machine, options, best)}"
    )
    if 2 <= size <= facts.num_layers:
        text += f', or give each its own layers: -n "{map_text(even_stages(facts.num_layers, range(size)))}"'
    return PlacementError(text + advice_without_groups(facts, size, options.quant, options.experts))


def _more_devices(machine: Machine, sizes: Sequence[int], size: int) -> str:
    """Return what else to type for a size above the number of devices: the size itself, or the nearest that splits."""
    count = len(machine.devices)
    if machine.kind == "cpu":
        larger = [fitting for fitting in sizes if fitting > count]
        if not larger or size <= count:
            return ""
        near = max((fitting for fitting in larger if fitting <= size), default=larger[0])
        return f", or --workers {near}" + ("" if near == size else f" instead of --tp {size}")
    if size <= count or size not in sizes:
        return ""
    return ", or --gpus with more of them" if machine.kinds else ", or CUDA_VISIBLE_DEVICES with more of them"


def _fewer_devices(machine: Machine, options: LayoutOptions, count: int) -> str:
    """Return what to type, instead of what was typed, to split over ``count`` devices."""
    if options.tp is not None:
        return f"--tp {count}"
    # CPU workers are as many as --workers says: --tp alone would find one.
    if machine.kind == "cpu" or machine.kinds:
        return f"{_first_devices(machine, count)} instead"
    return f"{_first_devices(machine, count)} (or --tp {count})"


def _first_devices(machine: Machine, count: int) -> str:
    """Return what to type to use only the first ``count`` devices."""
    if machine.kinds:
        return f"--gpus {shlex.quote(kinds_text(machine.kinds[:count]))}"
    if machine.kind == "cpu" or len({device.uuid for device in machine.devices}) < len(machine.devices):
        return f"--workers {count}"
    return f"CUDA_VISIBLE_DEVICES={selectors(machine.devices[:count])}"


def _choose_balanced(facts: ModelFacts, machine: Machine, options: LayoutOptions, reason: str) -> _Choice:
    count, layers = len(machine.devices), facts.num_layers
    ordinals: Sequence[int] = range(count)
    if count > layers and options.fewer_devices:
        ordinals = _emptiest(machine, layers)
        reason += f"; {layers} of {count} {_noun(machine, count)}, because the model has {layers} layers"
    elif count > layers:
        raise PlacementError(
            f"{count} {_noun(machine, count)} cannot share {layers} layers, and layer mapping is needed ({reason}). "
            f"Use at most {layers}: {_first_devices(machine, layers)}"
        )
    last = len(ordinals) - 1
    edges = [edge_elements(facts, 1, i == 0, i == last) for i in range(len(ordinals))]
    dtype_bytes = DTYPE_BYTES[_dtype(machine, options)]
    devices = [machine.devices[ordinal] for ordinal in ordinals]
    capacities = [weight_capacity(device, options) for device in devices]
    per_layer = layers_bytes(facts, range(layers), 1, dtype_bytes, options.quant) // layers
    extras = [elements * dtype_bytes for elements in edges]
    if len({device.name for device in devices}) > 1 and machine.kind == "cuda":
        return balanced_stages(layers, ordinals, capacities, per_layer, extras), reason
    head = edge_elements(facts, 1, first=False, last=True) * dtype_bytes
    read_extras = [head if i == last else 0 for i in range(len(ordinals))]
    return quick_stages(layers, ordinals, capacities, per_layer, extras, read_extras), reason


def _mode(placement: PlacementPlan, machine: Machine) -> Mode:
    if placement.world_size == 1:
        return "cpu" if machine.kind == "cpu" else "single"
    if placement.num_stages == 1:
        return "tensor-parallel"
    return "hybrid" if any(len(stage.devices) > 1 for stage in placement.stages) else "layer-mapped"


def _transports(placement: PlacementPlan, machine: Machine) -> tuple[Transport, Transport]:
    """Return how partial sums move inside stages, and activations between them."""
    splits = any(len(stage.devices) > 1 for stage in placement.stages)
    crosses = placement.num_stages > 1
    if machine.kind == "cpu":
        way: Transport = "shared-memory" if machine.shared_memory else "gloo"
        return way if splits else "none", way if crosses else "none"
    if machine.nccl:
        return "nccl" if splits else "none", "nccl" if crosses else "none"
    all_staged = len(staged_ranks(placement, machine)) == len(boundary_ranks(placement))
    boundary: Transport = "pinned" if all_staged else "peer"
    return "gloo" if splits else "none", boundary if crosses else "none"


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


def _notes(machine: Machine, layout: Layout, rows: tuple[RankRow, ...]) -> list[str]:
    notes, placement = [], layout.placement
    if layout.staged:
        devices = [tuple(placement.place_of(rank).device for rank in pair) for pair in layout.staged]
        pairs = ", ".join(f"{a} and {b}" for a, b in devices)
        notes.append(f"no peer access between GPUs {pairs}: activations are staged through pinned host memory")
    if layout.transport == "gloo" and machine.kind == "cuda":
        notes.append(f"partial sums go over the host (gloo), which is slow: {machine.nccl_problem}")
    used = {device for stage in placement.stages for device in stage.devices}
    if idle := [device for device in machine.devices if device.ordinal not in used]:
        notes.append(f"not used: {_named(machine, [device.ordinal for device in idle])}")
    if machine.kind == "cuda" and len(placement.stages) == 1 and len(rows) > 1:
        notes += _uneven_note([row.device for row in rows])
    return notes


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
        f"{most.free_bytes / 2**30:.1f}: the smallest bounds the KV cache of all. -n maps layers unevenly"
    ]
