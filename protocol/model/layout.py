"""What is decided once per server, before any process starts, and goes whole to whoever needs it.

`Layout` says where and in which types the model runs, `StepLimits` what a step may have. The planner fills them in;
the scheduler and every worker read them.
"""

from dataclasses import dataclass

from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import Dtype, KvCacheDtype
from mgpu.protocol.model.placement import PlacementPlan, Transport
from mgpu.protocol.model.quantization import Quant

_CPU_POOL_BYTES = 2 << 30
_CPU_POOL_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread over devices."""

    placement: PlacementPlan
    dtype: Dtype
    transport: Transport
    """How partial sums move inside a stage: nccl, gloo or shared-memory."""
    stage_transport: Transport
    """How activations cross a stage boundary: the same, peer (CUDA IPC) or pinned (shared pinned host memory)."""
    staged: tuple[tuple[int, int], ...] = ()
    """Sending and receiving ranks without peer access: their activations go through pinned host memory."""
    cpu_ranks: tuple[int, ...] = ()
    """Ranks on CPU workers beside others on GPUs. They add up in shared memory, whatever ``transport`` is."""
    cpu_experts: tuple[int, ...] = ()
    """Layers whose experts are in the machine's memory, and computed by the processor in the workers of the layer."""
    broken: tuple[tuple[int, int], ...] = ()
    """Ranks, in both orders, between whose GPUs the driver announces peer access that does not work."""
    quant: Quant = "none"
    """What linear layers are quantized to while they are loaded."""
    kv_cache_dtype: KvCacheDtype = "auto"
    """What keys and values are rounded to when they are stored."""
    expert_split: ExpertSplit = "tensor"
    """How the ranks of a stage share the experts of a mixture."""

    @property
    def waits_for_cpu(self) -> bool:
        """True if steps wait for the processor: for workers on it, or for experts of workers on GPUs."""
        return bool(self.cpu_ranks or self.cpu_experts)

    def cpu_experts_of(self, stage_index: int) -> tuple[int, ...]:
        """Return the layers of a stage whose experts are on the CPU."""
        stage = self.placement.stages[stage_index]
        return tuple(layer for layer in self.cpu_experts if stage.first_layer <= layer < stage.end_layer)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What the scheduler plans with and every worker prepares for."""

    block_size: int
    """Tokens per KV block."""
    max_rows: int
    """Most requests that run at once; rows are numbered [0, max_rows)."""
    max_batch_tokens: int
    """Most tokens in one step."""
    max_seq_len: int
    """Most tokens (prompt and output) of one request."""
    num_snapshots: int = 0
    """States of linear layers that are kept beside those of the rows, for prompts that begin alike."""


def cpu_pool_bytes(free_bytes: float) -> int:
    """Return the KV pool of a CPU worker that was not given a size, from the free memory that is its share."""
    return min(_CPU_POOL_BYTES, int(_CPU_POOL_SHARE * free_bytes))
