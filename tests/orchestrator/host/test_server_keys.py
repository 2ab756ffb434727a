"""The keys folder and systemd's credentials: what is accepted, and what each mistake is answered with."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from mgpu.orchestrator.host import server_keys
from mgpu.orchestrator.host.server_keys import KeysError, describe, load_server_keys
from mgpu.protocol.keys import KeyFileError, find_client_keys, fingerprint, key_text, new_pair, read_client_keys

PUBLIC, SECRET = new_pair()
CLIENT_PUBLIC, CLIENT_SECRET = new_pair()


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.chmod(mode)
    path.write_text(text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "keys/server.secret", f"# remark\n\nsecret {key_text(SECRET)}\n")
    write(tmp_path / "keys/clients/alice.public", f"public {key_text(CLIENT_PUBLIC)}\n", 0o644)
    return tmp_path / "keys"


def test_a_folder_gives_the_secret_and_the_list(folder: Path) -> None:
    write(folder / "clients/again.public", f"public {key_text(CLIENT_PUBLIC)}\n", 0o644)
    write(folder / "clients/notes.txt", "not a key")
    keys = load_server_keys(str(folder), {})
    assert keys is not None
    assert (keys.secret, keys.clients) == (SECRET, [CLIENT_PUBLIC])
    text = describe(keys)
    assert_has_all(text, fingerprint(PUBLIC), fingerprint(CLIENT_PUBLIC))
    assert key_text(SECRET) not in text


def test_without_a_folder_and_without_credentials_there_are_no_keys(tmp_path: Path) -> None:
    write(tmp_path / "keys", "\n")
    assert load_server_keys("", {}) is None
    assert load_server_keys("", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) is None


def test_systemd_credentials_are_used_whatever_their_mode_says(tmp_path: Path) -> None:
    write(tmp_path / "keys", "\n")
    write(tmp_path / "keys_server.secret", f"secret {key_text(SECRET)}\n", 0o440)
    write(tmp_path / "keys_clients_alice.public", f"public {key_text(CLIENT_PUBLIC)}\n", 0o440)
    keys = load_server_keys("", {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert keys is not None
    assert (keys.secret, keys.clients) == (SECRET, [CLIENT_PUBLIC])


def test_a_folder_that_is_named_goes_before_credentials(folder: Path, tmp_path: Path) -> None:
    assert load_server_keys(str(folder), {"CREDENTIALS_DIRECTORY": str(tmp_path / "none")}) is not None


def test_credentials_that_are_not_a_whole_keys_folder_are_refused(tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    write(tmp_path / "keys", "something")
    with pytest.raises(KeysError, match="must be a folder"):
        load_server_keys("", environ)
    write(tmp_path / "keys_server.secret", f"secret {key_text(SECRET)}\n")
    with pytest.raises(KeysError, match="nobody could connect"):
        load_server_keys("", environ)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def change(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(("damage", "words"), [
    (remove("server.secret"), "server.secret is missing; make it with: mgpu-launch keygen --out"),
    (remove("clients/alice.public"), "nobody could connect; make a client's key with"),
    (lambda folder: (folder / "server.secret").chmod(0o640), "chmod 600"),
    (lambda folder: (folder / "server.secret").chmod(0o602), "mode 0602"),
    (change("server.secret", ""), "has 0 keys"),
    (change("server.secret", "secret short"), "line 1: damaged"),
    (change("server.secret", f"secret {'~' * 40}"), "line 1: damaged"),
    (change("server.secret", f"secret {'#' * 40}"), "line 1: damaged"),
    (change("server.secret", f"secret {key_text(SECRET)}\nsecret {key_text(SECRET)}"), "line 2: damaged"),
    (change("server.secret", f"public {key_text(PUBLIC)}"), "must hold just 'secret'"),
    (change("server.secret", "x" * 5000), "more than 4096 bytes"),
    (change("clients/alice.public", "\x00\xff garbage"), "line 1: damaged"),
    (change("clients/alice.public", f"secret {key_text(CLIENT_SECRET)}"), "must hold just 'public'"),
    (lambda folder: (folder / "clients/x.public").mkdir(), "x.public: Is a directory"),
])  # fmt: skip
def test_what_cannot_be_used_is_named_and_never_quoted(
    folder: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(folder)
    with pytest.raises(KeysError) as refused:
        load_server_keys(str(folder), {})
    assert words in str(refused.value)
    assert key_text(SECRET) not in str(refused.value)
    assert key_text(CLIENT_SECRET) not in str(refused.value)
    assert refused.value.exit_code == 78


@pytest.mark.parametrize("name", ["", "clients", "clients/alice.public"])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_other_users_may_change_is_refused_with_what_to_type(folder: Path, name: str, bits: int) -> None:
    place = folder / name
    place.chmod(place.stat().st_mode | bits)
    with pytest.raises(KeysError, match="other users may change") as refused:
        load_server_keys(str(folder), {})
    assert f"chmod go-w {place}" in str(refused.value)
    subprocess.run(str(refused.value).rpartition(": ")[2].split(), check=True)
    assert load_server_keys(str(folder), {}) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "clients", "clients/alice.public"])
def test_what_another_user_owns_is_refused(folder: Path, name: str) -> None:
    os.chown(folder / name, 12345, -1)
    with pytest.raises(KeysError, match=f"belongs to user 12345.*chown {os.geteuid()} {folder / name}"):
        load_server_keys(str(folder), {})


def test_a_link_leads_to_nothing_that_others_may_change(folder: Path, tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    (folder / "clients/alice.public").rename(open_folder / "alice.public")
    (folder / "clients/alice.public").symlink_to(open_folder / "alice.public")
    assert load_server_keys(str(folder), {}) is not None
    open_folder.chmod(0o777)
    with pytest.raises(KeysError, match=f"chmod go-w {open_folder}"):
        load_server_keys(str(folder), {})


def test_a_clients_file_is_not_taken_for_a_servers_folder(folder: Path) -> None:
    with pytest.raises(KeysError, match="such as a client has; a server needs its folder"):
        load_server_keys(str(folder / "clients/alice.public"), {})
    with pytest.raises(KeysError, match="no folder of keys; make one with"):
        load_server_keys(str(folder / "none"), {})


def test_more_clients_than_a_gateway_can_be_told_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_keys, "MAX_CLIENTS", 0)
    with pytest.raises(KeysError, match="1 client keys beside"):
        load_server_keys(str(folder), {})


def test_a_client_file_is_read_from_where_it_was_named(tmp_path: Path) -> None:
    text = f"secret {key_text(CLIENT_SECRET)}\nserver {key_text(PUBLIC)}\n"
    file = write(tmp_path / "alice.client", text)
    assert find_client_keys(None, {}) is None
    for keys in (find_client_keys(file, {}), find_client_keys(None, {"MGPU_KEYS": str(file)})):
        assert keys is not None
        assert (keys.secret, keys.public, keys.server) == (CLIENT_SECRET, CLIENT_PUBLIC, PUBLIC)


def test_a_client_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    open_to_all = write(tmp_path / "a.client", f"secret {key_text(CLIENT_SECRET)}\nserver {key_text(PUBLIC)}\n", 0o644)
    with pytest.raises(KeyFileError, match=f"chmod 600 {open_to_all}"):
        read_client_keys(open_to_all)
    with pytest.raises(KeyFileError, match="is a folder"):
        read_client_keys(tmp_path)
    with pytest.raises(KeyFileError, match="No such file"):
        read_client_keys(tmp_path / "none")
