"""The installed service under a real systemd, booted in a box of namespaces. For root only, and only when asked for."""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
BOX_S = 400


def cgroup_root() -> Path:
    """Find where the unified hierarchy is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    pytest.skip("no cgroup2 hierarchy is mounted")


@contextlib.contextmanager
def own_cgroup() -> Iterator[Path]:
    """Make a group for the box: its namespace keeps systemd from seeing, or moving, any other process."""
    group = cgroup_root() / f"mgpu-box-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for folder, _, _ in os.walk(group, topdown=False):
            os.rmdir(folder)


@pytest.mark.timeout(BOX_S + 60)
@pytest.mark.skipif("SYSTEMD_BOX" not in os.environ, reason="set SYSTEMD_BOX=1, as root, to boot systemd in a box")
def test_the_service_keeps_its_promises_under_a_real_systemd(tmp_path: Path, smollm2: str) -> None:
    if os.geteuid() or not Path("/lib/systemd/systemd").exists() or not shutil.which("unshare"):
        pytest.skip("needs root, systemd and unshare")
    box, out = tmp_path / "box", tmp_path / "out"
    box.mkdir()
    out.mkdir()
    environ = {
        "PATH": os.environ["PATH"],
        "BOX": str(box),
        "OUT": str(out),
        "REPO": str(HERE.parent.parent),
        "PYTHON_PREFIX": sys.base_prefix,
        "SITE_PACKAGES": sysconfig.get_path("purelib"),
        "PYTHON": f"python{sys.version_info.major}.{sys.version_info.minor}",
        "MODEL": smollm2,
    }
    namespaces = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net", "--fork", "--kill-child"]
    with own_cgroup() as group:
        enter = f'echo $$ > {group}/cgroup.procs && exec unshare {" ".join(namespaces)} bash "$0"'
        boot = subprocess.run(
            ["bash", "-c", enter, HERE / "systemd_box/boot.sh"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=BOX_S,
        )
    report = (out / "log").read_text() if (out / "log").exists() else boot.stderr + (out / "console").read_text()
    assert (out / "result.xml").exists(), report
    suite = ElementTree.parse(out / "result.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "0", "0"), report
    print(report)
