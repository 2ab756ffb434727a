"""Who may connect to the front channel, and as whom."""

import os
from collections.abc import Iterator

import pytest
import zmq

from mgpu.orchestrator.gateway.front.access import DOMAIN, AccessControl, _describe, identify
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.protocol.keys import fingerprint

ALICE, MALLORY = b"a" * 32, b"m" * 32


def question(address: str, domain: bytes = DOMAIN, mechanism: bytes = b"NULL", *credentials: bytes) -> list[bytes]:
    return [b"1.0", b"7", domain, address.encode(), b"", mechanism, *credentials]


def with_key(address: str, *credentials: bytes) -> list[bytes]:
    return question(address, DOMAIN, b"CURVE", *credentials)


@pytest.mark.parametrize(("address", "identity"), [
    (f"localhost:{os.getuid()}:0:1", f"uid:{os.getuid()}"), ("localhost:0:0:1", "uid:0"), ("127.0.0.1", ""),
    ("127.8.8.8", ""), ("::1", ""),
])  # fmt: skip
def test_own_processes_root_and_the_loopback_may(address: str, identity: str) -> None:
    assert identify(question(address), None) == identity


@pytest.mark.parametrize("asked", [
    question(f"localhost:{os.getuid() + 1}:0:1"), question("localhost:-1:0:1"), question("localhost::"),
    question("192.168.1.5"), question("12.7.0.1"), question(""), question("127.0.0.1", domain=b"other"),
    question("127.0.0.1", mechanism=b"PLAIN"), with_key("127.0.0.1", ALICE), [b"2.0", *question("127.0.0.1")[1:]], [],
])  # fmt: skip
def test_others_may_not(asked: list[bytes]) -> None:
    assert identify(asked, None) is None


@pytest.mark.parametrize("address", ["127.0.0.1", "192.168.1.5", "2001:db8::7"])
def test_with_keys_a_listed_key_may_come_from_anywhere(address: str) -> None:
    assert identify(with_key(address, ALICE), {ALICE}) == f"key:{fingerprint(ALICE)}"


@pytest.mark.parametrize("asked", [
    with_key("127.0.0.1", MALLORY), with_key("127.0.0.1", b""), with_key("127.0.0.1"),
    with_key("127.0.0.1", ALICE, ALICE), question("127.0.0.1"), question("127.0.0.1", DOMAIN, b"NULL", ALICE),
    question("127.0.0.1", DOMAIN, b"PLAIN", ALICE),
])  # fmt: skip
def test_with_keys_nobody_else_may_not_even_from_the_loopback(asked: list[bytes]) -> None:
    assert identify(asked, {ALICE}) is None


def test_keys_do_not_close_ipc_to_the_own_user() -> None:
    assert identify(question(f"localhost:{os.getuid()}:0:1"), {ALICE}) == f"uid:{os.getuid()}"


@pytest.fixture
def access() -> Iterator[AccessControl]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control = AccessControl(context, {ALICE}, own_key=MALLORY)
    yield control
    control.close()
    context.term()


def test_the_clients_that_the_own_http_process_names_are_believed(access: AccessControl) -> None:
    """It has the key that was made for it; on ipc it is a child of the parent of this process, as this process is."""
    own_key = f"key:{fingerprint(MALLORY)}"
    assert access.client_of("alice", own_key, own_key) == "http:alice"
    assert access.client_of("alice", "uid:0", f"pid:{os.getpid()}") == "http:alice"
    assert access.client_of("", own_key, own_key) == ""


@pytest.mark.parametrize("owner", ["pid:1", "pid:0", "pid:999999999", "127.0.0.1", ""])
def test_the_clients_that_others_name_are_parts_of_their_share(access: AccessControl, owner: str) -> None:
    assert access.client_of("http:alice", "", owner) == "client:http:alice"
    with pytest.raises(Refusal, match="a key is an account of its own"):
        access.client_of("alice", f"key:{fingerprint(ALICE)}", owner)


@pytest.mark.parametrize(("asked", "words"), [
    (question("192.168.1.5"), "192.168.1.5"),
    (question("192.168.1.5", DOMAIN, b"CURVE"), "192.168.1.5"),
    (question("192.168.1.5", DOMAIN, b"PLAIN", b"x" * 32), "192.168.1.5"),
    (with_key("192.168.1.5", b"short"), "192.168.1.5"),
    (with_key("192.168.1.5", MALLORY), f"192.168.1.5: key {fingerprint(MALLORY)} is not on the list"),
    (with_key("192.168.1.5", MALLORY, b"more"), "192.168.1.5"),
    (question("evil\nline"), "evil\\nline"),
    ([b"1.0", b"7"], "nowhere"), ([], "nowhere"),
])  # fmt: skip
def test_any_refused_peer_is_named_in_one_line(asked: list[bytes], words: str) -> None:
    assert _describe(asked) == words
