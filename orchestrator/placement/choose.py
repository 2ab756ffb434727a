"""Choose which devices compute which layers: as the user asked, else by what is visible and how the model splits."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.fit import weight_capacity
from mgpu.orchestrator.placement.machine.cpu_features import multiplies_bfloat16
from mgpu.orchestrator.placement.machine.described import kinds_text
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine, selectors
from mgpu.orchestrator.placement.machine.gpu_facts import find_gpu
from mgpu.orchestrator.placement.named_layers import named_stages
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.split.divisibility import (
    advice_without_groups,
    compatible_sizes,
    sizes_text,
    split_problems,
)
from mgpu.orchestrator.placement.split.layer_map import (
    balanced_stages,
    even_stages,
    map_text,
    parse_layer_map,
    quick_stages,
)
from mgpu.orchestrator.placement.split.sizes import edge_bytes, kv_token_bytes, layers_bytes
from mgpu.orchestrator.placement.split.stage_order import stage_order
from mgpu.orchestrator.placement.topology.rules import Topology
from mgpu.orchestrator.placement.uneven import example_shares, uneven_stage
from mgpu.protocol.model.facts import DTYPE_BYTES, Dtype, ModelFacts, kv_element_bytes
from mgpu.protocol.model.placement import PlacementPlan, Stage

_USUAL_TOKENS = 4096
"""Length of a request up to which more room for keys and values counts more than speed."""

Choice = tuple[PlacementPlan, str]
"""A placement and the reason for it."""


def dtype_of(machine: Machine, options: LayoutOptions) -> Dtype:
    """Return the type that a model computes in: as asked, else the machine's usual one."""
    if options.dtype:
        return options.dtype
    return "bfloat16" if machine.kind == "cuda" or multiplies_bfloat16(machine.cpu_flags) else "float32"


def choose_placement(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> Choice:
    """Choose by the layer map or the size that was typed, else by the visible devices (the table in docs)."""
    if options.tp_shares is not None:
        return uneven_stage(facts, machine, options, options.tp_shares), f"--tp-shares {options.tp_shares}"
    if options.topology is not None and options.topology.places:
        return _choose_named(facts, machine, options, options.topology)
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
        if facts.borrowed is not None and not facts.borrowed.can_split:
            cause = f"transformers has no plan to split {facts.architecture}"
        reason = f"the model has no tensor-parallel size above 1 ({cause})"
        return _choose_balanced(facts, machine, options, reason)
    if count in sizes:
        return _one_stage(facts, range(count)), _split_reason(facts, machine, count)
    if options.fewer_devices:
        return _choose_fewer(facts, machine, options)
    raise _split_error(facts, machine, options, count, f"{count} {_noun(machine, count)}")


def _choose_fewer(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> Choice:
    count = len(machine.devices)
    taken = _emptiest(
        machine, max(size for size in compatible_sizes(facts, options.quant, options.experts) if size <= count)
    )
    return _one_stage(facts, taken), (
        f"{devices_text(machine, taken)} of {count}, because {facts.num_q_heads} query heads and {facts.num_kv_heads} "
        f"KV heads do not split over {count}; sizes that do: {sizes_text(facts, options.quant, options.experts)}"
    )


def _emptiest(machine: Machine, count: int) -> list[int]:
    """Return the ordinals of the devices with most free memory, in order."""
    ordered = sorted(machine.devices, key=lambda device: (-device.free_bytes, device.ordinal))
    return sorted(device.ordinal for device in ordered[:count])


def devices_text(machine: Machine, ordinals: Sequence[int]) -> str:
    """Return devices in words, such as `GPUs 0, 2`."""
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


def _choose_map(facts: ModelFacts, machine: Machine, options: LayoutOptions, text: str) -> Choice:
    if options.tp is not None:
        raise PlacementError(
            f'-n "{text}" and --tp {options.tp} contradict each other: a layer map already says which devices are '
            f'used. Drop one of them, or write a hybrid such as -n "0+1:{facts.num_layers}"'
        )
    count = len(machine.devices)
    placement = parse_layer_map(text, facts, count, _noun(machine, 1), options.quant, options.experts)
    if machine.kind == "cuda" and all(ordinal >= count for stage in placement.stages for ordinal in stage.devices):
        raise PlacementError(f'-n "{text}": everything is on the CPU; use --device cpu instead')
    return placement, f'-n "{text}"'


def _choose_named(facts: ModelFacts, machine: Machine, options: LayoutOptions, topology: Topology) -> Choice:
    if options.tp is not None or options.device_layers is not None:
        other = f"--tp {options.tp}" if options.tp is not None else f'-n "{options.device_layers}"'
        raise PlacementError(
            f"{topology.source} and {other} both say where layers go. Drop {other.split()[0]}, or leave devices out of "
            "the file"
        )
    without = replace(options, topology=None)

    def automatic(by_layer: bool) -> PlacementPlan:
        if by_layer and len(machine.devices) > 1:
            return _choose_balanced(facts, machine, replace(without, fewer_devices=True), topology.source)[0]
        return choose_placement(facts, machine, without)[0]

    return named_stages(topology, facts, machine, options, automatic), f"--topology {topology.source}"


def _choose_size(facts: ModelFacts, machine: Machine, options: LayoutOptions, size: int) -> Choice:
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
    if size >= 2 and facts.borrowed is None and facts.linear is None and (shares := example_shares(facts, size)):
        text += f", or --tp-shares {shares}"
    if 2 <= size <= facts.num_layers:
        text += f', or give each its own layers: -n "{map_text(even_stages(facts.num_layers, range(size)))}"'
    return PlacementError(text + advice_without_groups(facts, size, options.quant, options.experts))


def _more_devices(machine: Machine, sizes: Sequence[int], size: int) -> str:
    """Return what else to type for a size above the number of devices: the size itself, or the nearest that splits."""
    count = len(machine.devices)
    if machine.hosts:
        return ""
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
    if machine.hosts:
        return _first_devices(machine, count)
    if options.tp is not None:
        return f"--tp {count}"
    # CPU workers are as many as --workers says: --tp alone would find one.
    if machine.kind == "cpu" or machine.kinds:
        return f"{_first_devices(machine, count)} instead"
    return f"{_first_devices(machine, count)} (or --tp {count})"


def _first_devices(machine: Machine, count: int) -> str:
    """Return what to type to use only the first ``count`` devices."""
    if machine.hosts:
        return f"a launcher with {count} {'process' if count == 1 else 'processes'} in all (WORLD_SIZE={count})"
    if machine.kinds:
        return f"--gpus {shlex.quote(kinds_text(machine.kinds[:count]))}"
    if machine.kind == "cpu" or len({device.uuid for device in machine.devices}) < len(machine.devices):
        return f"--workers {count}"
    return f"CUDA_VISIBLE_DEVICES={selectors(machine.devices[:count])}"


def _choose_balanced(facts: ModelFacts, machine: Machine, options: LayoutOptions, reason: str) -> Choice:
    count, layers = len(machine.devices), facts.num_layers
    ordinals = stage_order(machine, range(count))
    if count > layers and options.fewer_devices:
        ordinals = stage_order(machine, _emptiest(machine, layers))
        reason += f"; {layers} of {count} {_noun(machine, count)}, because the model has {layers} layers"
    elif count > layers:
        raise PlacementError(
            f"{count} {_noun(machine, count)} cannot share {layers} layers, and layer mapping is needed ({reason}). "
            f"Use at most {layers}: {_first_devices(machine, layers)}"
        )
    last = len(ordinals) - 1
    dtype_bytes = DTYPE_BYTES[dtype_of(machine, options)]
    devices = [machine.devices[ordinal] for ordinal in ordinals]
    capacities = [weight_capacity(device, options) for device in devices]
    per_layer = layers_bytes(facts, range(layers), 1, dtype_bytes, options.quant) // layers
    extras = [edge_bytes(facts, 1, i == 0, i == last, dtype_bytes, options.quant) for i in range(len(ordinals))]
    rates = _rates(devices)
    if machine.kind == "cuda" and not rates:
        return balanced_stages(layers, ordinals, capacities, per_layer, extras), reason
    head = edge_bytes(facts, 1, False, True, dtype_bytes, options.quant)
    read_extras = [head if i == last else 0 for i in range(len(ordinals))]
    enough = _enough_bytes(facts, machine, options) if len(set(rates)) > 1 else math.inf
    if len(set(rates)) == 1:
        rates = []
    return quick_stages(layers, ordinals, capacities, per_layer, extras, read_extras, rates, enough), reason


def _rates(devices: Sequence[DeviceInfo]) -> list[float]:
    """Return how fast each GPU reads its memory: known or told, times what was measured of it. Empty if not known."""
    known = [(gpu.bytes_per_s if (gpu := find_gpu(device.name)) else device.bytes_per_s) for device in devices]
    if len({device.name for device in devices}) == 1:
        known = [1e12] * len(devices)
    return [rate * device.speed for rate, device in zip(known, devices, strict=True)] if all(known) else []


def _enough_bytes(facts: ModelFacts, machine: Machine, options: LayoutOptions) -> float:
    """Return the KV bytes of a layer that are worth more than speed: all rows at a usual length."""
    element = kv_element_bytes(options.kv_cache_dtype, dtype_of(machine, options))
    tokens = options.max_rows * min(options.max_seq_len or facts.max_position, _USUAL_TOKENS)
    return tokens * kv_token_bytes(facts, range(facts.num_layers), 1, element) / facts.num_layers
