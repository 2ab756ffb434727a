"""Experts on the CPU whose layers are on a GPU: whether the machine's memory holds them, and what they cost."""

from collections.abc import Sequence

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.costs import HOST_BYTES_PER_S
from mgpu.orchestrator.placement.fit import Sizing, gib, host_budget
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.rank_row import RankRow
from mgpu.orchestrator.placement.split.sizes import expert_bytes
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.layout import Layout
from mgpu.protocol.model.quantization import formats_of
from mgpu.protocol.model.weight_format import WeightFormat


def check_cpu_experts(sizing: Sizing, rows: Sequence[RankRow], source: str) -> None:
    """Raise PlacementError where experts cannot be on the CPU as ``source`` says, or are there with their layers."""
    layout, machine = sizing.layout, sizing.machine
    if not layout.cpu_experts:
        return
    if machine.hosts:
        raise PlacementError(
            f"{source}: experts on the CPU need memory of each host, which is not known with --nodes; leave experts out"
        )
    for row in rows if machine.kind == "cuda" else ():
        if row.device.kind == "cpu" and (layers := layout.cpu_experts_of(row.stage_index)):
            raise PlacementError(
                f"{source}: layer {layers[0]} is on the CPU as a whole, with its experts: leave experts out for the "
                f"layers {row.first_layer}-{row.end_layer}"
            )
    _check_memory(sizing, rows, source)


def _check_memory(sizing: Sizing, rows: Sequence[RankRow], source: str) -> None:
    """Raise PlacementError if the machine's memory does not hold the experts of GPUs beside what CPU workers need."""
    layers, budget = sizing.layout.cpu_experts, host_budget(sizing.machine, sizing.options)
    needed = sum(row.host_bytes for row in rows)
    if not needed:
        return
    beside = sum(row.weight_bytes + row.reserve_bytes for row in rows if row.device.kind == "cpu")
    if needed + beside <= budget:
        return
    total, free = sizing.machine.host_bytes
    others = f" beside the {gib(beside)} of the layers there" if beside else ""
    number = max(0, budget - beside) * len(layers) // needed
    ways = [f"{number} of these layers would fit"] * (number > 0) + _narrower(sizing, budget - beside)
    raise PlacementError(
        f"{source}: the experts of {len(layers)} layers on the CPU need {gib(needed)} of the machine's memory{others}, "
        f"and {gib(budget)} can be used ({gib(free)} free of {gib(total)}). "
        f"{'; '.join(ways) or 'Leave experts out, or use a machine with more memory'}"
    )


def _narrower(sizing: Sizing, budget: int) -> list[str]:
    """Return the advice to quantize experts, if they then fit."""
    layout = sizing.layout
    if layout.quant != "none" or sizing.facts.formats:
        return []
    size = expert_bytes(sizing.facts, layout.cpu_experts, 1, sizing.dtype_bytes, "4", layout.expert_split)
    return ["--quant 4 would make them fit"] if size <= budget else []


def cpu_expert_notes(sizing: Sizing, rows: Sequence[RankRow]) -> list[str]:
    """Return a line with what experts on the CPU cost beside GPUs; nothing where all is on the CPU."""
    experts, needed = sizing.facts.experts, sum(row.host_bytes for row in rows)
    if experts is None or not needed:
        return []
    read = needed * experts.active // experts.count
    graphs = "the GPU's stream calls the processor, also in CUDA graphs"
    if not stay_in_graphs(sizing.facts, sizing.machine, sizing.layout):
        graphs = "steps of these layers' GPUs are no CUDA graphs then"
    return [
        f"experts of {cpu_expert_layers(sizing.layout)} on the CPU: {gib(needed)} of the machine's memory. A token "
        f"reads {gib(read)} of them, which takes {1e3 * read / HOST_BYTES_PER_S:.1f} ms at an assumed "
        f"{HOST_BYTES_PER_S / 1e9:.0f} GB/s; {graphs}"
    ]


def stay_in_graphs(facts: ModelFacts, machine: Machine, layout: Layout) -> bool:
    """Return True if the GPU's stream calls the processor for experts, so that steps can be CUDA graphs.

    That takes kernels for the CPU, which compute in bfloat16 with dense experts or with codes of 4 and 8 bits.
    """
    forms = [
        form
        for layer in layout.cpu_experts
        for held in ("gate_up", "down")
        for form in formats_of(facts, layer, layout.quant).formats_of(held)
    ]
    return layout.dtype == "bfloat16" and machine.has_compiler and all(map(_has_kernel, forms))


def _has_kernel(form: WeightFormat) -> bool:
    return form.quant in ("none", "4", "8", "fp4", "nl4") and form.group % 32 == 0 and not form.is_ordered


def cpu_expert_layers(layout: Layout) -> str:
    """Return the layers whose experts are on the CPU, in words."""
    layers = layout.cpu_experts
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"{len(layers)} layers from {layers[0]} to {layers[-1]}"
