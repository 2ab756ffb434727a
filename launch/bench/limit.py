"""The fastest that memory allows: every byte that a decode step must read, read once."""

import math
import re
from dataclasses import dataclass

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.planner import Plan
from mgpu.protocol.checkpoint_tensors import expected_tensors
from mgpu.protocol.model import DTYPE_BYTES, ModelFacts, kv_element_bytes

_EMBEDDING = "model.embed_tokens.weight"
_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True, slots=True)
class Limit:
    """What a step reads, and how fast that can be read."""

    weight_bytes: int
    """All weights but the input embedding, of which a step reads one row per token; a tied head counts."""
    kv_token_bytes: int
    bytes_per_s: float
    """Of all devices that read at the same time, together; 0: not known."""

    def step_bytes(self, batch: int, context: float) -> float:
        """Give the bytes of one step in which ``batch`` rows have ``context`` tokens behind them on average."""
        return self.weight_bytes + self.kv_token_bytes * batch * context

    def tokens_per_s(self, batch: int, context: float) -> float | None:
        """Give the most tokens per second of a whole batch; None where the bandwidth is not known."""
        if not self.bytes_per_s:
            return None
        return batch * self.bytes_per_s / self.step_bytes(batch, context)


def limit_of(plan: Plan, bytes_per_s: float) -> Limit:
    """Give the limit of a planned server, in the type that it is served in.

    ``bytes_per_s`` is of one GPU, or of the whole machine on the CPU. GPUs of one stage read side by side; stages
    follow each other, so that their bytes add up.
    """
    width, kv_width = DTYPE_BYTES[plan.dtype], kv_element_bytes(plan.kv_cache_dtype, plan.dtype)
    readers = len(plan.placement.stages[0].devices) if plan.machine.kind == "cuda" else 1
    cache = 2 * plan.facts.num_layers * plan.facts.num_kv_heads * plan.facts.head_dim
    return Limit(weight_elements(plan.facts) * width, cache * kv_width, bytes_per_s * readers)


def weight_elements(facts: ModelFacts) -> int:
    """Count the weights that a decode step reads."""
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(facts).items()}
    return sum(sizes.values()) - (0 if facts.tie_embeddings else sizes[_EMBEDDING])


def parse_bandwidth(text: str) -> float:
    """Read ``4.30TB/s`` or ``25GB/s`` as bytes per second. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]B)(?:/s)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"--bandwidth {text!r} is not a speed; write for example 4.30TB/s or 25GB/s, or leave it out")
    return float(match[1]) * _UNITS[match[2].upper()]
