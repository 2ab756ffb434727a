"""GET /health, /health/ready, /health/live and /version: for people, load balancers and orchestrators."""

import asyncio

from starlette.types import ASGIApp

from mgpu import __version__
from mgpu.orchestrator.http.routes.call import Call
from mgpu.protocol.errors import MgpuError

RETRY_S = "1"
ASK_S = 2.5
"""A gateway that is being replaced may be away for longer, but a probe wants to know now. The gateway reports an engine
that does not answer after 2 s."""


async def live(call: Call) -> ASGIApp:
    """Say that this process runs."""
    return call.json({"status": "live"})


async def ready(call: Call) -> ASGIApp:
    """Say whether requests are taken now: 200, or 503 while the server loads, recovers, drains or cannot be reached."""
    try:
        async with asyncio.timeout(ASK_S):
            health = await call.client.health()
    except (MgpuError, TimeoutError):
        state, model = "unreachable", None
    else:
        state, model = health.state, health.model
    is_ready = state == "ready"
    if not is_ready:
        call.headers["retry-after"] = RETRY_S
    return call.json({"status": state, "model": model}, 200 if is_ready else 503)


async def version(call: Call) -> ASGIApp:
    """Return the version of mgpu."""
    return call.json({"version": __version__})
