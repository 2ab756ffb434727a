"""The kernels for the CPU are compiled, kept and loaded only where that is safe; without them nothing fails."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mgpu.worker.kernels.cpu import library as library_module
from mgpu.worker.kernels.cpu.library import cache_folder, library
from mgpu.worker.kernels.cpu.tiles import has_kernels, tiled
from mgpu.worker.quantization.packing import pack_int8

COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Look for the library anew, in a folder of the test."""
    monkeypatch.setenv("MGPU_CACHE", str(tmp_path))
    library.cache_clear()
    has_kernels.cache_clear()
    yield
    library.cache_clear()
    has_kernels.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where libraries were compiled; each is a small one, because compiling takes a second."""
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    targets: list[Path] = []

    def compile_empty(compiler: str, target: Path) -> None:
        targets.append(target)
        source = target.with_suffix(".c")
        source.write_text("int mgpu_answer(void) { return 42; }")
        library_module._call(compiler, "-shared", "-fPIC", str(source), "-o", str(target))

    monkeypatch.setattr(library_module, "_compile", compile_empty)
    return targets


def answer(found: ctypes.CDLL | None) -> int:
    assert found is not None
    return int(found.mgpu_answer())


def test_a_library_is_compiled_once_and_kept(compiled: list[Path]) -> None:
    assert answer(library()) == 42
    library.cache_clear()
    assert answer(library()) == 42
    assert [target.parent for target in compiled] == [cache_folder()]
    assert cache_folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_to_is_not_used(compiled: list[Path]) -> None:
    cache_folder().mkdir()
    cache_folder().chmod(0o777)
    assert answer(library()) == 42
    assert cache_folder() not in compiled[0].parents
    assert not compiled[0].exists()


def test_a_folder_that_cannot_be_made_is_not_used(compiled: list[Path]) -> None:
    cache_folder().write_text("a file")
    assert answer(library()) == 42
    assert cache_folder() not in compiled[0].parents


def test_a_user_without_a_home_has_kernels_too(compiled: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MGPU_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert answer(library()) == 42
    assert not compiled[0].exists()


def test_a_kept_library_that_is_broken_is_compiled_elsewhere(compiled: list[Path]) -> None:
    cache_folder().mkdir(mode=0o700)
    (cache_folder() / f"cpu-{library_module._key()}.so").write_bytes(b"not a library")
    assert answer(library()) == 42
    assert cache_folder() not in compiled[0].parents


@pytest.mark.parametrize("kind", ["writable", "link"])
def test_a_kept_library_that_others_may_have_written_is_compiled_elsewhere(compiled: list[Path], kind: str) -> None:
    library()
    library.cache_clear()
    kept = compiled[0]
    if kind == "writable":
        kept.chmod(0o666)
    else:
        other = kept.rename(kept.with_suffix(".other"))
        kept.symlink_to(other)
    assert answer(library()) == 42
    assert len(compiled) == 2
    assert compiled[1].parent != kept.parent


def test_a_compiler_that_fails_leaves_the_product_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\necho 'no such processor' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert library() is None
    assert "no such processor" in caplog.text


@pytest.mark.parametrize("reason", ["no compiler", "MGPU_KERNELS=0"])
def test_without_kernels_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str) -> None:
    if reason == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("MGPU_KERNELS", "0")
    assert library() is None
    assert tiled(pack_int8(torch.ones(16, 64, dtype=torch.int8), torch.ones(16))) is None


def test_kernels_that_multiply_wrongly_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from mgpu.worker.kernels.cpu import tiles

    monkeypatch.setattr(tiles, "library", lambda: ctypes.CDLL(None))
    monkeypatch.setattr(tiles, "multiply", lambda x, weight: torch.zeros(len(x), weight.outputs, dtype=torch.bfloat16))
    assert not has_kernels()
