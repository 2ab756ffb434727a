"""The HTTP process beside the others: its port, its death, and what is left when a server ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest

from harness.servers.http_client import JSON_TYPE, Answer, connection_to, get, opened, post
from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.server_process import ServerProcess

OPTIONS = ("--device", "cpu")
LONG = {"prompt": "Once", "max_tokens": 30_000, "ignore_eos": True, "stream": True}


def processes(server: ServerProcess, module: str) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [each for each in children if module in each.cmdline()]


def serve(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mgpu.launch.cli", "serve", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))


@pytest.fixture(scope="module")
def http_server(text_model: str) -> Iterator[ServerProcess]:
    with ServerProcess("-m", text_model, *OPTIONS, "--http", "127.0.0.1:0") as server:
        server.wait_ready()
        yield server


def test_a_killed_http_process_is_replaced_and_its_streams_end(http_server: ServerProcess) -> None:
    url = http_server.http_url()
    [first] = processes(http_server, "mgpu.orchestrator.http")
    with Client(http_server.wait_ready()) as client, opened(url, "POST", "/v1/completions", LONG) as response:
        assert response.readline().startswith(b"data: ")
        first.kill()
        with pytest.raises((OSError, HTTPException)):  # an answer that is cut must not look whole
            response.read()
        assert post(url, "/v1/completions", {"prompt": "Once", "max_tokens": 2}).status == 200
        eventually(lambda: client.stats()["kv_blocks_used"] == 0, lambda: str(client.stats()))
        assert client.health().restarts == 0
    [second] = processes(http_server, "mgpu.orchestrator.http")
    assert second.pid != first.pid
    assert http_server.http_url() == url


def test_a_client_that_goes_frees_its_blocks_within_a_second(http_server: ServerProcess) -> None:
    with Client(http_server.wait_ready()) as client:
        for stream in (True, False):
            connection = connection_to(http_server.http_url())
            body = json.dumps({**LONG, "stream": stream})
            connection.request("POST", "/v1/completions", body, JSON_TYPE)
            eventually(lambda: client.stats()["kv_blocks_used"] > 0, lambda: "it never ran")
            connection.close()
            gone_s = time.monotonic()
            eventually(lambda: client.stats()["kv_blocks_used"] == 0, lambda: str(client.stats()))
            assert time.monotonic() - gone_s < 1.0


@pytest.mark.parametrize("module", ["mgpu.worker", "mgpu.orchestrator.gateway"])
def test_a_killed_worker_or_gateway_costs_a_stream_nothing(http_server: ServerProcess, module: str) -> None:
    url, body = (
        http_server.http_url(),
        {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 1, "seed": 3, "stream": True},
    )
    expected = text_of(post(url, "/v1/completions", body).body)
    with opened(url, "POST", "/v1/completions", body) as response:
        first = response.readline()
        [process] = processes(http_server, module)
        process.kill()
        assert text_of(first + response.read()) == expected
    with Client(http_server.wait_ready()) as client:
        eventually(lambda: client.stats()["kv_blocks_used"] == 0, lambda: str(client.stats()))


def text_of(stream: bytes) -> str:
    """Return the text of a stream that has ended as it should."""
    events = Answer(200, {}, stream).events
    assert events[-1] == "[DONE]"
    return "".join(event["choices"][0]["text"] for event in events[:-1])


def test_a_unix_socket_with_keys_takes_new_ones_on_sighup_and_is_gone_afterwards(
    text_model: str, tmp_path: Path
) -> None:
    path, keys = tmp_path / "http.sock", tmp_path / "keys"
    url = f"unix:{path}"

    def models(key: str) -> int:
        return get(url, "/v1/models", authorization=f"Bearer {key}").status

    keys.touch(0o600)
    keys.write_text("alice sk-0123456789-alice\n")
    with ServerProcess("-m", text_model, *OPTIONS, "--http", url, "--http-keys", str(keys)) as server:
        server.wait_ready()
        assert server.http_url() == url
        assert path.stat().st_mode & 0o777 == 0o666, "a key is asked for, so any user may connect"
        assert [models("sk-0123456789-alice"), models("sk-0123456789-bob")] == [200, 401]
        assert get(url, "/health", host="llm.example.com").status == 200, "no browser reaches a unix socket"
        keys.write_text("bob sk-0123456789-bob\n")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: models("sk-0123456789-bob") == 200, server.output)
        assert models("sk-0123456789-alice") == 401
        server.process.kill()  # nobody tells the HTTP process: it must notice
        eventually(lambda: not path.exists(), lambda: "the file stays")


def test_a_name_that_was_made_to_lead_here_is_refused(http_server: ServerProcess) -> None:
    url = http_server.http_url()
    answer = get(url, "/v1/models", host="evil.example")
    assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")


def test_a_taken_port_is_an_error_before_anything_is_loaded(http_server: ServerProcess) -> None:
    done = serve("--http", http_server.http_url().removeprefix("http://"))
    assert done.returncode == 1
    assert f"process {http_server.process.pid} (" in done.stderr
    assert "--http none" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0.0.0.0:0", ("--http-no-auth", "127.0.0.1:0")),
        ("nowhere", ("127.0.0.1:8000", "none")),
        ("unix:relative", ("must be absolute",)),
    ],
)
def test_an_address_that_is_not_safe_or_not_one_is_refused(value: str, words: tuple[str, ...]) -> None:
    done = serve("--http", value)
    assert done.returncode == 78
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
