"""What one server needs to know, decided before anything is started."""

import os
import sys
from dataclasses import dataclass, field
from typing import Literal

from mgpu.orchestrator.placement.options import batch_tokens
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.model.facts import DTYPE_BYTES, Dtype, KvCacheDtype, ModelFacts, ModelSource
from mgpu.protocol.model.placement import PlacementPlan, Transport
from mgpu.protocol.model.quantization import Quant
from mgpu.protocol.model.shared_memory_layout import shared_layout

WORKER_COMMAND = (sys.executable, "-m", "mgpu.worker")
GATEWAY_COMMAND = (sys.executable, "-m", "mgpu.orchestrator.gateway")
GPU_SPIN_S = 0.002
_SHARED = ("shared-memory", "peer", "pinned")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """A model, its layout and the limits of one server. 0 means: choose (see the properties)."""

    source: ModelSource
    facts: ModelFacts
    plan: PlacementPlan
    layout_table: str
    """For people: the start-up log and the API show it."""
    model_name: str
    device_kind: Literal["cpu", "cuda"]
    dtype: Dtype
    transport: Transport
    stage_transport: Transport
    quant: Quant = "none"
    kv_cache_dtype: KvCacheDtype = "auto"
    staged: tuple[tuple[int, int], ...] = ()
    """Sending and receiving ranks that ``peer`` does not connect: pinned host memory does."""
    bind: str = ""
    """Front endpoint; empty: an ipc socket in the private runtime directory."""
    keys: ServerKeys | None = None
    """None: tcp is for the loopback only."""
    block_size: int = 16
    max_rows: int = 256
    max_batch_tokens: int = 0
    max_seq_len: int = 0
    memory_fraction: float = 0.9
    kv_bytes: int = 0
    prefix_cache: bool = True
    num_threads: int = 0
    """CPU threads per worker."""
    drain_timeout_s: float = 30.0
    start_timeout_s: float = 1800.0
    """Longest start-up without any progress."""
    worker_timeout_s: float = 120.0
    hang_timeout_s: float = 10.0
    """Least time that a step gets before the workers count as hung; see step_deadline.py."""
    max_restarts: int = 3
    """Restarts of the workers, and of the gateway, within ``restart_window_s``; one more ends the server."""
    restart_window_s: float = 600.0
    gateway_timeout_s: float = 10.0
    """Longest silence of the gateway. Shorter than the 15 s after which clients give up: it must be replaced before."""
    gateway_memory_bytes: int = 0
    """What the gateway may grow by before it is replaced; see gateway/memory.py."""
    gateway_start_timeout_s: float = 60.0
    """Longest start of a gateway that replaces another; it reads the tokenizer."""
    standby: bool = False
    """Keep processes of the next epoch that have imported torch; see standby.py."""
    standby_delay_s: float = 5.0
    resume_timeout_s: float = 30.0
    """How long a new gateway waits for clients to come back before their requests end."""
    stop_timeout_s: float = 10.0
    seed: int = 0
    max_request_bytes: int = 1 << 20
    client_limits: ClientLimits = field(default_factory=ClientLimits)
    worker_envs: tuple[dict[str, str], ...] = ()
    """Per rank: added to the worker's environment, such as CUDA_VISIBLE_DEVICES; empty: nothing."""
    worker_devices: tuple[str, ...] = ()
    """Per rank: the device under that environment, ``cpu`` or ``cuda:N``; empty: the plan's ordinals."""
    worker_command: tuple[str, ...] = WORKER_COMMAND
    gateway_command: tuple[str, ...] = GATEWAY_COMMAND

    @property
    def batch_tokens(self) -> int:
        """Most tokens in one step: as configured, else what suits the device."""
        return batch_tokens(self.max_batch_tokens, self.max_rows, self.device_kind)

    @property
    def seq_len(self) -> int:
        """Longest prompt plus output: as configured, else what the model was trained for."""
        return self.max_seq_len or self.facts.max_position

    @property
    def spin_s(self) -> float:
        """How long the engine looks for a thing that is due before it sleeps; see polling.py."""
        return GPU_SPIN_S if self.device_kind == "cuda" else 0.0

    @property
    def threads_per_worker(self) -> int:
        """As configured; else the cores shared out on the CPU, and torch's default (0) beside GPUs."""
        if self.num_threads or self.device_kind != "cpu":
            return self.num_threads
        return max(1, len(os.sched_getaffinity(0)) // self.plan.world_size)

    @property
    def shared_bytes(self) -> int:
        """Size of the memory that all ranks map; 0 when the transports need none."""
        if self.plan.world_size == 1 or not {self.transport, self.stage_transport} & set(_SHARED):
            return 0
        dtype_bytes = DTYPE_BYTES[self.dtype]
        layout = shared_layout(self.plan, self.batch_tokens, self.max_rows, self.facts.hidden_size, dtype_bytes)
        return layout.total_bytes

    def device_of(self, rank: int) -> str:
        if self.worker_devices:
            return self.worker_devices[rank]
        return "cpu" if self.device_kind == "cpu" else f"cuda:{self.plan.place_of(rank).device}"
