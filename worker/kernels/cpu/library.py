"""Compile and load the kernels for the CPU, which are in C, with the compiler of the machine.

They are compiled once, for this processor, and kept in a folder that only this user can write to. Without a compiler,
or with ``MGPU_KERNELS=0``, there are none, and torch computes instead. Threads are those of torch: the library is not
linked against OpenMP, so its calls go to the copy that torch has loaded.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mgpu.protocol.cache_root import cache_root
from mgpu.protocol.model.c_compiler import c_compiler

log = logging.getLogger(__name__)

SOURCES = ("products.c", "layers.c", "experts.c")
_HEADERS = ("vectors.h", "tiles.h")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
          "-Wno-psabi")  # fmt: skip
_COMPILE_S = 60.0
"""Compiling takes a second; a compiler that takes so long is ended."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the kernels; None if there is no compiler here, or what it makes cannot be loaded."""
    compiler = c_compiler()
    if compiler is None:
        log.info(
            "no C compiler, or MGPU_KERNELS=0: torch multiplies packed weights on the CPU, at a third of the speed"
        )
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", "") or str(error)
        log.warning("kernels for the CPU cannot be compiled or loaded, torch computes instead: %s", text.strip()[:500])
        return None


def cache_folder() -> Path:
    """Return the folder for compiled kernels."""
    return cache_root() / "kernels"


def _load(compiler: str) -> ctypes.CDLL:
    """Load the library that was kept, compiled now if there is none; a temporary one if its folder is not safe."""
    if (folder := _private_folder()) is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            kept = folder / f"cpu-{_key()}.so"
            if not kept.exists():
                _compile(compiler, kept)
            return _open(kept)
    with tempfile.TemporaryDirectory(prefix="mgpu-") as temporary:
        built = Path(temporary) / "cpu.so"
        _compile(compiler, built)
        return _open(built)


def _private_folder() -> Path | None:
    """Make the folder and return it; None if there is none, or if others can put a library there."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):  # the latter: this user has no home
        return None
    return folder if stat.S_ISDIR(found.st_mode) and _is_ours(found) else None


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _key() -> str:
    """Return a digest of all that the library depends on: the sources, and the processor that it is made for."""
    digest = hashlib.sha256("\0".join((*_FLAGS, platform.machine())).encode())
    for name in (*SOURCES, *_HEADERS):
        digest.update((Path(__file__).parent / name).read_bytes())
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        about = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
        digest.update("".join(sorted(about)).encode())
    return digest.hexdigest()[:32]


def _compile(compiler: str, target: Path) -> None:
    """Compile to a file of another name first: others see the library whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        # Compiled and linked apart, because linking with -fopenmp would bring a second copy of OpenMP.
        objects, linked = [f"{folder}/{name}.o" for name in SOURCES], f"{folder}/cpu.so"
        for name, compiled in zip(SOURCES, objects, strict=True):
            _call(compiler, *_FLAGS, "-c", str(Path(__file__).parent / name), "-o", compiled)
        _call(compiler, "-shared", *objects, "-o", linked)
        os.chmod(linked, 0o600)
        os.replace(linked, target)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_COMPILE_S)


def _open(path: Path) -> ctypes.CDLL:
    """Load a library that nobody else can have written."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or not _is_ours(found):
        raise OSError(f"{path} can be written to by others")
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
