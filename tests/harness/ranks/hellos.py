"""What agents say, for tests of who may join."""

from dataclasses import replace
from typing import Any

from mgpu.orchestrator.hosts.roster import Expected, Roster
from mgpu.protocol.internal.host_messages import Hello, RankDevice
from mgpu.protocol.model.fingerprint import ModelPrint

MODEL = ModelPrint("/models/a", "config-1", "tensors-1")
EXPECTED = Expected("head", "1.0", "abc", replace(MODEL, path="/srv/a"), needs_weights=True)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def hello(rank: int, **changes: Any) -> Hello:
    """Return what the only rank of host ``rank`` says, of two hosts."""
    usual = Hello(
        rank=rank, world_size=2, local_rank=0, node=str(rank), host=f"host-{rank}", pid=1000 + rank,
        incarnation=bytes([rank] * 8), version="1.0", commit="abc", model=MODEL,
        device=RankDevice("cpu", "CPU", 16 << 30, 8 << 30), master="10.0.0.1:29500", address=f"10.0.0.{rank + 1}",
    )  # fmt: skip
    return replace(usual, **changes)


def roster(nodes: int = 2, **changes: Any) -> tuple[Roster, Clock]:
    """Return an empty roster, and its clock."""
    clock = Clock()
    return Roster(nodes, replace(EXPECTED, **changes), silence_s=10.0, clock_s=clock), clock
