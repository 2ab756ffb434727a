"""docs/protocol.md is enough to write a client: its tables are the code's, its examples run against a real gateway.

The conversation itself uses nothing of mgpu, only pyzmq and msgpack and what the page says.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import msgpack
import pytest
import zmq

from harness.servers.gateway_process import GatewayProcess, make_model_folder
from mgpu import GenerateOptions
from mgpu.protocol.client.requests.option_help import default_words
from mgpu.protocol.client.requests.request_message import SHORTCUTS
from mgpu.protocol.front import framing
from mgpu.protocol.front.client_messages import DETOKENIZE_RULES, GENERATE_RULES, TOKENIZE_RULES
from mgpu.protocol.front.fields import Rule
from mgpu.protocol.front.server_messages import SERVER_TYPES, FailureCode
from mgpu.protocol.internal.client_limits import ClientLimits

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
ANY = "…"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("tiny-model"))) as gateway:
        yield gateway


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def table(header: str) -> list[list[str]]:
    """Return the rows of the table whose header line begins as given, cells without backquotes."""
    lines = PAGE[PAGE.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]


def matches(expected: object, found: object) -> bool:
    if expected == ANY:
        return True
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(matches(expected[key], found[key]) for key in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(matches, expected, found))
    return expected == found


@pytest.mark.parametrize("exchange", blocks("exchange"))
def test_an_exchange_of_the_page_happens_as_it_is_written(gateway: GatewayProcess, exchange: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(gateway.endpoint)
    try:
        for line in exchange.splitlines():
            direction, expected = line[0], json.loads(line[2:])
            if direction == ">":
                socket.send_multipart([b"mgpu1", msgpack.packb(expected)])
                continue
            message = receive(socket)
            while message["type"] == "keepalive":
                message = receive(socket)
            assert matches(expected, message), f"expected {expected}, got {message}"
    finally:
        socket.close(linger=0)
        context.term()


def receive(socket: "zmq.Socket[bytes]") -> dict[str, Any]:
    assert socket.poll(15_000), "the server is silent"
    version, body = socket.recv_multipart()
    assert version == b"mgpu1"
    message: dict[str, Any] = msgpack.unpackb(body)
    return message


def test_the_pages_own_client_streams_an_answer(gateway: GatewayProcess) -> None:
    [source] = blocks("python")
    environment = {**os.environ, "MGPU_ENDPOINT": gateway.endpoint}
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("user\nHi")
    assert done.stdout.endswith("[length, 20 tokens]\n")


CHAT_FIELDS = ("messages", "tools", "documents", "template_options")


@pytest.mark.parametrize(("header", "rules"), [
    ("field", GENERATE_RULES), ("tokenize field", TOKENIZE_RULES), ("detokenize field", DETOKENIZE_RULES),
])  # fmt: skip
def test_the_field_table_is_the_codes(header: str, rules: dict[str, Rule]) -> None:
    assert {name: allowed for name, allowed, _ in table(header)} == {
        name: "as in generate" if header != "field" and name in CHAT_FIELDS else rule.allowed
        for name, rule in rules.items()
    }


def test_the_defaults_of_the_page_are_the_codes() -> None:
    defaults = {name: default for name, _, default in table("field") if name in GenerateOptions.__annotations__}
    assert defaults == {name: default_words(name) for name in GenerateOptions.__annotations__ if name not in SHORTCUTS}


def test_the_message_table_is_the_codes() -> None:
    rows = {name: set(names.split(", ")) for name, names, _ in table("type")}
    assert rows == {name: {field.name for field in fields(cls)} for name, cls in SERVER_TYPES.items()}


def test_the_table_of_codes_is_the_codes() -> None:
    assert [code for code, *_ in table("code")] == list(get_args(FailureCode))


def test_the_numbers_on_the_page_are_the_codes() -> None:
    for field in fields(framing.MessageLimits):
        assert str(getattr(framing.FROM_CLIENT, field.name)) in PAGE
    limits = ClientLimits()
    assert f"this client ({limits.max_client_requests} requests; {limits.max_client_queue >> 20} MiB" in PAGE
    assert f"at most {framing.FROM_SERVER.frame_bytes >> 20} MiB" in PAGE
