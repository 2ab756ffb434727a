"""Fixtures of the worker's tests. Without a GPU, kernels run in Triton's interpreter."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from harness.models.random_model import write_random_model
from harness.models.tiny_models import TinyModel, make_tiny_model
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # other tests have the other cores

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any kernel module is imported

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from harness.kernels.triton_interpreter import mend_interpreter

    mend_interpreter()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Make a tiny model of a family; each family once per session."""
    made: dict[str, TinyModel] = {}

    def make(family: str) -> TinyModel:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a llama with random weights."""
    return write_random_model(tmp_path_factory.mktemp("random-model"))


@pytest.fixture(scope="session")
def checkpoint(random_model: Path) -> Checkpoint:
    return read_checkpoint(random_model)
