"""What one server needs to know, decided before anything is started."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mgpu.orchestrator.placement.machine.control_groups import usable_cpus
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.internal.http_spec import HttpOptions
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.facts import ModelFacts, ModelSource
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.sampling import SamplingDefaults
from mgpu.protocol.model.shared_memory_layout import orders_stores, shared_layout

WORKER_COMMAND = (sys.executable, "-m", "mgpu.worker")
GATEWAY_COMMAND = (sys.executable, "-m", "mgpu.orchestrator.gateway")
HTTP_COMMAND = (sys.executable, "-m", "mgpu.orchestrator.http")
GPU_SPIN_S = 0.002
_SHARED = {"shared-memory", "peer", "pinned"}


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the parts of a server wait for each other."""

    drain_timeout_s: float = 30.0
    """What running requests get after SIGTERM."""
    worker_timeout_s: float = 120.0
    """How long a worker waits for its peers."""
    hang_timeout_s: float = 10.0
    """Least time that a step gets before the workers count as hung; see engine/step_times.py."""
    start_timeout_s: float = 1800.0
    """Longest start-up without any progress."""
    gateway_timeout_s: float = 10.0
    """Longest silence of the gateway. Clients give up after 15 s, so it must be replaced before that."""
    gateway_start_timeout_s: float = 60.0
    """Longest start of a gateway that replaces another; it reads the tokenizer."""
    resume_timeout_s: float = 30.0
    """How long a new gateway waits for clients to come back before their requests end."""
    stop_timeout_s: float = 10.0
    """What all processes get to end by themselves."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often failed processes are replaced, and how soon."""

    max_restarts: int = 3
    """Restarts of the workers, and of the gateway, within ``restart_window_s``; one more ends the server."""
    restart_window_s: float = 600.0
    standby: bool = False
    """Keep processes of the next epoch that have imported torch; see processes/standby.py."""
    standby_delay_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """A model, its layout and the limits of one server."""

    model: ModelSource
    facts: ModelFacts
    model_name: str
    layout: Layout
    layout_table: str
    """For people: the start-up log and the API show it."""
    limits: StepLimits
    device_kind: Literal["cpu", "cuda"]
    memory_fraction: float
    kv_memory: int
    """KV bytes per worker; 0: each worker measures what is free (CUDA) or takes the default (CPU)."""
    prefix_cache: bool
    seed: int
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How requests are sampled that do not say."""
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    num_threads: int = 0
    """CPU threads per worker; 0: what `threads_per_worker` chooses."""
    bind: str = ""
    """Front endpoint; empty: an ipc socket in the private runtime directory."""
    keys: ServerKeys | None = None
    """None: tcp is for the loopback only."""
    own_pair: tuple[bytes, bytes] | None = field(default=None, repr=False)
    """With keys: the public and the secret key with which the HTTP process connects to the front channel."""
    max_request_bytes: int = 1 << 20
    gateway_memory_bytes: int = 0
    """What the gateway may grow by before it is replaced; see gateway/memory_limit.py."""
    client_limits: ClientLimits = field(default_factory=ClientLimits)
    http: HttpOptions = field(default_factory=HttpOptions)
    logs_requests: bool = False
    """Log a line for each request that ends."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    restarts: Restarts = field(default_factory=Restarts)
    worker_envs: tuple[dict[str, str], ...] = ()
    """Per rank: added to the worker's environment, such as CUDA_VISIBLE_DEVICES; empty: nothing."""
    worker_kv_memory: tuple[int, ...] = ()
    """Per rank: as ``kv_memory``; empty: that of all."""
    worker_devices: tuple[str, ...] = ()
    """Per rank: the device under that environment, ``cpu`` or ``cuda:N``; empty: the placement's ordinals."""
    worker_cpus: tuple[frozenset[int], ...] = ()
    """Per rank: the processors next to its GPU, which it runs on; empty: any."""
    gpu_uuids: Mapping[int, str] = field(default_factory=dict)
    """The GPUs in use, by ordinal; the parent asks the driver for their memory."""
    worker_command: tuple[str, ...] = WORKER_COMMAND
    gateway_command: tuple[str, ...] = GATEWAY_COMMAND
    http_command: tuple[str, ...] = HTTP_COMMAND

    def worker_spec(self, epoch: int, rank: int) -> WorkerSpec:
        """Return what a worker needs to know wherever it runs; its group adds how it meets the others."""
        return WorkerSpec(
            epoch=epoch,
            model=self.model,
            facts=self.facts,
            layout=self.layout,
            limits=self.limits,
            device=self.device_kind,
            endpoint="",
            rendezvous="",
            shared_fd=-1,
            shared_bytes=0,
            num_threads=self.num_threads,
            memory_fraction=self.memory_fraction,
            kv_memory=self.worker_kv_memory[rank] if self.worker_kv_memory else self.kv_memory,
            seed=self.seed,
            worker_timeout_s=self.timeouts.worker_timeout_s,
        )

    @property
    def spin_s(self) -> float:
        """How long the engine looks for a thing that is due before it sleeps; see engine/polling.py."""
        return GPU_SPIN_S if self.device_kind == "cuda" else 0.0

    @property
    def threads_per_worker(self) -> int:
        """As configured; else the usable cores shared out on the CPU.

        Beside GPUs torch's default (0), which does not know of a quota of CPU time: under one, the same share.
        """
        if self.num_threads:
            return self.num_threads
        cores = len(os.sched_getaffinity(0))
        usable = usable_cpus(cores)
        if self.device_kind != "cpu" and usable == cores:
            return 0
        return max(1, usable // self.layout.placement.world_size)

    def threads_of(self, rank: int) -> int:
        """Return the CPU threads of a worker.

        Beside GPUs those that compute on the CPU, a part of the layers or only experts, share all cores but one for
        each GPU. Workers on GPUs with experts leave one more for each, since they and the engine look for results
        without a pause: a thread that lost its core would make all others wait.
        """
        if self.num_threads or self.device_kind == "cpu" or not self._computes_on_cpu(rank):
            return self.threads_per_worker
        ranks = range(self.layout.placement.world_size)
        computing = sum(map(self._computes_on_cpu, ranks))
        gpus = sum(self.device_of(other) != "cpu" for other in ranks)
        cpus = self.worker_cpus[rank] if self.worker_cpus else frozenset()
        busy = gpus * (1 if self.device_of(rank) == "cpu" else 2)
        threads = (usable_cpus(len(os.sched_getaffinity(0))) - busy) // computing
        return max(1, min(threads, len(cpus) or threads))

    def _computes_on_cpu(self, rank: int) -> bool:
        layout = self.layout
        return self.device_of(rank) == "cpu" or bool(layout.cpu_experts_of(layout.placement.place_of(rank).stage_index))

    @property
    def shared_bytes(self) -> int:
        """Size of the memory that all ranks map; 0 when the transports need none."""
        layout = self.layout
        is_shared = bool({layout.transport, layout.stage_transport} & _SHARED)
        # Kernels pass activations on through it, and add up where GPUs do not reach each other, beside any transport.
        has_kernels = self.device_kind == "cuda" and orders_stores()
        if layout.placement.world_size == 1 or not (is_shared or has_kernels):
            return 0
        return shared_layout(layout, self.limits, self.facts.hidden_size).total_bytes

    def device_of(self, rank: int) -> str:
        if self.worker_devices:
            return self.worker_devices[rank]
        return "cpu" if self.device_kind == "cpu" else f"cuda:{self.layout.placement.place_of(rank).device}"
