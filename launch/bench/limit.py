"""The fastest that memory allows: every byte that a decode step must read, read once, at the speed of the memory.

``python -m mgpu.launch.bench.limit`` prints the read speed of one core: `machine_read_speed` runs one per core.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.planner import Plan
from mgpu.orchestrator.placement.split.sizes import active_bytes, layers_bytes
from mgpu.protocol.model.facts import DTYPE_BYTES, ModelFacts
from mgpu.protocol.model.quantization import Quant

_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
BLOCK_BYTES = 128 << 20
"""Per core: larger than what a core has of the last cache, small enough for any machine."""
SECONDS = 0.4
_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What a step reads, and how fast that can be read."""

    weight_bytes: int
    """All weights but the input embedding, of which a step reads one row per token; a tied head counts."""
    kv_token_bytes: int
    bytes_per_s: float
    """Of all devices that read at the same time, together; 0: not known."""
    state_bytes: int = 0
    """Of the states of a row, which are read and written."""
    idle_bytes: int = 0
    """Of experts that one row does not choose."""
    idle_share: float = 0.0
    """Of all experts; of those that some rows do not choose, another row leaves this share unchosen."""

    def step_bytes(self, batch: int, context: float) -> float:
        """Return the bytes of one step in which ``batch`` rows have ``context`` tokens behind them on average.

        Rows choose experts at random: where each has 8 of 128, 64 rows leave 2 of them unchosen.
        """
        weights = self.weight_bytes - self.idle_bytes * self.idle_share ** (batch - 1)
        return weights + batch * (self.kv_token_bytes * context + 2 * self.state_bytes)

    def tokens_per_s(self, batch: int, context: float) -> float | None:
        """Return the most tokens per second of a whole batch; None where the bandwidth is not known."""
        if not self.bytes_per_s:
            return None
        return batch * self.bytes_per_s / self.step_bytes(batch, context)


def limit_of(plan: Plan, bytes_per_s: float) -> Limit:
    """Return the limit of a planned server, in the types that weights and cache are held in.

    ``bytes_per_s`` is of one GPU, or of the whole machine on the CPU. GPUs of one stage read side by side; stages
    follow each other, so that their bytes add up.
    """
    readers = len(plan.layout.placement.stages[0].devices) if plan.machine.kind == "cuda" else 1
    weights = weight_bytes(plan.facts, DTYPE_BYTES[plan.layout.dtype], plan.layout.quant)
    per_token, per_row = sum(row.kv_token_bytes for row in plan.rows), sum(row.state_bytes for row in plan.rows)
    if (experts := plan.facts.experts) is None:
        return Limit(weights, per_token, bytes_per_s * readers, per_row)
    total, active = active_bytes(plan.facts, DTYPE_BYTES[plan.layout.dtype], plan.layout.quant)
    idle_share = 1 - experts.active / experts.count
    return Limit(weights, per_token, bytes_per_s * readers, per_row, total - active, idle_share)


def weight_bytes(facts: ModelFacts, dtype_bytes: int, quant: Quant = "none") -> int:
    """Return the bytes of the weights that a decode step reads: layers, final norm and head.

    Quantized matrices come with their scales; the head keeps the type that the model is served in.
    """
    head = (facts.vocab_size + 1) * facts.hidden_size * dtype_bytes
    return layers_bytes(facts, range(facts.num_layers), 1, dtype_bytes, quant) + head


def parse_bandwidth(text: str) -> float:
    """Read ``4.30TB/s`` or ``25GB/s`` as bytes per second. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]B)(?:/s)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"--bandwidth {text!r} is not a speed; write for example 4.30TB/s or 25GB/s, or leave it out")
    return float(match[1]) * _UNITS[match[2].upper()]


def read_speed(seconds: float, nbytes: int = BLOCK_BYTES) -> float:
    """Return the bytes per second at which this process reads: the best of its passes.

    A search for a byte that does not occur reads everything, at the speed of the memory on all common machines.
    """
    block = bytearray(b"\1") * nbytes  # written, so that it is memory and not one shared page of zeros
    best, until_s = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until_s or not best:
        began_s = time.perf_counter()
        block.find(b"\0")
        best = max(best, nbytes / (time.perf_counter() - began_s))
    return best


def machine_read_speed() -> float:
    """Return the bytes per second of processes that read side by side, one per core that this one may use."""
    command = [sys.executable, "-m", "mgpu.launch.bench.limit"]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in os.sched_getaffinity(0)]
    try:
        return sum(float(reader.communicate(timeout=_DEADLINE_S)[0]) for reader in readers)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


if __name__ == "__main__":
    print(read_speed(SECONDS))
