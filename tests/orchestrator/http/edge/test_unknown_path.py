"""What the 404 of a path says that is nearly one of this server's, or another server's."""

import pytest

from mgpu.orchestrator.http.app import PATHS
from mgpu.orchestrator.http.edge.unknown_path import _ELSEWHERE, unknown_path

KNOWN = [each.path for each in PATHS]


@pytest.mark.parametrize(("path", "said"), [
    ("/chat/completions", "did you mean /v1/chat/completions? A base URL for clients of OpenAI's API ends in /v1."),
    ("/models", "did you mean /v1/models? A base URL"), ("/v1/v1/models", "did you mean /v1/models? The base URL has"),
    ("/v1/completion", "did you mean /v1/completions?"), ("/v1/chat/completion/", "did you mean /v1/chat/completions?"),
    ("/v1", "this is the base URL"), ("/v1/", "this is the base URL"),
    ("/api/chat", "did you mean /v1/chat/completions?"),
    ("/v1/embeddings", "generates text and has no embeddings."), ("/v1/audio/speech", "has no audio."),
    ("/metric", "did you mean /metrics?"), ("/wp-login.php", "there is no such path; GET /openapi.json"),
    pytest.param("/v1/completions" * 9000, "there is no such path; GET /openapi.json", id="long"),
])  # fmt: skip
def test_a_path_that_does_not_exist_names_the_one_that_is_meant(path: str, said: str) -> None:
    found = unknown_path(path, KNOWN)
    assert said in found
    assert found.endswith("GET /openapi.json lists what there is")


def test_paths_of_other_servers_lead_to_paths_that_exist() -> None:
    assert set(_ELSEWHERE.values()) <= set(KNOWN)
    assert not set(_ELSEWHERE) & set(KNOWN)
