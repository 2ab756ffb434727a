"""`mgpu-launch keygen`: what it makes, what it never touches, and that the server can use it."""

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from harness.assertions import assert_has_all
from mgpu.launch.commands.install.keygen import default_folder, keygen_command
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.server_keys import load_server_keys
from mgpu.protocol.keys import fingerprint, key_text, public_of, read_client_keys


def keygen(*arguments: str) -> Result:
    return CliRunner().invoke(keygen_command, list(arguments))


def refusal(*arguments: str) -> str:
    result = keygen(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_it_makes_fits_together(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "keys"
    made = keygen("--out", str(folder))
    assert made.exit_code == 0
    added = [keygen("--out", str(folder), "--client", name) for name in ("alice", "bob")]
    keys = load_server_keys(str(folder), {})
    assert keys is not None
    alice, bob = (read_client_keys(folder / f"{name}.client") for name in ("alice", "bob"))
    assert alice.server == bob.server == public_of(keys.secret)
    assert keys.clients == [alice.public, bob.public]
    for result, public in ((made, alice.server), (added[0], alice.public)):
        assert_has_all(result.output, key_text(public), fingerprint(public))
    for secret in (keys.secret, alice.secret, bob.secret):
        assert all(key_text(secret) not in result.output for result in (made, *added))
        assert key_text(secret) not in repr(keys) + repr(alice) + repr(bob)
        assert repr(secret) not in repr(keys) + repr(alice) + repr(bob)


def test_secrets_are_for_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        keygen("--out", str(tmp_path / "keys"))
        keygen("--out", str(tmp_path / "keys"), "--client", "alice")
    finally:
        os.umask(old)
    assert mode(tmp_path / "keys") == mode(tmp_path / "keys/clients") == 0o700
    assert mode(tmp_path / "keys/server.secret") == mode(tmp_path / "keys/alice.client") == 0o600


@pytest.mark.parametrize("existing", ["server.secret", "server.public", "alice.client", "clients/alice.public"])
def test_nothing_is_overwritten_not_even_a_dead_link(tmp_path: Path, existing: str) -> None:
    if "alice" in existing:
        keygen("--out", str(tmp_path))
    path = tmp_path / existing
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    arguments = ("--client", "alice") if "alice" in existing else ()
    assert f"{path} exists already" in refusal("--out", str(tmp_path), *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 65])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    keygen("--out", str(tmp_path))
    assert "cannot name a client" in refusal("--out", str(tmp_path), "--client", name)


def test_a_client_needs_its_servers_key_first(tmp_path: Path) -> None:
    assert_has_all(refusal("--out", str(tmp_path), "--client", "alice"), "server.public is missing", "copy")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot make the folder" in refusal("--out", str(tmp_path / "file" / "keys"))


def test_the_default_is_in_the_users_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert default_folder() == Path("/x/mgpu/keys")
