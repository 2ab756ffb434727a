"""tcp with keys: who gets in, who is refused and told why, and what is kept apart between keys."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from harness.servers.gateway_process import DEADLINE_S, GatewayProcess, assert_serves
from harness.servers.raw_peer import read_until_closed
from harness.waiting import eventually
from mgpu import Client, RequestFailed
from mgpu.protocol.errors import ServerUnreachable
from mgpu.protocol.front import framing
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import Reload, ServerKeys
from mgpu.protocol.keys import KEYS_VARIABLE, fingerprint, key_text, new_pair

SERVER_PUBLIC, SERVER_SECRET = new_pair()
NAMES = ("alice", "bob", "mallory")
PAIRS = {name: new_pair() for name in NAMES}


def key_file(folder: Path, name: str, server: bytes = SERVER_PUBLIC) -> Path:
    path = folder / f"{name}.client"
    path.touch(0o600)
    path.write_text(f"# {name}\nsecret {key_text(PAIRS[name][1])}\nserver {key_text(server)}\n")
    return path


def public(name: str) -> bytes:
    return PAIRS[name][0]


def start(model_folder: Path, folder: Path) -> GatewayProcess:
    """Start a gateway on tcp that lets alice and bob in."""
    keys = ServerKeys(SERVER_SECRET, [public("alice"), public("bob")])
    return GatewayProcess(model_folder, bind="tcp://127.0.0.1:0", keys=keys, client_keys=key_file(folder, "alice"))


@pytest.fixture
def keyed(model_folder: Path, tmp_path: Path) -> Iterator[GatewayProcess]:
    with start(model_folder, tmp_path) as gateway:
        yield gateway


def test_a_listed_key_gets_in_by_argument_and_by_environment(
    keyed: GatewayProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_serves(keyed.endpoint, keys=key_file(tmp_path, "alice"))
    monkeypatch.setenv(KEYS_VARIABLE, str(key_file(tmp_path, "bob")))
    assert_serves(keyed.endpoint)


def test_with_keys_all_addresses_can_be_bound(model_folder: Path, tmp_path: Path) -> None:
    keys, alice = ServerKeys(SERVER_SECRET, [public("alice")]), key_file(tmp_path, "alice")
    with GatewayProcess(model_folder, bind="tcp://*:0", keys=keys, client_keys=alice) as gateway:
        port = gateway.endpoint.removeprefix("tcp://0.0.0.0:")
        assert_serves(f"tcp://127.0.0.1:{port}", keys=alice)


def test_an_unlisted_key_is_refused_at_once_and_logged_by_its_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    gateway, started_s = start(model_folder, tmp_path), time.monotonic()
    try:
        with pytest.raises(
            ServerUnreachable, match=f"{fingerprint(public('mallory'))}: it is not on the server's list"
        ):
            Client(gateway.endpoint, keys=key_file(tmp_path, "mallory"), connect_timeout_s=DEADLINE_S)
        assert time.monotonic() - started_s < DEADLINE_S / 2
    finally:
        log = gateway.close()
    assert f"refused a connection from 127.0.0.1: key {fingerprint(public('mallory'))} is not on the list" in log
    assert key_text(public("mallory")) not in log


def test_a_client_without_a_key_is_told_to_name_one(keyed: GatewayProcess) -> None:
    with pytest.raises(ServerUnreachable, match=r"only clients with a key.*--keys"):
        Client(keyed.endpoint, connect_timeout_s=DEADLINE_S)


def test_a_client_that_knows_another_server_key_is_told_so(keyed: GatewayProcess, tmp_path: Path) -> None:
    other = public("mallory")
    with pytest.raises(ServerUnreachable, match=f"its key is probably not {fingerprint(other)}"):
        Client(keyed.endpoint, keys=key_file(tmp_path, "alice", server=other), connect_timeout_s=1.0)


def test_a_key_for_a_server_without_keys_is_told_to_be_left_out(model_folder: Path, tmp_path: Path) -> None:
    with (
        GatewayProcess(model_folder, bind="tcp://127.0.0.1:0") as gateway,
        pytest.raises(ServerUnreachable, match="has no keys"),
    ):
        Client(gateway.endpoint, keys=key_file(tmp_path, "alice"), connect_timeout_s=DEADLINE_S)


def test_a_key_is_not_used_on_ipc(model_folder: Path, tmp_path: Path) -> None:
    keys, mallory = ServerKeys(SERVER_SECRET, [public("alice")]), key_file(tmp_path, "mallory")
    with GatewayProcess(model_folder, keys=keys) as gateway, Client(gateway.endpoint, keys=mallory) as client:
        assert client.generate([1], max_tokens=1).token_ids == (1,)


@pytest.mark.parametrize("data", [b"\x01\x00\x0d\x00hello-forged", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256))])
def test_raw_bytes_are_not_delivered(keyed: GatewayProcess, tmp_path: Path, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(keyed.endpoint.rpartition(":")[2])), timeout=DEADLINE_S) as raw:
        raw.sendall(data)
        assert b"mgpu1" not in read_until_closed(raw)
    assert_serves(keyed.endpoint, keys=key_file(tmp_path, "alice"))


def test_prefixes_are_shared_within_a_key_only(keyed: GatewayProcess, tmp_path: Path) -> None:
    for name, salt in (("alice", ""), ("alice", ""), ("bob", ""), ("alice", "x")):
        with Client(keyed.endpoint, keys=key_file(tmp_path, name)) as client:
            client.generate([1], max_tokens=1, cache_salt=salt)
    salts = [submit.cache_salt for submit in keyed.engine.submits]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3


def test_a_session_of_another_key_cannot_be_resumed(keyed: GatewayProcess, tmp_path: Path) -> None:
    resume = {"type": "resume", "id": 9, "offsets": [0]}
    with Client(keyed.endpoint, keys=key_file(tmp_path, "alice")) as alice:
        alice.generate([1], max_tokens=1)
        message = {**resume, "id": 1, "session": alice._session.secret}
        with Client(keyed.endpoint, keys=key_file(tmp_path, "bob")) as bob:
            assert _ask(bob, message) == "unknown_request"
        assert _ask(alice, message) == "resumed"


def _ask(client: Client, message: dict[str, object]) -> str:
    """Send a message beside the client's own requests and return the type of the answer, or its code."""
    channel = client._session.channel
    channel.send(message)
    assert channel.socket.poll(int(DEADLINE_S * 1000), zmq.POLLIN)
    answer = framing.unpack(channel.socket.recv_multipart(), framing.FROM_SERVER)
    return str(answer.get("code", answer["type"]))


def test_a_reload_ends_what_a_removed_key_runs_and_lets_in_a_new_one(keyed: GatewayProcess, tmp_path: Path) -> None:
    with (
        Client(keyed.endpoint, keys=key_file(tmp_path, "alice")) as alice,
        Client(keyed.endpoint, keys=key_file(tmp_path, "bob")) as bob,
    ):
        streams = [alice.stream([1], max_tokens=400), bob.stream([2], max_tokens=400)]
        keyed.engine.going.clear()
        keyed.engine.wait(lambda: len(keyed.engine.submits) == 2)
        keyed.engine.tell(Reload([public("bob"), public("mallory")], ClientLimits()))
        with pytest.raises(RequestFailed) as ended:
            list(streams[0])
        assert ended.value.code == "not_allowed"
        with pytest.raises(RequestFailed) as refused:
            alice.generate([1], max_tokens=1)
        assert refused.value.code == "not_allowed"
        with Client(keyed.endpoint, keys=key_file(tmp_path, "mallory")) as newcomer:
            assert newcomer.health().state == "ready"
        with pytest.raises(ServerUnreachable, match="not on the server's list"):
            Client(keyed.endpoint, keys=key_file(tmp_path, "alice"))
        keyed.engine.going.set()
        assert streams[1].completion().usage.completion_tokens == 400


def test_a_key_may_have_so_many_connections_and_others_are_not_concerned(model_folder: Path, tmp_path: Path) -> None:
    keys = ServerKeys(SERVER_SECRET, [public("alice"), public("bob")])
    alice, bob = key_file(tmp_path, "alice"), key_file(tmp_path, "bob")
    limits = ClientLimits(max_client_connections=3)
    with (
        GatewayProcess(model_folder, bind="tcp://127.0.0.1:0", keys=keys, client_keys=bob, limits=limits) as gateway,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(Client(gateway.endpoint, keys=alice)) for _ in range(3)]
        assert [client.generate([5], max_tokens=1).token_ids for client in clients] == [(5,)] * 3
        with pytest.raises(RequestFailed, match="has 4 connections, the limit is 3") as refused:
            stack.enter_context(Client(gateway.endpoint, keys=alice, retries=0)).generate([5])
        assert refused.value.code == "overloaded"
        assert clients[0].generate([5], max_tokens=1).token_ids == (5,)
        assert_serves(gateway.endpoint, keys=bob)
        eventually(lambda: clients[0].health().own_connections == 3)
        gateway.engine.tell(Reload(keys.clients, ClientLimits(max_client_connections=5)))
        gateway.engine.wait_until_told()
        assert_serves(gateway.endpoint, keys=alice)


def test_a_key_names_no_other_account(keyed: GatewayProcess, tmp_path: Path) -> None:
    with (
        Client(keyed.endpoint, keys=key_file(tmp_path, "alice")) as client,
        pytest.raises(RequestFailed, match="a key is an account of its own"),
    ):
        client.generate([1], max_tokens=1, account="bob")
