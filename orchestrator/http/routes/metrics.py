"""GET /metrics: the server's counters for Prometheus."""

from starlette.responses import Response
from starlette.types import ASGIApp

from mgpu.orchestrator.http.routes.call import Call
from mgpu.orchestrator.http.routes.prometheus import CONTENT_TYPE, render
from mgpu.protocol.errors import MgpuError


async def metrics(call: Call) -> ASGIApp:
    """Return all counters. While the server cannot be asked, the page says only that it is not ready."""
    model, state, stats = "", "unreachable", {}
    try:
        health = await call.client.health()
        model, state = health.model, health.state
        stats = dict(await call.client.stats())
    except MgpuError:
        pass
    return Response(render(model, state, stats), 200, call.headers, CONTENT_TYPE)
