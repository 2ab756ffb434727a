"""Say which path is meant by one that does not exist."""

import difflib
from collections.abc import Iterable

_ELSEWHERE = {
    "/generate": "/v1/completions",
    "/generate_stream": "/v1/completions",
    "/completion": "/v1/completions",
    "/api/generate": "/v1/completions",
    "/api/chat": "/v1/chat/completions",
    "/chat": "/v1/chat/completions",
    "/infill": "/v1/completions",
    "/api/tags": "/v1/models",
    "/slots": "/status",
    "/stats": "/status",
    "/healthz": "/health",
    "/livez": "/health/live",
    "/readyz": "/health/ready",
    "/docs": "/openapi.json",
    "/api/version": "/version",
}
"""Paths of other servers, and what has their work here."""
_LACKING = ("embeddings", "rerank", "score", "audio", "images", "files", "batches", "fine_tuning", "assistants")
_LONGEST = 80


def unknown_path(path: str, known: Iterable[str]) -> str:
    """Return the text of a 404 for ``path``. ``known`` are the paths that exist."""
    paths = [each for each in known if "{" not in each and each != "/"]
    return f"there is no such path; {_hint(path.rstrip('/'), paths)}GET /openapi.json lists what there is"


def _hint(path: str, paths: list[str]) -> str:
    if path == "/v1":
        return "this is the base URL for clients of OpenAI's API: they add the rest. "
    if any(path.startswith(f"/v1/{each}") for each in _LACKING):
        return f"this server generates text and has no {path[4:].partition('/')[0]}. "
    if f"/v1{path}" in paths:
        return f"did you mean /v1{path}? A base URL for clients of OpenAI's API ends in /v1. "
    if path.startswith("/v1/v1/") and path[3:] in paths:
        return f"did you mean {path[3:]}? The base URL has /v1 twice, or the client adds it by itself. "
    close = difflib.get_close_matches(path, paths, n=1) if len(path) <= _LONGEST else []
    near = [_ELSEWHERE[path]] if path in _ELSEWHERE else close
    return f"did you mean {near[0]}? " if near else ""
