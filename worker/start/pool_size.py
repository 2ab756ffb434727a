"""How much of a device the KV pool may take."""

from collections.abc import Callable

import torch

from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model import layout
from mgpu.protocol.model.kv_pools import PoolSize, fewest_pages, has_pages, pool_size
from mgpu.worker.errors import OutOfMemory


def pools_of(spec: WorkerSpec, pool_bytes: int, block_bytes: int, page_bytes: int) -> PoolSize:
    """Return how many blocks fit, and pages for window layers (kv_pools.py). OutOfMemory if no sequence could run."""
    limits, sight = spec.limits, spec.facts.sight
    size = pool_size(pool_bytes, block_bytes, page_bytes, sight, limits)
    pages = fewest_pages(sight, limits) if has_pages(sight, limits) else 0
    if size.num_blocks < 1 or size.num_pages < pages:
        least = block_bytes + max(1, pages) * page_bytes
        raise OutOfMemory(
            f"{pool_bytes / 2**20:.0f} MiB are left for the KV cache and one block of {limits.block_size} tokens"
            f"{f' with {pages} in sight of window layers' if pages else ''} takes {least / 2**20:.2f} MiB; "
            "use more GPUs, --quant, or a larger --memory-fraction"
        )
    return size


def cpu_pool_bytes(spec: WorkerSpec) -> int:
    """Return the bytes of this worker's pool in a machine's memory, which all workers share."""
    return spec.kv_memory or layout.cpu_pool_bytes(_available_bytes() / spec.ranks_here)


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo names no MemAvailable")


def cuda_pool_bytes(spec: WorkerSpec, device: torch.device, ordinal: int, largest_step: Callable[[], None]) -> int:
    """Return the bytes of this worker's pool on a GPU that has its weights; runs the largest step to measure it.

    ``ordinal`` is the plan's number of the device. OutOfMemory when nothing is left.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest_step()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return spec.kv_memory or left_for_pool(spec, ordinal, free, total, activations)


def left_for_pool(spec: WorkerSpec, ordinal: int, free_bytes: int, total_bytes: int, activation_bytes: int) -> int:
    """Return this rank's share of what is left of a device; ranks on the same device get equal shares."""
    sharers = sum(stage.devices.count(ordinal) for stage in spec.layout.placement.stages)
    used = total_bytes - free_bytes
    left = int((spec.memory_fraction * total_bytes - used) / sharers) - activation_bytes
    if left <= 0:
        raise OutOfMemory(
            f"GPU {ordinal}: weights and others take {used / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB, a step of "
            f"{spec.limits.max_batch_tokens} tokens needs {activation_bytes / 2**30:.1f} GiB more, and memory fraction "
            f"{spec.memory_fraction:g} leaves nothing for the KV cache; use more GPUs, --quant, fewer tokens per step "
            "or a larger --memory-fraction"
        )
    return left
