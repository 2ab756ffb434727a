"""Where downloads and compiled kernels are kept."""

from pathlib import Path

import pytest

from mgpu.protocol.cache_root import cache_root


@pytest.mark.parametrize(("environ", "expected"), [
    ({"MGPU_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
    ({"XDG_CACHE_HOME": "/b"}, Path("/b/mgpu")),
    ({}, Path.home() / ".cache" / "mgpu"),
])  # fmt: skip
def test_the_cache_folder(environ: dict[str, str], expected: Path) -> None:
    assert cache_root(environ) == expected
