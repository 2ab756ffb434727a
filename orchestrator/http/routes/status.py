"""GET /status: the state of the server and its counters in JSON, for the page."""

import asyncio
import math

from starlette.types import ASGIApp

from mgpu.orchestrator.http.routes.call import Call
from mgpu.orchestrator.http.routes.health import ASK_S
from mgpu.protocol.errors import MgpuError

_HEALTH = (
    "state", "model", "version", "layout", "max_seq_len", "kv_tokens", "uptime_s", "in_flight", "running", "waiting",
    "restarts", "last_recovery_s", "connections",
)  # fmt: skip


async def status(call: Call) -> ASGIApp:
    """Return state, layout, queue, recoveries and counters; only the state while the server cannot be asked."""
    body: dict[str, object] = {"state": "unreachable"}
    stats: dict[str, float] = {}
    try:
        async with asyncio.timeout(ASK_S):
            health = await call.client.health()
            body = {name: getattr(health, name) for name in _HEALTH}
            stats = dict(await call.client.stats())
    except (MgpuError, TimeoutError):
        pass  # what is known by now is the answer
    counters = {name: value for name, value in stats.items() if "_le_" not in name and math.isfinite(value)}
    return call.json({**body, "stats": counters})
