"""The options of the HTTP server: what is refused before a model is looked for, and the way out."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from mgpu.launch.prepare.http import http_address, http_options
from mgpu.launch.settings.config import ServeConfig
from mgpu.orchestrator.errors import UserError


def test_the_default_is_the_loopback() -> None:
    address = http_address(ServeConfig(), is_typed=False)
    assert address is not None
    assert str(address) == "127.0.0.1:8000"


@pytest.mark.parametrize("text", ["0.0.0.0:8000", "[::]:8000", "10.0.0.1:80", "*:8000"])
def test_beyond_the_loopback_keys_or_a_flag_are_needed(text: str) -> None:
    with pytest.raises(UserError) as error:
        http_address(ServeConfig(http=text), is_typed=True)
    for way_out in ("--http-keys FILE", "--http-no-auth", "--http 127.0.0.1:"):
        assert way_out in str(error.value)
    assert http_address(ServeConfig(http=text, http_no_auth=True), is_typed=True) is not None
    assert http_address(ServeConfig(http=text, http_keys="file"), is_typed=True) is not None


@pytest.mark.parametrize(
    ("text", "certificate", "warns"), [("127.0.0.1:80", "", False), ("*:80", "", True), ("*:80", "file", False)]
)
def test_http_in_the_clear_is_warned_of_beyond_the_loopback_only(
    text: str, certificate: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServeConfig(http=text, http_keys="file", http_tls_cert=certificate, http_tls_key=certificate)
    http_address(config, is_typed=True)
    assert ("is not encrypted" in caplog.text) is warns


@pytest.mark.parametrize("lacking", [{"starlette", "uvicorn", "httptools"}, {"httptools"}])
def test_without_the_packages_the_default_is_left_out_and_a_wish_is_an_error(
    lacking: set[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also without httptools alone, though uvicorn has h11: connections have no bounds there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else name)
    assert http_address(ServeConfig(), is_typed=False) is None
    assert "httptools; type: pip install 'mgpu[http]'" in caplog.text
    with pytest.raises(UserError, match=r"mgpu\[http\]"):
        http_address(ServeConfig(), is_typed=True)
    assert http_address(ServeConfig(http="none"), is_typed=True) is None


def test_origins_are_checked() -> None:
    assert http_options(ServeConfig(http_cors="https://a.example, *")).cors == ["https://a.example", "*"]
    for wrong in ("a.example", "https://a.example/x", "https://"):
        with pytest.raises(UserError, match=r"https://chat\.example\.com"):
            http_options(ServeConfig(http_cors=wrong))


def test_host_names_are_checked() -> None:
    assert http_options(ServeConfig(http_allowed_hosts="a.example, [fe80::1],*")).allowed_hosts == [
        "a.example",
        "[fe80::1]",
        "*",
    ]
    for wrong in ("https://a.example", "a.example:80", "a/b", "a b", "*.example.com", "::1"):
        with pytest.raises(UserError, match=r"llm\.example\.com"):
            http_options(ServeConfig(http_allowed_hosts=wrong))


def test_keys_and_no_keys_contradict() -> None:
    with pytest.raises(UserError, match="drop one"):
        http_options(ServeConfig(http_keys="x", http_no_auth=True))


def make_certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_files_are_tried_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--http-tls-key is missing"):
        http_options(ServeConfig(http_tls_cert="x"))
    with pytest.raises(UserError, match="cannot be used"):
        http_options(ServeConfig(http_tls_cert=str(tmp_path / "no"), http_tls_key=str(tmp_path / "no")))
    cert, key = make_certificate(tmp_path)
    options = http_options(ServeConfig(http_tls_cert=str(cert), http_tls_key=str(key)))
    assert options.tls_cert == str(cert)
    with pytest.raises(UserError, match="cannot be used"):
        http_options(ServeConfig(http_tls_cert=str(key), http_tls_key=str(key)))
