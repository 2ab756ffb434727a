"""Complete values in the shell: choices of options, files, models in the caches, running servers."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from mgpu.protocol.discovery import running_servers

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
_ENTRY = "models--"


def complete_choices(choices: Iterable[str]) -> Complete:
    """Return a completion of these words."""
    words = tuple(choices)
    return lambda _context, _parameter, typed: [CompletionItem(word) for word in words if word.startswith(typed)]


def complete_model(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Complete a model: the demo, models in the hub's cache, folders and files."""
    names = ["demo", *models_in_hub_cache(os.environ)]
    return [*(CompletionItem(name) for name in names if name.startswith(typed)), CompletionItem(typed, type="file")]


def complete_folder(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    return [CompletionItem(typed, type="dir")]


def complete_file(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    return [CompletionItem(typed, type="file")]


def complete_endpoint(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Complete the endpoint, or the model, of a server that runs on this machine."""
    servers = running_servers()
    items = [CompletionItem(each.endpoint, help=each.model) for each in servers]
    items += [CompletionItem(each.model, help=each.endpoint) for each in servers]
    return [item for item in items if item.value.startswith(typed)]


def models_in_hub_cache(environ: Mapping[str, str]) -> list[str]:
    """List the models whose files are in the hub's cache, without importing the hub's package."""
    found = []
    try:
        for entry in sorted(hub_cache(environ).iterdir()):
            parts = entry.name.removeprefix(_ENTRY).split("--", 1)
            if entry.name.startswith(_ENTRY) and len(parts) == 2 and any((entry / "snapshots").iterdir()):
                found.append("/".join(parts))
    except OSError:  # no cache, or one that may not be read
        pass
    return found


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder in which the hub's package keeps models."""
    if own := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(own).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"
