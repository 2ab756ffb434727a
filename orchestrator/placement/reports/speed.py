"""Estimate how fast a plan decodes and reads prompts: bytes over bandwidth, products over arithmetic, and overheads.

The time of a decode step is that of reading the weights and the KV cache once, plus what each layer costs beside that.
The constants were fitted to measurements on H200s (docs/performance.md and docs/notes/multi-gpu.md), which the
estimates meet within 15 %. Other GPUs are scaled by their data sheets and were not measured.
"""

from dataclasses import dataclass, replace

from mgpu.orchestrator.placement.costs import HOST_BYTES_PER_S
from mgpu.orchestrator.placement.cpu_experts import stay_in_graphs
from mgpu.orchestrator.placement.machine.devices import DeviceInfo
from mgpu.orchestrator.placement.machine.gpu_facts import GpuFacts, find_gpu
from mgpu.orchestrator.placement.planner import Plan
from mgpu.orchestrator.placement.reports.stored_formats import is_stored
from mgpu.orchestrator.placement.split.sizes import edge_bytes, expert_bytes, kv_token_bytes, layers_bytes, part_facts
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import DTYPE_BYTES, ModelFacts, kv_element_bytes
from mgpu.protocol.model.placement import Stage, TensorPart
from mgpu.protocol.model.quantization import Quant
from mgpu.protocol.model.shared_memory_layout import SUM_ROWS

MANY = 64
"""Streams of the second estimate."""
CONTEXT = 1024
"""Tokens behind each stream."""
PROMPT = 2048
"""Tokens of the prompt whose first token is estimated."""

_READ = 0.896
"""Share of the data sheet's bandwidth that a copy reaches: 4.30 of 4.80 TB/s."""
_PRODUCTS: dict[Quant, float] = {"none": 0.965, "fp8": 0.845, "8": 0.845, "4": 0.615}
"""Share of that at which products of few rows read their weights. int4 is bound by arithmetic."""
_LAYER_S, _LAYER_MANY_S = 15.5e-6, 15e-6
"""What a layer costs beside its bytes, and how much more with many rows."""
_OVERLAP = 0.5
"""Share of the arithmetic of many rows that does not hide behind the reading of weights."""
_ROWS_FLOPS: dict[Quant, float] = {"8": 0.276, "4": 0.17}
"""Share of the bfloat16 rate that products of many rows with quantized weights reach at most."""
_SUM_S = 5e-6
"""One all-reduce of few rows by own kernels; a layer has two."""
_LINK = 0.44
"""Share of a link's bandwidth that sums reach."""
_PROMPT_FLOPS: dict[Quant, float] = {"none": 0.655, "fp8": 0.565, "8": 0.62, "4": 0.62}
"""Share of the data sheet's rate that products of a prompt reach: of float8 for fp8, else of bfloat16."""
_ATTENTION_FLOPS = 0.55
REQUEST_S = 3.8e-3
"""What a request costs on its way, beside its kernels."""
_HOST_SUM_S, _HOST_SUM_RATE = 6.7e-6, 7e9
"""One all-reduce by own kernels through pinned host memory, where GPUs do not reach each other; bytes per second."""
_NCCL_SUM_S, _NCCL_SUM_RATE = 35e-6, 32e9
"""The same by NCCL, which is quicker from about 32 rows on."""
_PCIE_5_FROM = (9, 0)
"""Compute capability from which GPUs have PCIe 5, as the measured ones; older ones reach the host half as fast."""
_LAUNCHED_S = 314e-6
"""A layer whose kernels are launched one by one, on the processors of the measured machine."""
_NCCL_S, _GLOO_S = 590e-6, 1.56e-3
"""The same with sums by NCCL, or over the host."""
_GRAPHS_FROM = (8, 0)
"""Compute capability from which steps are CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Speed:
    """An estimate. Tokens per second of one stream, and of many together; seconds to a prompt's first token."""

    one_stream: float
    many_streams: float | None
    """None where only the bandwidth of the GPU is known."""
    first_token_s: float | None
    source: str
    """What of the GPU the estimate is based on."""


@dataclass(frozen=True, slots=True)
class _Device:
    """Rates of the slowest device of a stage."""

    bytes_per_s: float
    flops: float
    float8_flops: float
    link_bytes_per_s: float
    has_graphs: bool
    host_share: float = 1.0
    """How fast it reaches the host's memory; 1 is the measured machine."""


def estimate_speed(plan: Plan, context: int = CONTEXT, prompt: int = PROMPT) -> Speed | None:
    """Return the speed of a plan. None where it cannot be told.

    That is on the CPU, on several hosts, for quantized checkpoints, and for GPUs of unknown bandwidth.
    """
    if plan.machine.kind == "cpu" or plan.machine.hosts or _is_stored_quantized(plan):
        return None
    stages = plan.layout.placement.stages
    devices = [_slowest([_by_ordinal(plan, ordinal) for ordinal in stage.devices]) for stage in stages]
    known = [device for device in devices if device is not None]
    if len(known) < len(devices):
        return None
    pairs = list(zip(stages, known, strict=True))

    def step_s(rows: int, behind: int) -> float:
        return sum(_stage_s(plan, stage, device, rows, behind) for stage, device in pairs)

    def lap_s(rows: int, behind: int) -> float:
        """Stages work on as many batches at once as there are stages, and each batch goes through all of them."""
        count = len(pairs)
        each = [_stage_s(plan, stage, device, -(-rows // count), behind) for stage, device in pairs]
        return max(sum(each), count * max(each))

    can_compute = all(device.flops for device in known) and not plan.layout.cpu_experts
    first_token_s = REQUEST_S + max(step_s(prompt, 0), sum(_prompt_s(plan, *pair, prompt) for pair in pairs))
    return Speed(
        one_stream=1 / step_s(1, context),
        many_streams=MANY / lap_s(MANY, context) if can_compute else None,
        first_token_s=first_token_s if can_compute else None,
        source=_source([device for stage in stages for device in _devices_of(plan, stage)], plan.facts),
    )


def _is_stored_quantized(plan: Plan) -> bool:
    return bool(plan.facts.formats) and plan.layout.quant == "none"


def _by_ordinal(plan: Plan, ordinal: int) -> DeviceInfo:
    return next(device for device in plan.machine.devices if device.ordinal == ordinal)


def _devices_of(plan: Plan, stage: Stage) -> list[DeviceInfo]:
    return [_by_ordinal(plan, ordinal) for ordinal in stage.devices]


def _slowest(devices: list[DeviceInfo]) -> _Device | None:
    rates = [_rates(device) for device in devices]
    known = [each for each in rates if each is not None]
    if len(known) < len(rates):
        return None
    return _Device(
        min(each.bytes_per_s for each in known),
        min(each.flops for each in known),
        min(each.float8_flops for each in known),
        min(each.link_bytes_per_s for each in known),
        all(each.has_graphs for each in known),
        min(each.host_share for each in known),
    )


def _rates(device: DeviceInfo) -> _Device | None:
    if device.kind == "cpu":
        return _Device(HOST_BYTES_PER_S, 0, 0, 0, has_graphs=False)
    gpu = find_gpu(device.name)
    has_graphs = device.capability is None or device.capability >= _GRAPHS_FROM
    share = 1.0 if device.capability is None or device.capability >= _PCIE_5_FROM else 0.5
    if gpu is not None:
        return _Device(gpu.bytes_per_s, gpu.flops, gpu.float8_flops, gpu.link_bytes_per_s, has_graphs, share)
    return _Device(device.bytes_per_s, 0, 0, 0, has_graphs, share) if device.bytes_per_s else None


def _source(devices: list[DeviceInfo], facts: ModelFacts) -> str:
    """Say which numbers of which GPUs count, and how well they were tried."""
    parts = []
    for name in dict.fromkeys(device.name for device in devices):
        gpu, device = find_gpu(name), next(each for each in devices if each.name == name)
        if device.kind == "cpu":
            parts.append(f"{HOST_BYTES_PER_S / 1e12:.1g} TB/s (assumed; {name})")
        elif gpu is not None:
            parts.append(f"{gpu.bytes_per_s / 1e12:.3g} TB/s and {gpu.flops / 1e12:.0f} TFLOP/s ({gpu.name})")
        else:
            parts.append(f"{device.bytes_per_s / 1e12:.3g} TB/s (the driver's memory clock and bus width; {name})")
    tried = "within 15 % of measurements"
    if not all(map(_is_measured, devices)) or len(devices) > 2:
        tried = "not measured on such a machine"
    elif facts.latent is not None:
        tried = "latent attention was not measured"
    elif facts.linear is not None:
        tried = "one stream of such a model was a third slower where it was measured"
    return f"{', '.join(parts)}; {tried}"


def _is_measured(device: DeviceInfo) -> bool:
    gpu: GpuFacts | None = find_gpu(device.name)
    return gpu is not None and gpu.name == "H200"


def _stage_s(plan: Plan, stage: Stage, device: _Device, rows: int, behind: int) -> float:
    """Return the seconds of one step of a stage with ``rows`` tokens, each with ``behind`` tokens in the cache."""
    quant = plan.layout.quant
    plan, size = _heaviest(plan, stage)
    facts = plan.facts
    layers, has_many = range(stage.first_layer, stage.end_layer), min(1.0, (rows - 1) / 16)
    reads = device.bytes_per_s * _READ
    elements = _elements(facts, layers, size)
    on_host = _host_read_bytes(plan, stage, size, rows)
    products_s = (layers_read_bytes(plan, layers, size, rows) - on_host) / (reads * _PRODUCTS[quant])
    if device.flops:
        if quant in _ROWS_FLOPS and 1 < rows <= MANY:
            products_s = max(products_s, 2 * elements * rows / (device.flops * _ROWS_FLOPS[quant]))
        else:
            rate = device.float8_flops if quant == "fp8" and device.float8_flops else device.flops
            products_s += _OVERLAP * has_many * 2 * elements * rows / rate
    head_s = _head_bytes(plan, stage) / (reads * _PRODUCTS["none"])
    kv_bytes = rows * _kv_read_bytes(plan, layers, size, behind)
    kv_bytes += 2 * min(rows, plan.limits.max_rows) * _state_bytes(plan, stage)
    graph_s = products_s + head_s + kv_bytes / reads + len(layers) * (_LAYER_S + has_many * _LAYER_MANY_S)
    work_s = graph_s + len(layers) * _sums_s(plan, stage, device, rows)
    launch_s = len(layers) * _launch_s(plan, stage, device)
    host_s = size * on_host / HOST_BYTES_PER_S  # the ranks share the machine's memory
    # Kernels of many rows hide less of the launching.
    return max(work_s, launch_s) + has_many * min(work_s, launch_s) + host_s


def _heaviest(plan: Plan, stage: Stage) -> tuple[Plan, int]:
    """Return the plan and the ranks that share it; with unequal shares, that of the rank with the largest alone."""
    if not stage.shares:
        return plan, len(stage.devices)
    part = TensorPart(stage.shares.index(max(stage.shares)), len(stage.shares), stage.shares)
    return replace(plan, facts=part_facts(plan.facts, part, plan.layout.quant, plan.layout.expert_split)), 1


def layers_read_bytes(plan: Plan, layers: range, size: int, rows: int) -> float:
    """Return the bytes of the layers' weights that one rank reads in a step: of experts only those that a row needs."""
    facts, layout = plan.facts, plan.layout
    types = size, DTYPE_BYTES[layout.dtype], layout.quant, layout.expert_split
    whole = layers_bytes(facts, layers, *types)
    experts = facts.experts
    if experts is None or layout.expert_split != "tensor":
        return whole
    few = layers_bytes(_with_experts(facts, experts, experts.active), layers, *types)
    if experts.count == experts.active:
        return whole
    needed = experts.count * (1 - (1 - experts.active / experts.count) ** rows)
    return few + (whole - few) * (needed - experts.active) / (experts.count - experts.active)


def _host_read_bytes(plan: Plan, stage: Stage, size: int, rows: int) -> float:
    """Return the bytes of experts in the machine's memory that a rank on a GPU reads in a step."""
    layers = plan.layout.cpu_experts_of(plan.layout.placement.stages.index(stage))
    if (experts := plan.facts.experts) is None or not layers:
        return 0.0
    types = size, DTYPE_BYTES[plan.layout.dtype], plan.layout.quant, plan.layout.expert_split
    return expert_bytes(plan.facts, layers, *types) * (1 - (1 - experts.active / experts.count) ** rows)


def _with_experts(facts: ModelFacts, experts: ExpertFacts, count: int) -> ModelFacts:
    return replace(facts, experts=replace(experts, count=count))


def _elements(facts: ModelFacts, layers: range, size: int) -> float:
    """Return the weights of the layers that one token is multiplied with on one rank."""
    few = facts if facts.experts is None else _with_experts(facts, facts.experts, facts.experts.active)
    return layers_bytes(replace(few, formats=()), layers, 1, 2, "none") / 2 / size


def _head_bytes(plan: Plan, stage: Stage) -> float:
    if stage is not plan.layout.placement.stages[-1]:
        return 0
    size, facts = 1 if stage.shares else len(stage.devices), plan.facts
    return edge_bytes(facts, size, False, True, DTYPE_BYTES[plan.layout.dtype], plan.layout.quant)


def _seen(facts: ModelFacts, layer: int, behind: int) -> int:
    """Return the tokens that attention reads in a layer: none if it is linear, and no more than its window."""
    if facts.is_linear(layer):
        return 0
    window = facts.sliding_window
    return min(behind, window) if window and facts.sliding_layers[layer] else behind


def _kv_read_bytes(plan: Plan, layers: range, size: int, behind: int) -> int:
    """Return the bytes of keys and values that one token's attention reads on a rank."""
    element = kv_element_bytes(plan.layout.kv_cache_dtype, plan.layout.dtype)
    facts = plan.facts
    return sum(_seen(facts, at, behind) * kv_token_bytes(facts, range(at, at + 1), size, element) for at in layers)


def _state_bytes(plan: Plan, stage: Stage) -> int:
    """Return the bytes of one stream's states, which each step reads and writes."""
    return plan.rows[plan.layout.placement.ranks_of_stage(plan.layout.placement.stages.index(stage))[0]].state_bytes


def _has_own_sums(plan: Plan, stage: Stage) -> bool:
    devices = stage.devices
    return all(plan.machine.peers(a, b) for a in devices for b in devices if a != b)


def _sums_s(plan: Plan, stage: Stage, device: _Device, rows: int) -> float:
    """Return the seconds that a layer's two sums over ranks take."""
    if len(stage.devices) == 1:
        return 0.0
    nbytes = rows * plan.facts.hidden_size * DTYPE_BYTES[plan.layout.dtype]
    return 2 * (_peer_sum_s(plan, stage, device, nbytes) if _has_own_sums(plan, stage) else
                _host_sum_s(plan, device, rows, nbytes))  # fmt: skip


def _peer_sum_s(plan: Plan, stage: Stage, device: _Device, nbytes: float) -> float:
    links = {plan.machine.links[a][b] for a in stage.devices for b in stage.devices if a != b}
    if links == {"nvlink"} and device.link_bytes_per_s > 100e9:
        return _SUM_S + nbytes / (device.link_bytes_per_s * _LINK)
    return _SUM_S + nbytes / 10e9  # through a PCIe slot, both ways


def _host_sum_s(plan: Plan, device: _Device, rows: float, nbytes: float) -> float:
    own_s = _HOST_SUM_S + nbytes / (_HOST_SUM_RATE * device.host_share)
    nccl_s = _NCCL_SUM_S + nbytes / (_NCCL_SUM_RATE * device.host_share)
    if plan.layout.transport != "gloo":
        return min(own_s, nccl_s)
    return _SUM_S + nbytes / 0.6e9 if rows > SUM_ROWS or plan.layout.cpu_ranks else own_s


def _launch_s(plan: Plan, stage: Stage, device: _Device) -> float:
    """Return the seconds that the host needs to launch a layer's kernels; 0 for CUDA graphs."""
    has_experts = bool(plan.layout.cpu_experts_of(plan.layout.placement.stages.index(stage)))
    can_capture = not has_experts or stay_in_graphs(plan.facts, plan.machine, plan.layout)
    if device.has_graphs and not plan.layout.cpu_ranks and can_capture:
        return 0.0
    if len(stage.devices) > 1 and not _has_own_sums(plan, stage):
        return _GLOO_S if plan.layout.transport == "gloo" else _NCCL_S
    return _LAUNCHED_S


def _prompt_s(plan: Plan, stage: Stage, device: _Device, prompt: int) -> float:
    """Return the seconds of a stage for a whole prompt, bound by arithmetic and by the sums over ranks."""
    if not device.flops:
        return 0.0
    quant = plan.layout.quant
    plan, size = _heaviest(plan, stage)
    facts = plan.facts
    layers = range(stage.first_layer, stage.end_layer)
    rate = device.float8_flops if quant == "fp8" and device.float8_flops else device.flops
    products = 2 * _elements(facts, layers, size) * prompt / (rate * _PROMPT_FLOPS[quant])
    seen = sum(_seen(facts, at, prompt // 2) * facts.of_layer(at).head_dim for at in layers)
    attention = 4 * seen * prompt * facts.num_q_heads / size / (device.flops * _ATTENTION_FLOPS)
    return products + attention + len(layers) * _sums_s(plan, stage, device, prompt)


def speed_lines(plan: Plan, speed: Speed | None) -> list[str]:
    """Return the estimate in words, or why there is none; nothing on the CPU."""
    if plan.machine.kind == "cpu":
        return []
    if plan.machine.hosts:
        return ["speed: not estimated, nothing is known of the network between the hosts"]
    if _is_stored_quantized(plan):
        whose = "quantized checkpoints" if is_stored(plan) else "several formats"
        return [f"speed: not estimated, products with weights of {whose} have not been measured"]
    if speed is None:
        names = {device.name for device in plan.machine.devices if _rates(device) is None}
        return [
            f"speed: not estimated, the bandwidth of {', '.join(sorted(names))} is not known; --gpus 2xH200 describes "
            "a known kind"
        ]
    text = f"speed, estimated: {number(speed.one_stream)} tokens/s of one stream"
    if speed.many_streams is not None:
        text += f", {number(speed.many_streams)} of {MANY} together (at {CONTEXT:,} tokens of context)"
    if speed.first_token_s is not None:
        text += f"; first token of a {PROMPT:,}-token prompt after {seconds(speed.first_token_s)}"
    return [text, f"  from {speed.source}"]


def speed_json(speed: Speed | None) -> dict[str, object] | None:
    """Return the estimate as plain data; its names have what it holds for."""
    if speed is None:
        return None
    return {
        "tokens_per_s_of_1_stream": speed.one_stream,
        f"tokens_per_s_of_{MANY}_streams": speed.many_streams,
        f"first_token_s_of_a_prompt_of_{PROMPT}": speed.first_token_s,
        "context": CONTEXT,
        "source": speed.source,
    }


def number(value: float) -> str:
    """Return an estimate with the digits that it deserves."""
    return f"{value:.2g}" if value < 9.95 else f"{float(f'{value:.3g}'):,.0f}"


def seconds(value: float) -> str:
    """Return an estimated time, in milliseconds below a second."""
    return f"{number(value)} s" if value >= 0.995 else f"{float(f'{value * 1000:.2g}'):g} ms"
