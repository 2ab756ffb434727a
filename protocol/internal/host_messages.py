"""Messages between the orchestrator and the hosts that an outside launcher starts (torchrun, srun, Kubernetes).

On every host one small process for each rank, the agent (`worker/start/join/agent.py`), says `Hello` once a second:
what it is, and which worker it runs. The orchestrator answers with `Orders`: in which epoch a worker should run here.
Both repeat the whole truth, so a lost message costs a second and no state. `StartWorker` carries the spec of a worker,
which then speaks to the orchestrator by itself, over the same endpoint (worker_messages.py).

Each side measures silence by its own monotonic clock. No time of one host is compared with that of another.
"""

from dataclasses import dataclass
from typing import Literal

from mgpu.protocol.internal.codec import Codec
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.fingerprint import ModelPrint

DOMAIN = b"mgpu-hosts"
"""ZAP domain of the endpoint. Without one libzmq would also accept old greetings, which encrypt nothing."""
HELLO_S = 1.0
"""Between two messages of an agent."""
HEARTBEAT_MS = 2000
"""Between the heartbeats with which libzmq itself finds that a connection is dead."""
RECONNECT_MS = 2000
"""Longest pause before libzmq connects again."""
CONNECT_MS = 4000
"""How long one attempt to connect may take. The kernel alone would try for minutes on a link that is cut."""


@dataclass(frozen=True, slots=True)
class RankDevice:
    """The device that a rank has on its host."""

    kind: Literal["cpu", "cuda"]
    name: str
    total_bytes: int
    free_bytes: int
    uuid: str = ""
    capability: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """Who an agent is. The whole of it is sent again and again."""

    rank: int
    world_size: int
    local_rank: int
    node: str
    """Tells the hosts of a launcher apart: its node number, else the host's name."""
    host: str
    pid: int
    incarnation: bytes
    """Random, so that a process that was started again is not taken for the one before."""
    version: str
    commit: str
    """Of the checkout that mgpu runs from; empty: it is installed, or git does not answer."""
    model: ModelPrint
    device: RankDevice
    master: str
    """MASTER_ADDR:MASTER_PORT of the launcher; empty: it names none."""
    address: str
    """Address of this host on the way to the orchestrator."""
    epoch: int = -1
    """Of the worker that runs here; -1: none."""

    @property
    def name(self) -> str:
        """Who this is, for people."""
        return f"rank {self.rank} on host {self.host} (process {self.pid})"


@dataclass(frozen=True, slots=True)
class Orders:
    """What the orchestrator wants of an agent now."""

    epoch: int
    """Of the worker that should run here; -1: none. One of another epoch is killed."""
    silence_s: float
    """Who is silent for so long counts as lost."""
    wants_stacks: bool = False
    """A worker that is killed writes its stacks first."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker. The agent fills in what its own host knows: the model's place, the device, threads and keys."""

    spec: WorkerSpec
    rank: int
    """Of the plan; the launcher may count in another order."""
    master: str
    """ADDRESS:PORT where the ranks meet."""


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """The worker of an epoch has ended."""

    epoch: int
    status: int
    """Exit status; negative: the number of the signal that killed it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """This agent cannot take part; it ends with the text as its error."""

    text: str


@dataclass(frozen=True, slots=True)
class Leave:
    """The server has ended."""

    text: str
    """Why, if it failed; empty: it was stopped."""


HOSTS = Codec(Hello, Orders, StartWorker, WorkerEnded, Refused, Leave)
"""Encoder and decoder of what agents and the orchestrator say."""
_AGENT, _WORKER = b"a", b"w"


def agent_identity(incarnation: bytes) -> bytes:
    """Return the routing id of an agent's socket."""
    return _AGENT + incarnation


def worker_identity(incarnation: bytes, epoch: int) -> bytes:
    """Return the routing id of the socket of an agent's worker in an epoch."""
    return _WORKER + incarnation + epoch.to_bytes(4, "little")


def is_agent(identity: bytes) -> bool:
    """Return True for the routing id of an agent, False for that of a worker."""
    return identity.startswith(_AGENT)
