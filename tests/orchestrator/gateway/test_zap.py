"""Who may connect to the front channel."""

import os

import pytest

from mgpu.orchestrator.gateway.zap import DOMAIN, allows


def question(address: str, domain: bytes = DOMAIN, mechanism: bytes = b"NULL") -> list[bytes]:
    return [b"1.0", b"7", domain, address.encode(), b"", mechanism]


@pytest.mark.parametrize(
    "address", [f"localhost:{os.getuid()}:0:1", "localhost:0:0:1", "127.0.0.1", "127.8.8.8", "::1"]
)
def test_own_processes_root_and_the_loopback_may(address: str) -> None:
    assert allows(question(address))


@pytest.mark.parametrize(
    "asked",
    [
        question(f"localhost:{os.getuid() + 1}:0:1"),
        question("localhost:-1:0:1"),
        question("localhost::"),
        question("192.168.1.5"),
        question("12.7.0.1"),
        question(""),
        question("127.0.0.1", domain=b"other"),
        question("127.0.0.1", mechanism=b"PLAIN"),
        [b"2.0", *question("127.0.0.1")[1:]],
        [],
    ],
)
def test_others_may_not(asked: list[bytes]) -> None:
    assert not allows(asked)
