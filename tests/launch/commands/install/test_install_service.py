"""``mgpu-launch install-service``: what it writes, what it keeps, what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mgpu.launch.commands.install import install_service
from mgpu.launch.commands.install.install_service import (
    InstallError,
    NoPermission,
    ServiceFile,
    check_named,
    check_reachable,
    install_service_command,
    places_on_the_way,
    write,
)
from mgpu.launch.settings.config import ServeConfig, load_config
from mgpu.launch.settings.values import ConfigError

LAUNCHER = "/opt/mgpu/bin/mgpu-launch"
SYSTEM_FILES = {
    "etc/systemd/system/mgpu@.service", "etc/sysusers.d/mgpu.conf", "etc/tmpfiles.d/mgpu.conf",
    "etc/mgpu/qwen3-32b.toml",
}  # fmt: skip


@pytest.fixture(autouse=True)
def installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_service, "find_launcher", lambda: LAUNCHER)


def install(*arguments: str) -> Result:
    return CliRunner().invoke(install_service_command, arguments, catch_exceptions=False)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_system_service_is_made_for_this_installation(tmp_path: Path) -> None:
    done = install("--root", str(tmp_path), "qwen3-32b")
    assert done.exit_code == 0
    assert files_below(tmp_path) == SYSTEM_FILES
    unit = (tmp_path / "etc/systemd/system/mgpu@.service").read_text()
    assert f"\nExecStart={LAUNCHER} serve --config %E/mgpu/%i.toml\n" in unit
    assert "/usr/bin/mgpu-launch" not in unit
    assert "systemctl enable --now mgpu@qwen3-32b" in done.output
    assert "sudoedit /etc/mgpu/qwen3-32b.toml" in done.output


def test_the_model_that_is_named_stands_in_the_configuration(tmp_path: Path) -> None:
    done = install("--root", str(tmp_path), "qwen3-32b", "-m", '/srv/models/a "b"')
    assert done.exit_code == 0
    config, _ = load_config({}, {}, tmp_path / "etc/mgpu/qwen3-32b.toml")
    assert config.model == '/srv/models/a "b"'
    assert "name the model" not in done.output
    assert "plan --config /etc/mgpu/qwen3-32b.toml" in done.output
    assert install("--root", str(tmp_path), "qwen3-32b", "-m", '/srv/models/a "b"').exit_code == 0
    with pytest.raises(InstallError, match="is kept and has model = "):
        install("--root", str(tmp_path), "qwen3-32b", "-m", "demo")
    assert install("--root", str(tmp_path), "tiny", "-m", "org/name").exit_code == 0
    assert load_config({}, {}, tmp_path / "etc/mgpu/tiny.toml")[0].model == "org/name"


def test_a_model_that_the_service_could_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_service, "check_reachable", lambda paths: None)
    monkeypatch.setattr(install_service, "config_dir", lambda user, environ: Path("/etc/mgpu-none"))
    monkeypatch.setattr(install_service, "write", lambda file: pytest.fail("something was written"))
    with pytest.raises(InstallError, match="no such file or folder"):
        install("x", "-m", "/srv/none/such")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InstallError, match="is hidden from a system service"):
        install("x", "-m", "model")  # below /tmp, which the unit's PrivateTmp replaces
    monkeypatch.setattr(install_service, "write", lambda file: None)
    done = install("x", "-m", "model", "--user", "--dry-run")
    assert f'model = "{tmp_path / "model"}"' in done.output


def test_every_user_can_read_what_is_written_whatever_the_umask(tmp_path: Path) -> None:
    old_mask = os.umask(0o077)
    try:
        install("--root", str(tmp_path), "qwen3-32b")
    finally:
        os.umask(old_mask)
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o644 for name in SYSTEM_FILES)


def test_a_users_service_lies_in_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    done = install("--user", "small")
    assert files_below(tmp_path) == {"systemd/user/mgpu@.service", "mgpu/small.toml"}
    assert "systemctl --user enable --now mgpu@small" in done.output
    assert "sudo" not in done.output
    config = (tmp_path / "mgpu/small.toml").read_text()
    assert config.count("systemctl --user ") == config.count("systemctl ") == 2
    assert not re.search("sudo|/home|/etc|system service", config)


def test_a_dry_run_shows_all_and_writes_nothing(tmp_path: Path) -> None:
    done = install("--root", str(tmp_path), "--dry-run", "qwen3-32b")
    assert files_below(tmp_path) == set()
    assert all(f"would write {tmp_path}/{name}" in done.output for name in SYSTEM_FILES)
    assert f"ExecStart={LAUNCHER}" in done.output


def test_a_dry_run_shows_the_files_also_where_it_would_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(install_service, "installation_paths", lambda: ["/tmp/checkout"])
    monkeypatch.setattr(install_service, "write", lambda file: pytest.fail("something was written"))
    monkeypatch.setattr(install_service, "config_dir", lambda user, environ: Path("/etc/mgpu-none"))
    done = install("x", "-m", "./model", "--dry-run")
    assert done.exit_code == 0
    assert "warning: without --dry-run this is refused: mgpu runs from /tmp/checkout" in done.output
    assert "would write /etc/mgpu-none/x.toml" in done.output
    with pytest.raises(InstallError, match="/tmp/checkout"):
        install("x", "-m", "./model")


def test_a_configuration_that_is_there_is_kept_and_the_unit_is_renewed(tmp_path: Path) -> None:
    config, unit = tmp_path / "etc/mgpu/qwen3-32b.toml", tmp_path / "etc/systemd/system/mgpu@.service"
    for path in (config, unit):
        path.parent.mkdir(parents=True)
        path.write_text('model = "mine"\n')
    done = install("--root", str(tmp_path), "qwen3-32b")
    assert config.read_text() == 'model = "mine"\n'
    assert f"kept {config}" in done.output
    assert "ExecStart=" in unit.read_text()


def test_a_configuration_that_serve_would_refuse_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = tmp_path / "etc/mgpu/qwen3-32b.toml"
    config.parent.mkdir(parents=True)
    config.write_text('modle = "mine"\n')
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        install("--root", str(tmp_path), "qwen3-32b")
    assert files_below(tmp_path) == {"etc/mgpu/qwen3-32b.toml"}


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "a@b", "%i", "x" * 65, "a/b", "ä\n"])
def test_a_name_that_no_unit_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InstallError, match="cannot name a service"):
        install("--root", str(tmp_path), "--", name)
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("path", ["/home/me/.venv/bin/python", "/root/python", "/run/user/1000/python"])
def test_an_installation_that_the_sandbox_hides_is_refused_with_the_way_out(path: str) -> None:
    with pytest.raises(InstallError, match=r"is hidden from a system service.*/opt/mgpu.*--user"):
        check_reachable([path])


@pytest.mark.parametrize("path", ["/tmp/venv/bin/python", "/var/tmp/venv/bin/python"])
def test_an_installation_that_private_tmp_hides_is_refused_with_the_way_out(path: str) -> None:
    with pytest.raises(InstallError, match=r"is hidden from a system service.*/opt/mgpu.*--user"):
        check_reachable([path])


def test_links_are_followed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, shown = tmp_path / "hidden", tmp_path / "shown"
    hidden.mkdir()
    shown.mkdir()
    monkeypatch.setattr(install_service, "HIDDEN", (hidden,))
    monkeypatch.setattr(install_service, "REPLACED", ())
    (shown / "real").mkdir()
    (hidden / "link").symlink_to(shown / "real")
    (shown / "link").symlink_to(hidden / "link")
    assert places_on_the_way(shown / "link/python") == [
        shown / "link/python", hidden / "link/python", shown / "real/python"
    ]  # fmt: skip
    with pytest.raises(InstallError, match=f"leads to {hidden}/link/python, and {hidden} is hidden"):
        check_reachable([str(shown / "link/python")])
    (shown / "circle").symlink_to(shown / "circle")
    assert len(places_on_the_way(shown / "circle")) > 2


@pytest.mark.parametrize("named", [
    {"model": "/home/me/model"}, {"model": "/tmp/model.gguf"}, {"model": "/opt/../var/tmp/model"},
    {"keys": "/root/keys"}, {"bind": "ipc:///run/user/1000/front.sock"}, {"bind": "ipc:///tmp/front.sock"},
])  # fmt: skip
def test_a_configuration_that_names_what_the_sandbox_hides_is_refused(named: dict[str, str]) -> None:
    file = Path("/etc/mgpu/x.toml")
    with pytest.raises(InstallError, match=r"/etc/mgpu/x\.toml has .* is hidden from a system service: move it"):
        check_named(file, ServeConfig(**named))  # type: ignore[arg-type]
    with pytest.raises(InstallError, match=r"the configuration /tmp/x\.toml"):
        check_named(Path("/tmp/x.toml"), ServeConfig())


def test_a_configuration_that_names_what_the_service_sees_is_taken() -> None:
    for model in ("demo", "Qwen/Qwen3-0.6B", "/var/lib/mgpu/models/x", "/tmpfs/x", "/homes/x"):
        check_named(Path("/etc/mgpu/x.toml"), ServeConfig(model=model, keys="/etc/mgpu/keys", bind="tcp://*:5555"))


def test_an_installation_in_a_private_folder_is_refused(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(InstallError, match=r"private is closed to others \(0700\)"):
        check_reachable([str(private / "python")])


def test_a_folder_that_may_not_be_written_to_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NoPermission, match=r"no permission to write .*x.service.*sudo.*--user") as refused:
        write(ServiceFile(tmp_path / "x.service", ""))
    assert refused.value.exit_code == 77


def test_the_command_is_registered_and_ends_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", "install-service", "--root", str(tmp_path), "a b"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 78
    assert done.stderr.startswith("error: 'a b' cannot name a service")
    assert "Traceback" not in done.stderr
