"""What `serve` takes from its files again on SIGHUP."""

import os
from pathlib import Path

import pytest

from mgpu.launch.commands.install.keygen import make_client, make_server
from mgpu.launch.commands.serve import read_again
from mgpu.launch.prepare.preflight import keys_for
from mgpu.launch.settings.config import load_config
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.reload import Reloader


def test_limits_and_clients_are_read_again_and_what_needs_a_restart_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MGPU_KEYS", "MGPU_HTTP", "MGPU_DTYPE"):
        monkeypatch.delenv(name, raising=False)
    keys, file = tmp_path / "keys", tmp_path / "x.toml"
    make_server(keys)
    make_client(keys, "alice")
    text = f'bind = "tcp://127.0.0.1:0"\nkeys = "{keys}"\n'
    file.write_text(text)
    flags = {"tp": "2"}
    config, _ = load_config(flags, {}, file)
    make_client(keys, "bob")
    file.write_text(text + "drain_timeout = 7\nmax_client_requests = 3\nmax_rows = 9\n")
    values = Reloader(keys_for(config.bind, config.keys), lambda: read_again(config, file, flags)).read()
    assert values is not None
    assert values.keys is not None
    assert len(values.keys.clients) == 2
    assert (values.drain_timeout_s, values.client_limits.max_client_requests) == (7.0, 3)
    assert "a changed max_rows takes effect at the next start" in caplog.text
    file.write_text("max_rows = many")
    with pytest.raises(UserError, match="not valid TOML"):
        read_again(config, file, flags)


def test_the_last_clients_key_can_be_taken_away_from_a_running_server(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_server(keys)
    make_client(keys, "alice")
    config, _ = load_config({"bind": "tcp://127.0.0.1:0", "keys": str(keys)}, {}, None)
    (keys / "clients/alice.public").unlink()
    values = read_again(config, None, {"bind": config.bind, "keys": config.keys})
    assert values.keys is not None
    assert values.keys.clients == []
    with pytest.raises(UserError, match="nobody could connect"):
        keys_for(config.bind, config.keys)


@pytest.mark.timeout(20)
def test_a_pipe_is_not_read_again(tmp_path: Path) -> None:
    """Nobody writes into it any more: the server would wait for ever, or find nothing and forget its configuration."""
    config, _ = load_config({}, {}, None)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        read_again(config, tmp_path / "pipe", {})


def test_keys_are_loaded_for_tcp_only(tmp_path: Path) -> None:
    assert keys_for("", str(tmp_path / "none")) is None
    assert keys_for("ipc:///run/x", str(tmp_path / "none")) is None
    with pytest.raises(UserError, match="no folder of keys"):
        keys_for("tcp://127.0.0.1:0", str(tmp_path / "none"))
