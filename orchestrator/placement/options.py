"""The options that decide the layout, and the defaults that depend on the device."""

from dataclasses import dataclass
from typing import Literal

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.topology.rules import Topology
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import Dtype, KvCacheDtype
from mgpu.protocol.model.quantization import Quant

BLOCK_SIZE = {"cuda": 64, "cpu": 16}
"""Default tokens per KV block. Kernels are fastest with pages of 64 (see docs/kernels.md); shorter ones
share more of prompts that begin alike."""
_CPU_TOKENS = 512
_GPU_TOKENS = 2048
_LARGE_GPU_TOKENS = 8192
_LARGE_GPU = 40 << 30
"""Bytes from which a GPU has room for the activations of a long step, a few GiB. Prompts of many requests are
then computed 3 to 5 % faster, and decoding waits longer for them."""
_SPARSE_TOKENS = 16384
"""Of a mixture of experts, whose tokens cost a fraction of a dense model's: a step of so many reads the experts half as
often and fills their tiles better, and prompts of many requests are computed about 10 % faster."""
_SPARSE_GPU = 80 * 10**9
"""Bytes from which a GPU has room for the outputs of all experts of so many tokens."""


class LimitsError(UserError):
    """Limits that no scheduler can work with."""


@dataclass(frozen=True, slots=True)
class LayoutOptions:
    """Options that decide the layout, under their names on the command line; None if not asked."""

    tp: int | None = None
    tp_shares: str | None = None
    """KV heads of each device, such as ``3,3,2``."""
    device_layers: str | None = None
    topology: Topology | None = None
    """Devices and formats by layer, from a file."""
    experts: ExpertSplit | None = None
    """None: slices of every expert, unless only whole experts can be shared."""
    dtype: Dtype | None = None
    """None: bfloat16 on CUDA, float32 on the CPU."""
    quant: Quant = "none"
    kv_cache_dtype: KvCacheDtype = "auto"
    max_seq_len: int | None = None
    """None: as long as the model and the KV pool allow."""
    max_rows: int = 256
    max_batch_tokens: int = 0
    """Most tokens in one step; 0: what suits the device."""
    block_size: int = 0
    """Tokens per KV block; 0: what suits the device."""
    memory_fraction: float = 0.9
    """Share of each device's memory that weights, activations and KV cache may take together."""
    kv_memory: int = 0
    """KV bytes per worker; 0: what fits."""
    prefix_cache: bool = True
    """True: states of linear layers are kept for prompts that begin alike."""
    fewer_devices: bool = False
    """True: where the model does not split over all devices, take as many as it does. Only the demo does that."""


def implied_workers(options: LayoutOptions) -> int | None:
    """Return the number of workers that a size or a layer map needs; None without either."""
    if options.tp is not None:
        return options.tp
    if options.tp_shares is not None:
        return options.tp_shares.count(",") + 1
    if options.topology is not None and options.topology.last_cpu_number >= 0:
        return options.topology.last_cpu_number + 1
    ordinals = [
        int(part)
        for pair in (options.device_layers or "").split(";")
        for part in pair.split(":")[0].split("+")
        if part.strip().isdecimal() and len(part.strip()) <= 6
    ]
    return max(ordinals) + 1 if ordinals else None


def step_tokens(
    options: LayoutOptions,
    device_kind: Literal["cpu", "cuda"],
    device_bytes: int,
    num_stages: int,
    has_experts: bool = False,
) -> int:
    """Return the most tokens of a step: as asked, else what suits the device and leaves room to prefill.

    ``device_bytes``: memory of the smallest device. With several stages steps stay short on any GPU: the first and the
    last steps of a prompt keep only some stages busy. LimitsError when the budget leaves no room to prefill.
    """
    is_large = device_bytes >= _LARGE_GPU and num_stages == 1
    on_gpu = _LARGE_GPU_TOKENS if is_large else _GPU_TOKENS
    if is_large and has_experts and device_bytes >= _SPARSE_GPU:
        on_gpu = _SPARSE_TOKENS
    default = max(on_gpu if device_kind == "cuda" else _CPU_TOKENS, 2 * options.max_rows)
    check_batch_tokens(options.max_batch_tokens or default, options.max_rows)
    return options.max_batch_tokens or default


def check_batch_tokens(max_batch_tokens: int, max_rows: int) -> None:
    """Raise LimitsError when a step of decoding requests alone could fill the budget."""
    if max_batch_tokens <= max_rows:
        raise LimitsError(
            f"max_batch_tokens {max_batch_tokens} must exceed max_rows {max_rows}: a step decodes up to "
            f"{max_rows} requests and prefills with the rest; lower --max-rows or raise --max-batch-tokens"
        )
