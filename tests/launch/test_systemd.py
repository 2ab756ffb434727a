"""The unit files: accepted by systemd, hardened, harmless to CUDA and NCCL, and in step with the code."""

import os
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from mgpu.launch.cli import EXIT_USAGE
from mgpu.launch.commands.install.install_service import config_dir, service_files, shipped
from mgpu.launch.settings.config import ServeConfig, load_config
from mgpu.orchestrator.config import Timeouts
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.systemd import EXTEND_S

ROOT = Path(__file__).parent.parent.parent
WORST_EXPOSURE = 1.6
STAND_IN = "/bin/true"


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing")
    return path


def unit_file(folder: Path, user: bool) -> Path:
    """Write the unit with a launcher that exists on every machine."""
    path = folder / "mgpu@.service"
    path.write_text(next(service_files(config_dir(user, {}) / "x.toml", user, STAND_IN)).text)
    return path


def settings(name: str) -> dict[str, list[str]]:
    """Return every value of every setting of a shipped unit."""
    values: dict[str, list[str]] = defaultdict(list)
    for line in shipped(name).splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            values[key].append(value)
    return values


@pytest.fixture(scope="module")
def system_unit() -> dict[str, list[str]]:
    return settings("mgpu@.service")


@pytest.mark.parametrize("user", [False, True])
def test_systemd_accepts_the_unit_without_a_remark(tmp_path: Path, user: bool) -> None:
    done = subprocess.run(
        [tool("systemd-analyze"), *(["--user"] if user else []), "verify", unit_file(tmp_path, user)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_system_unit_exposes_little(tmp_path: Path) -> None:
    command = [tool("systemd-analyze"), "security", "--offline=true", "--no-pager", unit_file(tmp_path, user=False)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= WORST_EXPOSURE


def test_the_user_and_the_folders_can_be_made(tmp_path: Path) -> None:
    sysusers, tmpfiles = tool("systemd-sysusers"), tool("systemd-tmpfiles")
    if os.geteuid():
        pytest.skip("giving folders to another user needs root")
    for kind in ("sysusers", "tmpfiles"):
        folder = tmp_path / f"etc/{kind}.d"
        folder.mkdir(parents=True)
        (folder / "mgpu.conf").write_text(shipped(f"mgpu.{kind}.conf"))
    subprocess.run([sysusers, f"--root={tmp_path}", "mgpu.conf"], check=True, timeout=60)
    subprocess.run([tmpfiles, f"--root={tmp_path}", "--create", "mgpu.conf"], check=True, timeout=60)
    uid = int(next(line for line in (tmp_path / "etc/passwd").read_text().splitlines() if "mgpu" in line).split(":")[2])
    assert (tmp_path / "var/lib/mgpu/models").stat().st_uid == uid
    assert (tmp_path / "etc/mgpu").stat().st_uid == 0
    assert (tmp_path / "etc/mgpu").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", ["PrivateDevices", "MemoryDenyWriteExecute", "ProcSubset", "PrivateNetwork"])
def test_what_breaks_cuda_or_nccl_is_not_set(system_unit: dict[str, list[str]], name: str) -> None:
    assert name not in system_unit


def test_nccl_may_list_interfaces_and_raise_limits(system_unit: dict[str, list[str]]) -> None:
    assert "AF_NETLINK" in system_unit["RestrictAddressFamilies"][0].split()
    assert not any("@resources" in value for value in system_unit["SystemCallFilter"])
    assert system_unit["LimitMEMLOCK"] == ["infinity"]
    assert system_unit["DeviceAllow"] == ["char-nvidia* rw"]


@pytest.mark.parametrize("name", ["mgpu@.service", "mgpu-user@.service"])
def test_caches_outlive_a_restart(name: str) -> None:
    unit = settings(name)
    pairs = dict(pair.split("=") for line in unit["Environment"] for pair in line.split())
    assert unit["CacheDirectory"] == ["mgpu"]
    for variable in ("MGPU_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert pairs[variable].startswith("%C/mgpu")


@pytest.mark.parametrize("name", ["mgpu@.service", "mgpu-user@.service"])
def test_deadlines_and_statuses_are_those_of_the_server(name: str) -> None:
    unit = settings(name)
    assert unit["Type"] == ["notify"]
    assert float(unit["TimeoutStartSec"][0]) == EXTEND_S
    assert float(unit["TimeoutStopSec"][0]) > ServeConfig().drain_timeout_s + stop_timeout_s()
    assert unit["RestartPreventExitStatus"] == [f"{EXIT_USAGE} {UserError.exit_code}"]
    assert (unit["KillMode"], unit["OOMPolicy"]) == (["mixed"], ["continue"])


def stop_timeout_s() -> float:
    return Timeouts().stop_timeout_s


def test_the_example_is_a_configuration_whether_or_not_its_options_are_commented_out(tmp_path: Path) -> None:
    example = shipped("example.toml")
    file = tmp_path / "example.toml"
    for text in (example, re.sub(r"^# (\w+ = )", r"\1", example, flags=re.MULTILINE)):
        file.write_text(text)
        config, origins = load_config({}, {}, file)
        assert config.model
    assert origins["drain_timeout"] == str(file)


def test_every_unit_file_is_part_of_the_package() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in package_data["mgpu.launch"] for path in (ROOT / "launch").glob(pattern)}
    assert packed == {path for path in (ROOT / "launch").rglob("*") if path.parent.name == "systemd"}
    assert len(packed) == 5
