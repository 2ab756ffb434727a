"""Name the machine and the versions that a benchmark ran with."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import mgpu


def cpu_name() -> str:
    """Give the name that the kernel prints for the first core."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """List the GPUs of this machine, visible or not; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.SubprocessError):
        return []


def versions(*packages: str) -> dict[str, str]:
    """Give the versions of Python, of mgpu, which need not be installed, and of those packages that are."""
    found = {"python": platform.python_version(), "mgpu": mgpu.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe(*packages: str) -> dict[str, object]:
    """Give what must stand beside every number: date, machine, its load just before, versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "gpus": gpu_names(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions("torch", *packages),
    }


def heading(facts: dict[str, object]) -> str:
    """Put what `describe` gives into one line."""
    versions_text = ", ".join(f"{name} {version}" for name, version in dict(facts["versions"]).items())  # type: ignore[call-overload]
    gpus = ", ".join(facts["gpus"]) or "no GPU"  # type: ignore[arg-type]
    return f"{facts['date']} | {facts['cpu']} | {gpus} | {versions_text}"
