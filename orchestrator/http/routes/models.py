"""GET /v1/models and /v1/models/{name}."""

from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import HttpError
from mgpu.orchestrator.http.routes.call import Call


async def models(call: Call) -> ASGIApp:
    """List what is served: the one model."""
    return call.json({"object": "list", "data": await _described(call)})


async def model(call: Call) -> ASGIApp:
    """Describe the model, if it is the one that is served."""
    return call.json(await checked_model(call, call.request.path_params["name"]))


async def checked_model(call: Call, name: str | None) -> dict[str, Any]:
    """Return the model that is served. HttpError if ``name`` is another one; None: the client has not said."""
    [described] = await _described(call)
    if name is None or described["id"] == name:
        return described
    raise HttpError(
        404, f"model {name[:80]!a} is not served here; this server has {described['id']!r}",
        code="model_not_found", param="model",
    )  # fmt: skip


async def _described(call: Call) -> list[dict[str, Any]]:
    return [
        {
            "id": each["name"],
            "object": "model",
            "created": call.served.started_s,
            "owned_by": "mgpu",
            "root": each["name"],
            "parent": None,
            "max_model_len": each["max_seq_len"],
        }
        for each in await call.client.models()
    ]
