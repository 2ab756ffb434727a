"""Real servers, on the real model or on a random one. Every server has a runtime directory of its own.

Tests of what a model says take the real one; tests of processes, sockets and streams take the random one.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.models.demo_model import demo_model
from harness.models.text_model import write_text_model
from mgpu.launch.server_process import ServerProcess

REAL_NAME = "smollm2"
"""What the shared server calls the real model."""


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


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a small random model that reads and writes text."""
    return str(write_text_model(tmp_path_factory.mktemp("text-model")))


@pytest.fixture(scope="module")
def random_server(text_model: str) -> Iterator[ServerProcess]:
    """One worker with the random model."""
    with ServerProcess("-m", text_model, "--device", "cpu") as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def random_endpoint(random_server: ServerProcess) -> str:
    return random_server.wait_ready()


@pytest.fixture(scope="session")
def server(smollm2: str) -> Iterator[ServerProcess]:
    """One worker with SmolLM2 in fp32 on the CPU, and HTTP. Files share it, so they leave it as it is."""
    options = ("--device", "cpu", "--max-seq-len", "1024", "--served-name", REAL_NAME, "--http", "127.0.0.1:0")
    with ServerProcess("-m", smollm2, *options) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="session")
def endpoint(server: ServerProcess) -> str:
    return server.wait_ready()
