"""`mgpu-launch http`: HTTP servers apart from the server, several too, with keys and TLS."""

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder
from harness.servers.http_client import get, post
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.keys import key_text, new_pair

SECRET = "sk-0123456789abcdef"
TEXT = "/v1/completions"
BODY = {"prompt": [5], "max_tokens": 2}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("tiny-model"))) as gateway:
        yield gateway


@contextmanager
def http_command(gateway: GatewayProcess, *arguments: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run the command and yield the URL that it prints."""
    command = [sys.executable, "-m", "mgpu.launch.cli", "http", "--endpoint", gateway.endpoint, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"on (\S+)\n", process.stderr.readline() + process.stderr.readline())
            assert found is not None
            yield found[1], process
        finally:
            process.kill()


def test_several_servers_speak_for_one_and_end_by_their_signal(gateway: GatewayProcess) -> None:
    listen = ("--http", "127.0.0.1:0")
    with http_command(gateway, *listen) as (first, process), http_command(gateway, *listen) as (second, _):
        for url in (first, second):
            assert post(url, TEXT, BODY).json["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert get(second, "/health").status == 200


def test_an_encrypted_front_channel_is_used_with_a_clients_key(tmp_path: Path) -> None:
    (server_public, server_secret), (public, secret) = new_pair(), new_pair()
    file = tmp_path / "web.client"
    file.touch(0o600)
    file.write_text(f"secret {key_text(secret)}\nserver {key_text(server_public)}\n")
    front = {"bind": "tcp://127.0.0.1:0", "keys": ServerKeys(server_secret, [public])}
    with (
        GatewayProcess(make_model_folder(tmp_path), client_keys=file, **front) as gateway,
        http_command(gateway, "--keys", str(file), "--http", "127.0.0.1:0") as (url, _),
    ):
        assert post(url, TEXT, BODY).json["usage"]["completion_tokens"] == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_keys_and_tls_are_those_of_the_files(gateway: GatewayProcess, tmp_path: Path) -> None:
    keys, cert, key = tmp_path / "keys", tmp_path / "cert.pem", tmp_path / "key.pem"
    keys.write_text(f"alice {SECRET}\n")
    keys.chmod(0o600)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    options = ("--http-keys", str(keys), "--http-tls-cert", str(cert), "--http-tls-key", str(key))
    with http_command(gateway, "--http", "127.0.0.1:0", *options) as (url, _):
        assert url.startswith("https://")
        request = urllib.request.Request(f"{url}/v1/models", headers={"authorization": f"Bearer {SECRET}"})
        context = ssl.create_default_context(cafile=str(cert))
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--http", "none"), "nothing to do"), (("--http", "0.0.0.0:0"), "--http-keys"), (("--http", "x"), "such as")],
)
def test_mistakes_say_the_way_out(gateway: GatewayProcess, arguments: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "-m", "mgpu.launch.cli", "http", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, words in done.stderr) == (78, True), done.stderr
