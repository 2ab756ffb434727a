"""Serve one large language model on one machine with several GPUs.

The package holds four parts, each a folder at the root of the repository: ``protocol`` (what
crosses a process), ``orchestrator`` (the parent), ``worker`` (one per GPU) and ``launch`` (the
command line). Importing ``mgpu`` is light: neither torch nor tokenizers are loaded, and the
clients only when they are asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgpu.protocol.client.async_client import AsyncClient
    from mgpu.protocol.client.client import Client
    from mgpu.protocol.client.results import Completion
    from mgpu.protocol.errors import DeadlineExceeded, MgpuError, RequestFailed, ServerUnreachable

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "MgpuError",
    "RequestFailed",
    "ServerUnreachable",
]

_HOMES = {
    "AsyncClient": "mgpu.protocol.client.async_client",
    "Client": "mgpu.protocol.client.client",
    "Completion": "mgpu.protocol.client.results",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES.get(name, "mgpu.protocol.errors")), name)
    globals()[name] = value
    return value
