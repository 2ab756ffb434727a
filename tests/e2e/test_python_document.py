"""The Python of the README, of docs/python.md and of docs/tools.md runs as it stands, from the shortest script on."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.answers.tool_templates import QWEN
from harness.servers.gateway_process import GatewayProcess, make_model_folder, says

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    pytest.param(source, id=f"{page}-{number}")
    for page in ("README.md", "docs/python.md", "docs/tools.md")
    for number, source in enumerate(re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S))
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("tiny-model"), QWEN)) as gateway:
        yield gateway


@pytest.mark.parametrize("source", SCRIPTS)
def test_a_script_runs_as_it_stands(gateway: GatewayProcess, source: str) -> None:
    gateway.engine.script = says("Paris")
    gateway.set_info(max_seq_len=4096)  # tools are long
    environment = {**os.environ, "MGPU_ENDPOINT": gateway.endpoint, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", source], env=environment, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout or "print(piece.text" not in source


def test_the_shortest_script_comes_first() -> None:
    for page in ("README.md", "docs/python.md"):
        first = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)[0]
        code = [line for line in first.splitlines() if line]
        assert code[0] == "from mgpu import Client"
        assert any("generate(" in line for line in code[:3])
