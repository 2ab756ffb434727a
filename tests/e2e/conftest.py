"""Real servers on the real model. Every server has a runtime directory of its own and ends with its fixture."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.demo_model import demo_model
from mgpu.launch.server_process import ServerProcess


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of SmolLM2-135M-Instruct; obtained like a user's, the first time."""
    return demo_model()


@pytest.fixture(scope="session")
def gemma3() -> str:
    """Path of Gemma 3 270M; its golden file says how to obtain it."""
    path = Path(demo_model()).parent / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not in the cache folder; tests/golden/gemma-3-270m.json says how to obtain it")
    return str(path)


@pytest.fixture(scope="module")
def server(smollm2: str) -> Iterator[ServerProcess]:
    """One worker with SmolLM2 in fp32 on the CPU."""
    with ServerProcess("-m", smollm2, "--device", "cpu", "--max-seq-len", "1024") as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def endpoint(server: ServerProcess) -> str:
    return server.wait_ready()
