"""The hosts that a request may name, on the loopback and beyond it."""

from collections.abc import Sequence

import pytest

from mgpu.orchestrator.http.edge.errors import HttpError
from mgpu.orchestrator.http.edge.hosts import Hosts


def is_taken(host: str, *allowed: str, is_loopback_port: bool = True, has_keys: bool = False) -> bool:
    try:
        Hosts(allowed, is_loopback_port).check([host], has_keys)
    except HttpError:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LocalHost:8000", "localhost.", "app.localhost:3000", "127.0.0.1", "127.0.0.1:8000",
     "127.8.9.1:1", "[::1]", "[::1]:8000", ""],
)  # fmt: skip
def test_a_name_that_nobody_else_can_own_is_taken_on_the_loopback(host: str) -> None:
    assert is_taken(host)


REBOUND = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:8000", "evillocalhost",
    "10.0.0.1:8000", "0.0.0.0:8000", "[fe80::1]:8000", "[::]", "::1", "localhost@evil.example",
    "evil.example#localhost",
    "localhost:8000:9000", "localhost:x", "[::1", "\xff", " ", ":8000", ".",
]  # fmt: skip


@pytest.mark.parametrize("host", REBOUND)
def test_any_other_host_is_refused_on_the_loopback(host: str) -> None:
    assert not is_taken(host)


@pytest.mark.parametrize("host", REBOUND)
def test_with_keys_beyond_the_loopback_and_on_a_unix_socket_every_host_is_taken(host: str) -> None:
    assert is_taken(host, has_keys=True)
    assert is_taken(host, is_loopback_port=False)


def test_listed_names_are_taken_and_wherever_names_are_listed_others_are_not() -> None:
    for is_loopback_port, has_keys in ((True, False), (True, True), (False, False)):
        case = {"is_loopback_port": is_loopback_port, "has_keys": has_keys}
        for host in ("llm.example.com", "LLM.example.com:443", "localhost:8000"):
            assert is_taken(host, "llm.example.com", "other", **case)
        assert not is_taken("evil.example", "llm.example.com", **case)
        assert not is_taken("x.llm.example.com", "llm.example.com", **case)
        assert is_taken("evil.example", "*", **case)
    assert is_taken("[fe80::1]:8000", "[FE80::1]")
    assert is_taken("10.1.2.3:8000", "llm.example.com", is_loopback_port=False), "no name leads to another address"


@pytest.mark.parametrize("hosts", [("localhost", "evil.example"), ("localhost", "localhost")])
def test_two_hosts_are_no_request(hosts: Sequence[str]) -> None:
    with pytest.raises(HttpError) as error:
        Hosts((), True).check(hosts, has_keys=True)
    assert error.value.status == 400


def test_the_refusal_says_what_to_type() -> None:
    with pytest.raises(HttpError) as error:
        Hosts((), True).check(["llm.example.com:8000"], has_keys=False)
    assert (error.value.status, error.value.type, error.value.code) == (403, "permission_error", "host_not_allowed")
    assert "call it localhost or 127.0.0.1" in error.value.message
    assert error.value.message.endswith("--http-allowed-hosts llm.example.com")
