"""Whose limits and share a request counts to."""

import pytest

from mgpu.orchestrator.gateway.front.account import Account, account_of
from mgpu.orchestrator.gateway.requests.quota import account_number

A, B = b"\x00\x01", b"\x00\x02"


def test_a_key_is_one_account_with_all_its_connections() -> None:
    assert account_of("key:abc", A, "key:abc") == account_of("key:abc", B, "key:abc")
    assert account_of("key:abc", A, "key:abc").path == ("key:abc", "key:abc")


@pytest.mark.parametrize(("identity", "owner"), [("uid:0", "pid:17"), ("", "127.0.0.1")])
def test_connections_and_named_clients_are_parts_of_their_owner(identity: str, owner: str) -> None:
    accounts = [
        account_of(identity, A, owner),
        account_of(identity, B, owner),
        account_of(identity, A, owner, "client:alice"),
        account_of(identity, A, owner, "client:alice/batch"),
        account_of(identity, A, owner, "client:"),
    ]
    assert len(set(accounts)) == 5
    assert {account.path[0] for account in accounts} == {owner}
    assert accounts[2] == account_of(identity, B, owner, "client:alice")
    assert accounts[2] != account_of(identity, A, "pid:18", "client:alice")


def test_a_client_of_the_own_http_process_is_an_owner_with_all_its_connections() -> None:
    alice = account_of("uid:0", A, "pid:17", "http:alice")
    assert alice == account_of("uid:0", B, "pid:18", "http:alice")
    assert (alice.owner, alice.name) == ("client:alice", "client:alice")
    first, second = (account_of("uid:0", A, "pid:17", f"http:http 10.0.0.7/{port}") for port in (4711, 4712))
    assert first != second
    assert first.path[:2] == second.path[:2] == ("client:http 10.0.0.7",) * 2
    assert account_of("uid:0", A, "pid:17", "client:http:alice").owner == "pid:17", "another process only says so"


def test_what_follows_a_slash_is_a_part_of_what_stands_before_it() -> None:
    alice, batch = Account("pid:1", "client:alice"), Account("pid:1", "client:alice/batch/night")
    assert alice.path[:2] == batch.path[:2] == ("pid:1", "client:alice")
    assert alice.path[2] != batch.path[2]


def test_the_last_part_of_a_path_is_in_the_middle_of_no_other() -> None:
    names = ("client:", "client:a", "client:a/", "client:a/b", "client:a/b/c", "uid:0 0001", "key:abc")
    paths = [Account("pid:1", name).path for name in names]
    middles = {path[:at] for path in paths for at in range(1, len(path))}
    assert not middles.intersection(paths)


def test_numbers_of_accounts_are_the_same_in_every_gateway() -> None:
    assert account_number("key:abc") == account_number("key:abc") < 2**63
    assert account_number("key:abc") != account_number("key:abd")
