"""`plan` and `serve` refuse the same mistakes with the same words and the same status."""

import importlib.util
import os
import resource
import socket
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import zmq

from harness.models.demo_model import demo_model
from harness.models.model_files import LLAMA_CONFIG, write_config, write_llama_folder
from mgpu.launch import cli
from mgpu.launch.commands.install.keygen import make_server
from mgpu.launch.settings.config import ServeConfig, load_config
from mgpu.launch.settings.config_file import config_text
from mgpu.orchestrator.gateway.front.endpoint import bind, release
from mgpu.orchestrator.processes import task_limits
from mgpu.orchestrator.processes.task_limits import TaskLimit
from mgpu.orchestrator.server import Server

GOOD = "good"
Files = Callable[[Path], None]


def nothing(folder: Path) -> None: ...


def keys_without_clients(folder: Path) -> None:
    make_server(folder / "keys")


def open_keys(folder: Path) -> None:
    make_server(folder / "keys")
    (folder / "keys").chmod(0o777)


def config_with(**changes: object) -> Files:
    def write(folder: Path) -> None:
        (folder / "m").mkdir()
        write_config(folder / "m", {**LLAMA_CONFIG, **changes})
        (folder / "m" / "model.safetensors").write_bytes(b"")

    return write


def broken_json(folder: Path) -> None:
    write_llama_folder(make(folder / "m"))
    (folder / "m" / "config.json").write_text("{")


def cut_weights(folder: Path) -> None:
    write_llama_folder(make(folder / "m"))
    data = (folder / "m" / "model.safetensors").read_bytes()
    (folder / "m" / "model.safetensors").write_bytes(data[:-1])


def pickled(folder: Path) -> None:
    write_config(make(folder / "m"), LLAMA_CONFIG)
    (folder / "m" / "pytorch_model.bin").write_bytes(b"")


def bad_toml(folder: Path) -> None:
    (folder / "c.toml").write_text("max_rows = [")


def unknown_key(folder: Path) -> None:
    (folder / "c.toml").write_text('max_row = 3\nmodel = "x"')


def plain_file(folder: Path) -> None:
    (folder / "m.bin").write_text("x")


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


MISTAKES: list[tuple[list[str], int, str, Files]] = [
    # models
    ([], 78, "-m takes a model folder", nothing),
    (["none/such/path"], 78, "no such file or folder; -m takes", nothing),
    (["demoo"], 78, "demoo: no such file or folder; did you mean demo?", nothing),
    (["./m.bim"], 78, "did you mean ./m.bin?", plain_file),
    (["./demo"], 78, "no such file or folder; -m takes", nothing),
    (["m.bin"], 78, "a file that is not .gguf", plain_file),
    (["m"], 78, "supported architectures", config_with(architectures=["BertModel"])),
    (["m"], 78, "config.json", broken_json),
    (["m"], 78, "model.safetensors", cut_weights),
    (["m"], 78, "can run code", pickled),
    (["a", "-m", "b"], 64, "two models", nothing),
    # values
    ([GOOD, "--tp", "two"], 78, "--tp is 'two'", nothing),
    ([GOOD, "--tp", "-1"], 78, "--tp", nothing),
    ([GOOD, "--quant", "5"], 78, "choose one of", nothing),
    ([GOOD, "--dtype", "int8"], 78, "choose one of", nothing),
    ([GOOD, "--max-rows", "0"], 78, "between 1 and 4096", nothing),
    ([GOOD, "--kv-memory", "lots"], 78, "is not a size", nothing),
    ([GOOD, "--memory-fraction", "2"], 78, "--memory-fraction", nothing),
    ([GOOD, "--hang-timeout", "0"], 78, "--hang-timeout", nothing),
    ([GOOD, "--no-such-option"], 64, "No such option", nothing),
    ([GOOD, "--port", "80"], 64, "--bind tcp://", nothing),
    (["--config", "none.toml", GOOD], 78, "none.toml", nothing),
    (["--config", "c.toml", GOOD], 78, "not valid TOML", bad_toml),
    (["--config", "c.toml"], 78, "did you mean 'max_rows'", unknown_key),
    # layout and memory
    ([GOOD, "--tp", "3", "--workers", "3"], 78, "Compatible sizes", nothing),
    ([GOOD, "--tp", "2", "-n", "0:1;1:1"], 78, "contradict", nothing),
    ([GOOD, "-n", "0:99"], 78, "layers", nothing),
    ([GOOD, "--max-seq-len", "1M"], 78, "--max-seq-len", nothing),
    ([GOOD, "--max-batch-tokens", "9", "--max-rows", "9"], 78, "must exceed max_rows", nothing),
    ([GOOD, "--kv-memory", "900TiB"], 78, "does not fit", nothing),
    ([GOOD, "--device", "cuda"], 69, "no GPU is visible", nothing),
    ([GOOD, "--workers", "5000"], 78, "--workers 5000", nothing),
    # the front
    ([GOOD, "--client-weights", "x"], 78, "--client-weights has 'x'", nothing),
    ([GOOD, "--client-weights", "a=1,a=2"], 78, "twice", nothing),
    ([GOOD, "--served-name", "\udcff"], 78, "UTF-8", nothing),
    ([GOOD, "--http", "0.0.0.0:80"], 78, "refusing to serve HTTP", nothing),
    ([GOOD, "--http", "nowhere"], 78, "--http nowhere", nothing),
    ([GOOD, "--http", "unix:/none/such/x"], 78, "/none/such: No such file", nothing),
    ([GOOD, "--http", "192.0.2.7:80", "--http-no-auth"], 78, "no such address", nothing),
    ([GOOD, "--http-keys", "none.txt"], 78, "none.txt", nothing),
    ([GOOD, "--http-keys", "m.bin", "--http-no-auth"], 78, "drop one of them", plain_file),
    ([GOOD, "--http-tls-cert", "m.bin"], 78, "--http-tls-key is missing", plain_file),
    ([GOOD, "--http-cors", "nowhere"], 78, "--http-cors has 'nowhere'", nothing),
    (["./typo", "--http", "0.0.0.0:80"], 78, "no such file or folder", nothing),
    (["hf:nothing"], 78, "not the name of a model of the hub", nothing),
    (["x" * 300], 78, "cannot be looked up", nothing),
    ([GOOD, "--bind", "/tmp/x"], 78, "use ipc:///path/to/socket", nothing),
    ([GOOD, "--bind", "ipc://relative"], 78, "must be absolute", nothing),
    ([GOOD, "--bind", "ipc:///none/such/x"], 78, "does not exist", nothing),
    ([GOOD, "--bind", f"ipc:///tmp/{'x' * 120}"], 78, "use a shorter one", nothing),
    ([GOOD, "--bind", "tcp://0.0.0.0:5555"], 78, "refusing to bind", nothing),
    ([GOOD, "--bind", "tcp://localhost:5555"], 78, "write the address", nothing),
    ([GOOD, "--bind", "tcp://127.0.0.1:99999"], 78, "with a port from 0", nothing),
    ([GOOD, "--bind", "tcp://*:0", "--keys", "keys"], 78, "is no folder of keys", nothing),
    ([GOOD, "--bind", "tcp://*:0", "--keys", "keys"], 78, "nobody could connect", keys_without_clients),
    ([GOOD, "--bind", "tcp://*:0", "--keys", "keys"], 78, "other users may change", open_keys),
    ([GOOD, "--bind", "tcp://127.0.0.1:0", "--keys", "m.bin"], 78, "is a file", plain_file),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_llama_folder(make(tmp_path / GOOD))
    (tmp_path / GOOD / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("MGPU_", "CREDENTIALS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def outcome(
    command: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int | str | None, str]:
    """Run a command in this process; return its status and what it said."""
    monkeypatch.setattr(sys, "argv", ["mgpu-launch", command, *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code, said.err.replace(f"mgpu-launch {command}", "mgpu-launch COMMAND")


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(server: Server) -> int:
        raise AssertionError("a server was started")

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(cli, "open_standard_files", lambda: None)
    monkeypatch.setattr(cli, "end_first_process_at_sigterm", lambda: None)


@pytest.mark.parametrize(("words", "status", "text", "files"), MISTAKES)
def test_plan_and_serve_refuse_the_same_with_the_same_words(
    words: list[str], status: int, text: str, files: Files, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files(place)
    planned, served = (outcome(command, words, monkeypatch, capsys) for command in ("plan", "serve"))
    assert planned == served
    assert planned[0] == status
    assert text in planned[1]
    assert "Traceback" not in planned[1]


@pytest.mark.parametrize("variable", ["MGPU_MAX_ROW", "MGPU_LOG_LEVEL"])
def test_the_environment_is_refused_alike(
    variable: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "foo")
    planned, served = (outcome(command, [GOOD], monkeypatch, capsys) for command in ("plan", "serve"))
    assert planned == served
    assert planned[0] == 78
    assert variable in planned[1]


def test_a_missing_package_is_refused_alike(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def without_gguf(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "gguf" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_gguf)
    planned, served = (outcome(command, [demo_model()], monkeypatch, capsys) for command in ("plan", "serve"))
    assert planned == served
    assert planned[0] == 78
    assert "pip install gguf" in planned[1]


def test_a_low_limit_of_open_files_is_refused_alike(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20, 40))
    planned, served = (outcome(command, [GOOD], monkeypatch, capsys) for command in ("plan", "serve"))
    assert planned == served
    assert planned[0] == 78
    assert "40 open files here and a server needs 256" in planned[1]
    assert "LimitNOFILE=65536" in planned[1]  # a unit's limit is the hard one too: 1024 would stop clients early


def test_a_low_limit_of_processes_is_refused_alike(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_limits, "least_task_limit", lambda: TaskLimit("ulimit -u", 20, 9, "ulimit -u 4096"))
    planned, served = (outcome(command, [GOOD], monkeypatch, capsys) for command in ("plan", "serve"))
    assert planned == served
    assert planned[0] == 78
    assert "processes and threads, and ulimit -u allows 20, of which 9 run" in planned[1]
    assert outcome("plan", [GOOD, "--gpus", "2"], monkeypatch, capsys)[0] == 0  # another machine


def test_weights_that_are_not_needed_are_not_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_weights(place)
    status, said = outcome("plan", ["m", "--load-format", "dummy"], monkeypatch, capsys)
    assert status == 0, said


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_an_endpoint_in_use_is_refused_before_anything_is_started(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        endpoint, lock = bind(socket, "tcp://127.0.0.1:0" if kind == "tcp" else f"ipc://{place}/front.sock")
        status, said = outcome("serve", [GOOD, "--bind", endpoint], monkeypatch, capsys)
        socket.close(linger=0)
    release(endpoint, lock)
    assert (status, "is listening" in said, len(said.splitlines())) == (1, True, 1)
    with pytest.raises(AssertionError, match="a server was started"):
        outcome("serve", [GOOD, "--bind", endpoint], monkeypatch, capsys)


# plan --write


@pytest.mark.parametrize("name", ["server.toml", "with blank.toml"])
def test_what_plan_writes_is_what_serve_reads(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MGPU_MAX_ROWS", "7")
    options = ["--kv-memory", "64MiB", "--no-prefix-cache", "--drain-timeout", "2.5", "--quant", "int8"]
    options += ["--served-name", 'a "b" \\ é', "--workers", "2", "--device", "cpu"]
    assert outcome("plan", [GOOD, *options, "--write", name], monkeypatch, capsys)[0] == 0
    monkeypatch.delenv("MGPU_MAX_ROWS")
    config, origins = load_config({}, {}, place / name)
    assert config.model == str(place / GOOD)
    assert (config.max_rows, config.kv_memory, config.prefix_cache, config.drain_timeout_s) == (7, 64 << 20, False, 2.5)
    assert (config.quant, config.served_name, config.workers) == ("8", 'a "b" \\ é', 2)
    assert origins["seed"] == "default"
    assert (place / name).read_text().startswith("# mgpu-launch serve --config")
    monkeypatch.chdir("/")
    assert outcome("plan", ["--config", str(place / name)], monkeypatch, capsys)[0] == 0


def test_plan_overwrites_nothing_and_writes_nothing_that_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "old.toml").write_text("mine")
    status, said = outcome("plan", [GOOD, "--write", "old.toml"], monkeypatch, capsys)
    assert (status, "exists already" in said) == (78, True)
    assert (place / "old.toml").read_text() == "mine"
    assert outcome("plan", [GOOD, "--tp", "3", "--write", "new.toml"], monkeypatch, capsys)[0] == 78
    assert not (place / "new.toml").exists()
    status, said = outcome("plan", [GOOD, "--write", "none/x.toml"], monkeypatch, capsys)
    assert (status, "cannot write none/x.toml" in said) == (78, True)


def test_the_topology_that_plan_writes_is_read_by_plan_and_serve(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "-n", "0:1;cpu:1", "--quant", "8"]
    status, said = outcome("plan", [GOOD, *options, "--topology-out", "t.yaml"], monkeypatch, capsys)
    assert (status, "serve --topology t.yaml uses it" in said) == (0, True)
    text = (place / "t.yaml").read_text()
    assert text.splitlines()[1:] == [
        "0-1:", '  device: "cpu[0]"', "  quant: 8", "1-2:", '  device: "cpu[1]"', "  quant: 8",
    ]  # fmt: skip
    read = [GOOD, "--device", "cpu", "--topology", "t.yaml"]
    assert outcome("plan", [*read, "--topology-out", "again.yaml", "--write", "s.toml"], monkeypatch, capsys)[0] == 0
    assert (place / "again.yaml").read_text() == text
    assert load_config({}, {}, place / "s.toml")[0].topology == str(place / "t.yaml")
    with pytest.raises(AssertionError, match="a server was started"):
        outcome("serve", read, monkeypatch, capsys)
    (place / "t.yaml").write_text("0-3: {quant: 8}")
    planned, served = (outcome(command, read, monkeypatch, capsys) for command in ("plan", "serve"))
    assert planned == served
    assert (served[0], "line 1, 0-3: the model has 2 layers" in served[1]) == (78, True)


def test_a_name_of_the_hub_stays_a_name(place: Path) -> None:
    origins = {"model": "x", "max_rows": "y", "tp": "default"}
    text = config_text(ServeConfig(model="demo", max_rows=3), origins, ["a", ""])
    assert text == '# a\n#\nmodel = "demo"\nmax_rows = 3\n'


@pytest.mark.parametrize("option", ["--http", "--bind"])
def test_a_port_that_another_program_has_does_not_hide_a_typo(
    option: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        address = f"tcp://127.0.0.1:{port}" if option == "--bind" else f"127.0.0.1:{port}"
        status, said = outcome("serve", ["./goood", option, address], monkeypatch, capsys)
        assert (status, "./goood: no such file or folder" in said) == (78, True)
        _, said = outcome("serve", [GOOD, option, address], monkeypatch, capsys)
        assert str(port) in said
