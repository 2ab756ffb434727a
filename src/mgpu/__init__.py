"""Serve one large language model on one machine with several GPUs.

The package holds four parts, each a folder at the root of the repository: ``protocol`` (what
crosses a process), ``orchestrator`` (the parent), ``worker`` (one per GPU) and ``launch`` (the
command line). Importing ``mgpu`` is light: neither torch nor tokenizers are loaded, and the
clients only when they are asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgpu.protocol.client.async_client import AsyncClient
    from mgpu.protocol.client.async_stream import AsyncCompletionStream
    from mgpu.protocol.client.client import Client
    from mgpu.protocol.client.requests.request_message import GenerateOptions
    from mgpu.protocol.client.requests.results import Completion, CompletionChoice, Piece, TokenLogprob, Usage
    from mgpu.protocol.client.stream import CompletionStream
    from mgpu.protocol.errors import DeadlineExceeded, MgpuError, RequestFailed, ServerStopped, ServerUnreachable
    from mgpu.protocol.front.server_messages import Health

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "AsyncCompletionStream",
    "Client",
    "Completion",
    "CompletionChoice",
    "CompletionStream",
    "DeadlineExceeded",
    "GenerateOptions",
    "Health",
    "MgpuError",
    "Piece",
    "RequestFailed",
    "ServerStopped",
    "ServerUnreachable",
    "TokenLogprob",
    "Usage",
]

_RESULTS = ("Completion", "CompletionChoice", "Piece", "TokenLogprob", "Usage")
_HOMES = {
    "AsyncClient": "mgpu.protocol.client.async_client",
    "AsyncCompletionStream": "mgpu.protocol.client.async_stream",
    "Client": "mgpu.protocol.client.client",
    "CompletionStream": "mgpu.protocol.client.stream",
    "GenerateOptions": "mgpu.protocol.client.requests.request_message",
    "Health": "mgpu.protocol.front.server_messages",
    **dict.fromkeys(_RESULTS, "mgpu.protocol.client.requests.results"),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES.get(name, "mgpu.protocol.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "protocol"})
