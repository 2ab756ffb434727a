"""The page about a running server that `status` prints once and `top` again and again."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mgpu.protocol.client.client import Client
from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.counters import by_replica, kv_share
from mgpu.protocol.front.server_messages import Health

WIDTH = 80
_LABEL = 14
_BAR = 24
_GPU = re.compile(r"gpu(\d+)_memory_used_bytes")


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What a server says about itself. ``stats`` is empty while its engine does not answer."""

    health: Health
    stats: Mapping[str, float]


def ask(client: Client) -> ServerStatus:
    """Ask a server for its state and its counters. MgpuError when it cannot be reached."""
    health = client.health()
    try:
        return ServerStatus(health, client.stats())
    except RequestFailed:  # it starts, or its workers hang; the state says so
        return ServerStatus(health, {})


def page(status: ServerStatus) -> str:
    """Return the page: lines of at most `WIDTH` columns."""
    health, stats = status.health, status.stats
    speed = f"{_rate(stats, 'tokens_per_s')} tokens/s, {_rate(stats, 'prompt_tokens_per_s')} of prompts"
    lines = [_headline(health)]
    if stats:
        lines += [_line("speed", speed), _line("requests", _requests(stats))]
        if health.connections:
            own = f"{health.connections:,} open, {health.own_connections:,} of this client"
            lines.append(_line("connections", own))
        if health.running:
            lines.append(_line("last step", f"{health.last_step_age_s:.1f} s ago"))
        lines += [_line("KV cache", _kv_cache(health, stats)), _line("prompts", _prompts(stats)), *_gpu_lines(stats)]
        lines += _replica_lines(stats)
    else:
        lines.append(_line("", "the engine does not answer, so there are no numbers"))
    lines += [
        _line("context", f"{health.max_seq_len:,} tokens at most"),
        _line("up", f"{duration(health.uptime_s)}, mgpu {health.version or 'of an older version'}"),
        _line("restarts", _restarts(health, stats)),
    ]
    return "\n".join(line[:WIDTH] for line in lines)


def counters(status: ServerStatus) -> str:
    """Return every counter, one a line; those of replicas have their names."""
    return "\n".join(f"{name:<28} {value:,.6g}" for name, value in status.stats.items())


def duration(seconds: float) -> str:
    """Write a time span by its two largest units: 45 s, 3 min 5 s, 2 h 7 min, 4 d 2 h."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    left = int(seconds)
    parts: list[str] = []
    for size, unit in units:
        if left >= size or (parts and len(parts) < 2):
            parts.append(f"{left // size} {unit}")
            left %= size
        if len(parts) == 2:
            break
    return " ".join(parts) or "0 s"


def _headline(health: Health) -> str:
    room = WIDTH - _LABEL - 1
    return f"{health.state.upper():<{_LABEL}} {health.model if len(health.model) <= room else _cut(health.model, room)}"


def _cut(text: str, width: int) -> str:
    return text[: width - 1] + "…"


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}} {text}"


def _rate(stats: Mapping[str, float], name: str) -> str:
    value = stats.get(name, 0.0)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _requests(stats: Mapping[str, float]) -> str:
    clients = int(stats.get("gateway_clients", 0))
    return (
        f"{int(stats.get('running', 0)):,} running, {int(stats.get('waiting', 0)):,} waiting, of {clients:,} "
        f"client{'' if clients == 1 else 's'}; {int(stats.get('finished', 0)):,} finished"
    )


def _kv_cache(health: Health, stats: Mapping[str, float]) -> str:
    return f"{_bar(kv_share(stats))} of {health.kv_tokens:,} tokens"


def _prompts(stats: Mapping[str, float]) -> str:
    total = stats.get("prompt_tokens", 0)
    found = stats.get("prefix_hit_tokens", 0) / max(1, total)
    return f"{total:,.0f} tokens so far, {found:.0%} of them found in the KV cache"


def _gpu_lines(stats: Mapping[str, float]) -> Iterator[str]:
    for ordinal in sorted(int(match[1]) for match in map(_GPU.fullmatch, stats) if match):
        used, total = (stats[f"gpu{ordinal}_memory_{what}_bytes"] for what in ("used", "total"))
        yield _line(f"GPU {ordinal}", f"{_bar(used / max(1, total))} {used / 2**30:.1f} of {total / 2**30:.1f} GiB")


def _replica_lines(stats: Mapping[str, float]) -> Iterator[str]:
    for name, own in by_replica(stats).items():
        state = "ready" if own.get("ready") else "takes no requests"
        numbers = f"{_rate(own, 'tokens_per_s')} tokens/s, {own.get('requests', 0.0):,.0f} requests"
        yield _line(name, f"{state}, {numbers}, {kv_share(own):.0%} of its KV cache")
        yield from (_line("", line) for line in _gpu_lines(own))


def _bar(share: float) -> str:
    return f"[{'#' * round(min(share, 1.0) * _BAR):<{_BAR}}] {share:4.0%}"


def _restarts(health: Health, stats: Mapping[str, float]) -> str:
    last = f" (the last took {health.last_recovery_s:.1f} s)" if health.restarts else ""
    return f"{health.restarts} of the workers{last}, {int(stats.get('gateway_restarts', 0))} of the gateway"
