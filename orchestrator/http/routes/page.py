"""GET / and /page/NAME: the page for people, static files that ask only this server."""

from importlib import resources

from starlette.responses import Response
from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import HttpError
from mgpu.orchestrator.http.routes.call import Call

INDEX = "index.html"
HEADERS = {
    # Nothing from elsewhere is loaded or run, whatever a model writes; nobody frames the page or changes its addresses.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}


def _read() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("mgpu.orchestrator.http") / "page"
    files = [each for each in folder.iterdir() if each.is_file()]
    return {
        file.name: (file.read_bytes(), kind)
        for file in files
        for end, kind in _TYPES.items()
        if file.name.endswith(end)
    }


FILES = _read()
"""Content and type by name: what is not in it cannot be asked for."""


async def page(call: Call) -> ASGIApp:
    """Return a file of the page."""
    name = call.request.path_params.get("name", INDEX)
    if name not in FILES:
        raise HttpError(404, "the page has no such file", code="not_found")
    content, kind = FILES[name]
    return Response(content, 200, {**HEADERS, **call.headers}, kind)
