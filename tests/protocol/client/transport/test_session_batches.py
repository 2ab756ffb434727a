"""A session that reads several messages at once says so on each connection, to servers of any version."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.scripted_server import ScriptedServer
from harness.waiting import eventually
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.session import Session
from mgpu.protocol.front import framing

REQUEST = {"type": "generate", "id": 1, "prompt": "x"}
ACCEPTED = {"type": "accepted", "id": 1, "model": "m", "prompt_tokens": 1, "max_tokens": 5, "seed": 0}
TOKENS = {"type": "tokens", "id": 1, "index": 0, "text": "a", "token_ids": [97], "finish_reason": "stop"}
FINISHED = {
    "type": "finished", "id": 1, "finish_reasons": ["stop"], "prompt_tokens": 1, "completion_tokens": 1,
    "cached_tokens": 0,
}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def session(server: ScriptedServer) -> Iterator[Session]:
    session = Session(server.endpoint, None, takes_batches=True)
    eventually(lambda: session.receive() and session.channel.is_connected)
    yield session
    session.close()


def finish(server: ScriptedServer, session: Session, *bodies: bytes) -> ResumableRequest:
    """Begin a request, answer it with these messages, and return it once it has ended."""
    request = ResumableRequest(REQUEST)
    session.begin(request)
    assert server.hear()["type"] == "generate"
    for body in bodies:
        server.send(framing.VERSION, body)
    eventually(lambda: session.receive() and request.has_ended)
    return request


def test_an_array_is_read_as_its_messages(server: ScriptedServer, session: Session) -> None:
    assert server.hear()["type"] == "batch"
    whole = framing.batch_of([framing.pack(each)[1] for each in (ACCEPTED, TOKENS, FINISHED)])
    assert finish(server, session, whole).answer.completion().text == "a"


def test_a_server_that_does_not_know_it_goes_on_as_before(server: ScriptedServer, session: Session) -> None:
    number = server.hear()["id"]
    refused = {"type": "failed", "id": number, "code": "bad_request", "message": "type must be one of …"}
    bodies = [framing.pack(each)[1] for each in (refused, ACCEPTED, TOKENS, FINISHED)]
    assert finish(server, session, *bodies).answer.completion().text == "a"


def test_an_ordinary_session_does_not_ask_for_it(server: ScriptedServer) -> None:
    session = Session(server.endpoint, None)
    eventually(lambda: session.receive() and session.channel.is_connected)
    session.begin(ResumableRequest(REQUEST))
    assert server.hear()["type"] == "generate"
    session.close()
