"""Read from the environment which rank an outside launcher has made of this process.

torchrun sets all of the names below ``RANK``. srun sets names of its own. A pod of a Kubernetes StatefulSet has only a
host name that ends in its number; there the manifest sets WORLD_SIZE, and MASTER_ADDR to the first pod's name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_MOST_RANKS = 4096
_START = (
    "start this command by torchrun, srun or a StatefulSet, or set RANK, WORLD_SIZE and LOCAL_RANK yourself "
    "(docs/several-hosts.md)"
)
DEFAULT_PORT = 29500
"""MASTER_PORT where a launcher names none, as torchrun's."""


class LauncherError(ValueError):
    """The environment does not say, or says wrongly, which rank this is; the text has the names and what to set."""


@dataclass(frozen=True, slots=True)
class Launched:
    """What the launcher has decided about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    """Tells the launcher's hosts apart."""
    master: str
    """ADDRESS:PORT where ranks meet; empty: the launcher names none."""


def read_launcher(environ: Mapping[str, str], host: str) -> Launched:
    """Return what the environment says. LauncherError if it is not enough, or contradicts itself."""
    rank, world_size = _rank(environ, host), _number(environ, "WORLD_SIZE", "SLURM_NTASKS", "SLURM_NPROCS")
    if rank is None or world_size is None:
        missing = "WORLD_SIZE" if rank is not None else "RANK"
        raise LauncherError(f"{missing} is not set: {_START}")
    if not 0 < world_size <= _MOST_RANKS:
        raise LauncherError(f"WORLD_SIZE={world_size}: it must be between 1 and {_MOST_RANKS}")
    if not 0 <= rank < world_size:
        raise LauncherError(f"RANK={rank} is out of range: WORLD_SIZE={world_size} has ranks 0 to {world_size - 1}")
    local_size = _number(environ, "LOCAL_WORLD_SIZE") or _first_count(environ.get("SLURM_STEP_TASKS_PER_NODE", "")) or 1
    local_rank = _number(environ, "LOCAL_RANK", "SLURM_LOCALID") or 0
    if local_rank < 0:
        raise LauncherError(f"LOCAL_RANK={local_rank} is out of range: ranks of a host count from 0")
    local_size = max(local_size, local_rank + 1)
    node = next((environ[name] for name in ("GROUP_RANK", "SLURM_NODEID") if environ.get(name)), host)
    return Launched(rank, world_size, local_rank, local_size, node, _master(environ))


def _rank(environ: Mapping[str, str], host: str) -> int | None:
    rank = _number(environ, "RANK", "SLURM_PROCID")
    if rank is None and environ.get("KUBERNETES_SERVICE_HOST") and (pod := re.fullmatch(r".*-(\d{1,6})", host)):
        return int(pod[1])
    return rank


def _master(environ: Mapping[str, str]) -> str:
    address = environ.get("MASTER_ADDR", "")
    if not address:
        return ""
    port = _number(environ, "MASTER_PORT")
    port = DEFAULT_PORT if port is None else port
    if not 0 < port < 1 << 16:
        raise LauncherError(f"MASTER_PORT={port}: a port is between 1 and 65535")
    return f"{address}:{port}"


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """Return the value of the first of these variables that is set. LauncherError if it is no number."""
    for name in names:
        if text := environ.get(name, ""):
            if not re.fullmatch(r"-?\d{1,9}", text):
                raise LauncherError(f"{name}={text[:40]!r} is not a number: {_START}")
            return int(text)
    return None


def _first_count(text: str) -> int:
    """Return how many tasks Slurm has on its first host, of a list such as ``4(x2),3``; 0 if it says nothing."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0
