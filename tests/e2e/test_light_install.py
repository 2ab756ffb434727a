"""An installation without the extra `serve`: the clients work, and what needs more says what to install.

A folder with links to the few packages of the base stands for it; Python sees no other packages.
"""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder

ROOT = Path(__file__).parents[2]
BASE = ("zmq", "pyzmq.libs", "msgpack")
CLIENT = """
import asyncio, sys, mgpu
with mgpu.Client(sys.argv[1]) as client:
    assert client.generate([5], max_tokens=2).token_ids == (5, 5)
    assert "".join(piece.text for piece in client.stream("hi", max_tokens=2)) == "hi"
    assert [str(each) for each in client.map(["a", "b"], max_tokens=1)] == ["a", "b"]
    assert client.count_tokens([{"role": "user", "content": "Hi"}]) > 3

async def ask():
    async with mgpu.AsyncClient(sys.argv[1]) as client:
        return (await client.generate([6], max_tokens=1)).token_ids

assert asyncio.run(ask()) == (6,)
assert not [name for name in ("torch", "click", "numpy", "tokenizers") if name in sys.modules]
"""
COMMAND = "import sys; sys.argv[0] = 'mgpu-launch'; from mgpu.__main__ import main; main()"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("tiny-model"))) as gateway:
        yield gateway


def run(folder: Path, packages: tuple[str, ...], code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a Python that has only these packages, and mgpu."""
    import msgpack
    import zmq

    homes = {"mgpu": ROOT / "src", "msgpack": Path(msgpack.__file__).parents[1]}
    for name in ("mgpu", *packages):
        package = homes.get(name, Path(zmq.__file__).parents[1]) / name
        if package.exists():  # pyzmq.libs is in wheels only
            (folder / name).symlink_to(package)
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_the_clients_work_with_pyzmq_and_msgpack_alone(tmp_path: Path, gateway: GatewayProcess) -> None:
    done = run(tmp_path, BASE, CLIENT, gateway.endpoint)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_without_click_says_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path, BASE, COMMAND, "serve", "demo")
    assert done.returncode == 78
    assert done.stderr == (
        "error: mgpu-launch needs click; type: pip install mgpu, or pip install 'mgpu[serve]' to serve models\n"
    )


@pytest.mark.parametrize("arguments", [
    ("serve", "demo"), ("serve", "--no-such-option"), ("serve", "--help"), ("plan", "demo"), ("demo",), ("bench",),
    ("install-service", "x"), ("doctor",),
])  # fmt: skip
def test_commands_that_serve_say_what_to_install(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, (*BASE, "click"), COMMAND, *arguments)
    assert done.returncode == 78
    assert done.stderr.startswith(
        f"error: this installation of mgpu has the client only, and `mgpu-launch {arguments[0]}`"
    )
    assert "psutil" in done.stderr
    assert "pip install 'mgpu[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_that_talk_to_a_server_work(tmp_path: Path, gateway: GatewayProcess) -> None:
    done = run(
        tmp_path, (*BASE, "click"), COMMAND, "generate", "hi", "--max-tokens", "4", "--endpoint", gateway.endpoint
    )
    assert (done.stdout, done.stderr) == ("hihi\n", "")


def test_help_lists_all_commands(tmp_path: Path) -> None:
    done = run(tmp_path, (*BASE, "click"), COMMAND, "--help")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.split()[:1] == ["serve"] and "mgpu[serve]" in line]
    assert [line for line in done.stdout.splitlines() if line.split()[:1] == ["chat"] and "mgpu[serve]" not in line]


@pytest.mark.parametrize(("words", "offered"), [("mgpu-launch se", "plain,serve\n"), ("mgpu-launch serve --", None)])
def test_completion_does_not_fail(tmp_path: Path, words: str, offered: str | None) -> None:
    variables = {"_MGPU_LAUNCH_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = run(tmp_path, (*BASE, "click"), f"import os; os.environ.update({variables})\n{COMMAND}")
    assert done.stderr == ""
    assert offered in (done.stdout, None)


def test_the_versions_are_shown(tmp_path: Path) -> None:
    done = run(tmp_path, (*BASE, "click"), COMMAND, "--version", "-v")
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("mgpu-launch, version")


def test_the_base_is_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [each.split(">")[0] for each in project["dependencies"]] == ["pyzmq", "msgpack", "click"]
    serve = {each.split(">")[0] for each in project["optional-dependencies"]["serve"]}
    assert serve >= {"torch", "psutil", "tokenizers", "jinja2", "nvidia-ml-py", "gguf", "numpy"}
