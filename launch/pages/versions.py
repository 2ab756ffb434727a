"""What is installed, for ``--version -v``. Nothing is imported for it: torch alone takes seconds."""

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

import mgpu
from mgpu.orchestrator.errors import DeviceError
from mgpu.orchestrator.placement.machine.nvml import Nvml, NvmlSession
from mgpu.protocol.internal.process.commit import commit_of

_PACKAGES = ("triton", "pyzmq", "tokenizers")


def version_text(nvml: Nvml | None = None) -> str:
    """Return one line a fact: mgpu, commit, Python, platform, torch with its CUDA and NCCL, driver, GPUs."""
    return "\n".join(f"{name:<10} {value}" for name, value in version_facts(nvml))


def version_facts(nvml: Nvml | None = None) -> list[tuple[str, str]]:
    """Return names and versions; "not installed" or the driver's words where there is none."""
    package = Path(mgpu.__file__).parent
    return [
        ("mgpu", f"{mgpu.__version__} ({package})"),
        ("commit", commit_of(package) or "no checkout"),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", f"{platform.platform()}, {' '.join(platform.libc_ver()).strip() or 'unknown libc'}"),
        ("torch", installed("torch")),
        ("CUDA", torch_cuda()),
        ("NCCL", torch_nccl()),
        *((name, installed(name)) for name in _PACKAGES),
        *_driver(nvml),
    ]


def installed(name: str) -> str:
    """Return the version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def torch_cuda() -> str:
    """Return the CUDA version that torch was built for, from its version file."""
    try:
        spec = importlib.util.find_spec("torch")
        text = Path(spec.origin).with_name("version.py").read_text("utf-8") if spec and spec.origin else ""
    except (OSError, ValueError):
        text = ""
    match = re.search(r"^cuda\b[^=\n]*= *['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    if match is None:
        return "none: torch is not built for it" if text else "no torch"
    return match[1]


def torch_nccl() -> str:
    """Return the version of the NCCL package that torch brings."""
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.lower().startswith("nvidia-nccl"):
            return f"{distribution.version} ({name})"
    return "no package of it"


def _driver(nvml: Nvml | None) -> list[tuple[str, str]]:
    with NvmlSession(nvml) as session:
        try:
            inventory = session.inventory()
        except DeviceError as error:
            return [("driver", str(error))]
        if not inventory.gpus:
            return [("driver", inventory.problem)]
        lines = [("driver", session.driver_version())]
    for gpu in inventory.gpus:
        number = "MIG" if gpu.mig else str(gpu.index)
        lines.append((f"GPU {number}", gpu.problem or f"{gpu.name}, {gpu.total_bytes / 2**30:.1f} GiB"))
    return lines
