"""Who may use the HTTP server: API keys, browsers, and what belongs to a key."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess
from harness.servers.http_client import ask
from harness.servers.http_process import HttpServer
from harness.waiting import eventually
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import Reload, ServerKeys
from mgpu.protocol.internal.http_spec import ApiKey
from mgpu.protocol.keys import key_text, new_pair

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def key(name: str) -> ApiKey:
    return ApiKey(name, sha256(secret(name).encode()).digest())


def secret(name: str) -> str:
    return f"sk-0123456789-{name}"


def bearer(name: str) -> str:
    return f"Bearer {secret(name)}"


@pytest.fixture(scope="module")
def keyed(shared_gateway: GatewayProcess) -> Iterator[HttpServer]:
    with HttpServer(
        shared_gateway.endpoint, api_keys=[key("alice"), key("bob")], cors=["https://chat.example.com"]
    ) as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": secret("alice")},
        {"authorization": f"Basic {secret('alice')}"},
        {"x-api-key": "wrong"},
        {"authorization": bearer("alice") + "x"},
    ],
)
def test_without_a_right_key_nothing_is_served(keyed: HttpServer, headers: dict[str, str]) -> None:
    for answer in (keyed.get("/v1/models", **headers), keyed.post(CHAT, BODY, **headers), keyed.get("/x", **headers)):
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.error["code"] == "invalid_api_key"


def test_a_wrong_key_is_an_error_in_anthropics_form_too(keyed: HttpServer) -> None:
    answer = keyed.post("/v1/messages", BODY, **{"x-api-key": "wrong"})
    assert (answer.status, answer.json["type"], answer.json["error"]["type"]) == (401, "error", "authentication_error")


def test_both_ways_to_present_a_key_are_taken_and_health_needs_none(keyed: HttpServer, gateway: GatewayProcess) -> None:
    assert keyed.get("/v1/models", authorization=bearer("bob")).status == 200
    assert keyed.post(CHAT, BODY, **{"x-api-key": secret("alice")}).status == 200
    assert keyed.get("/health").status == 200


def test_each_key_is_an_account_and_shares_no_prefixes(keyed: HttpServer, gateway: GatewayProcess) -> None:
    for name in ("alice", "alice", "bob"):
        assert keyed.post(CHAT, BODY, authorization=bearer(name)).status == 200
    first, again, other = gateway.engine.submits
    assert (first.account, first.cache_salt) == (again.account, again.cache_salt)
    assert first.account[0] != other.account[0], "a key is an owner"
    assert first.cache_salt != other.cache_salt


def test_without_keys_each_connection_is_an_account_and_prefixes_are_shared(
    http: HttpServer, gateway: GatewayProcess
) -> None:
    for _ in range(2):
        assert http.post(CHAT, BODY).status == 200
    first, second = gateway.engine.submits
    assert first.account[:2] == second.account[:2], "they divide the share of their address"
    assert first.account != second.account
    assert first.cache_salt == second.cache_salt == b""


def test_other_keys_are_used_at_once_after_a_reload(shared_gateway: GatewayProcess) -> None:
    with HttpServer(shared_gateway.endpoint, api_keys=[key("alice")]) as server:
        assert server.get("/v1/models", authorization=bearer("alice")).status == 200
        server.tell([key("carol")])
        eventually(lambda: server.get("/v1/models", authorization=bearer("carol")).status == 200, lambda: "refused")
        assert server.get("/v1/models", authorization=bearer("alice")).status == 401


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://evil.example", "127.0.0.1:8000", 403),
        ("http://evil.example:8000", "evil.example:8000", 403),  # a name that leads to the loopback
        ("null", "127.0.0.1:8000", 403),
        ("http://[", "127.0.0.1:8000", 403),
        ("", "127.0.0.1:8000", 403),
        ("http://localhost:8000", "localhost:8000", 200),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 200),
        ("http://[::1]:8000", "[::1]:8000", 200),
    ],
)
def test_pages_of_other_sites_may_not_use_a_server_on_the_loopback(
    http: HttpServer, origin: str, host: str, status: int
) -> None:
    assert http.post(CHAT, BODY, origin=origin, host=host).status == status


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/v1/models", "/metrics", "/status", "/health", "/openapi.json"])
def test_a_page_whose_name_leads_to_the_loopback_reads_nothing(http: HttpServer, path: str) -> None:
    answer = http.get(path, host="evil.example:8000")  # its own server, to the browser: so no origin
    assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
    assert "--http-allowed-hosts evil.example" in answer.error["message"]


def test_such_a_page_cannot_ask_the_model_either_and_gets_the_form_of_the_path(http: HttpServer) -> None:
    assert http.post(CHAT, BODY, host="evil.example").error["code"] == "host_not_allowed"
    answer = http.post("/v1/messages", BODY, host="evil.example")
    assert (answer.status, answer.json["error"]["type"]) == (403, "permission_error")


def test_with_keys_a_proxy_may_pass_on_its_own_name_and_serve_the_page(keyed: HttpServer) -> None:
    headers = {"host": "llm.example.com", "origin": "https://llm.example.com"}
    assert keyed.get("/", host="llm.example.com").status == 200
    assert keyed.post(CHAT, BODY, authorization=bearer("bob"), **headers).status == 200
    assert keyed.post(CHAT, BODY, **headers).status == 401


def test_a_listed_origin_may_and_is_told_so(keyed: HttpServer, gateway: GatewayProcess) -> None:
    origin = "https://chat.example.com"
    asked = ask(keyed.url, "OPTIONS", CHAT, headers={
        "origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization",
    })  # fmt: skip
    assert asked.status == 200
    assert asked.headers["access-control-allow-origin"] == origin
    answer = keyed.post(CHAT, BODY, origin=origin, authorization=bearer("bob"))
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert "access-control-allow-origin" not in keyed.get("/health").headers
    refused = keyed.post(CHAT, BODY, origin="https://other.example", authorization=bearer("bob"))
    assert (refused.status, refused.error["code"]) == (403, "origin_not_allowed")


def test_a_request_id_comes_back_if_it_is_harmless(http: HttpServer) -> None:
    assert http.get("/health", **{"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for harmful in ("x" * 129, 'a"b', "a b"):
        assert http.get("/health", **{"x-request-id": harmful}).headers["x-request-id"].startswith("req-")
    assert http.get("/nothing").headers["x-request-id"].startswith("req-")


def test_an_encrypted_front_channel_is_reached_with_the_servers_own_key(model_folder: Path, tmp_path: Path) -> None:
    (server_public, server_secret), (public, own_secret), (other, other_secret) = new_pair(), new_pair(), new_pair()
    file = tmp_path / "other.client"
    file.write_text(f"secret {key_text(other_secret)}\nserver {key_text(server_public)}\n")
    file.chmod(0o600)
    front = ServerKeys(server_secret, [other])
    with GatewayProcess(
        model_folder, bind="tcp://127.0.0.1:0", client_keys=file, keys=front, own_key=public
    ) as gateway:
        keys = (own_secret, public, server_public)
        with HttpServer(gateway.endpoint, front_keys=keys, api_keys=[key("alice"), key("bob")]) as server:
            for name in ("alice", "bob"):
                assert server.post(CHAT, BODY, authorization=bearer(name)).status == 200
            gateway.engine.tell(Reload([], ClientLimits()))  # the last client's key is taken away: not this one's
            gateway.engine.wait_until_told()
            assert server.post(CHAT, BODY, authorization=bearer("alice")).status == 200
        accounts = [submit.account for submit in gateway.engine.submits]
        assert accounts[0] == accounts[2] != accounts[1]
