"""Messages between the process of `serve --replicas` and that of its router."""

from dataclasses import dataclass, field

from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.codec import Codec
from mgpu.protocol.internal.gateway_messages import ServerKeys


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """The configuration of the router. It comes on standard input, whose end means that the parent is gone."""

    bind: str
    keys: ServerKeys | None
    own_key: bytes
    """Public key of the HTTP process, which speaks for several clients; empty where there are no keys."""
    replica_keys: str
    """Key file for replicas on tcp; empty: they need none, or there are none."""
    report_fd: int
    """Inherited descriptor of the pipe for `RouterReport`."""
    limits: ClientLimits | None = None
    """Of each account, on all replicas together; None: the replicas alone have limits."""


@dataclass(frozen=True, slots=True)
class KnownReplica:
    """A server behind the router."""

    name: str
    endpoint: str
    """Empty: it is not there; its requests go on elsewhere."""
    is_held: bool = False
    """It gets no new requests."""


@dataclass(frozen=True, slots=True)
class RouterOrders:
    """Which replicas there are now, and what else clients are to be told."""

    replicas: list[KnownReplica]
    state: str = ""
    """``draining`` or ``stopped``; empty: that of the replicas."""
    counters: dict[str, float] = field(default_factory=dict)
    number: int = 0
    """Which order of its process this is."""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What the router knows of one replica."""

    name: str
    state: str
    requests: int
    problem: str = ""
    """Why it gets no requests, and what to do about it; empty if that is not known, or it does get some."""


@dataclass(frozen=True, slots=True)
class RouterReport:
    """Told several times a second; silence means that the router hangs."""

    endpoint: str
    """What clients connect to."""
    model: str
    requests: int
    replicas: list[ReplicaReport]
    number: int = 0
    """Of the last order that it follows."""


ROUTER_LINK = Codec(RouterSpec, RouterOrders, RouterReport)
