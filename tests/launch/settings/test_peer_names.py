"""Unknown commands and options: the message names what is meant."""

import pytest
from click.testing import CliRunner

from mgpu.launch.cli import cli


def refused(*args: str) -> str:
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(("typed", "meant"), [("serv", "'serve'"), ("generat", "'generate'"), ("stat", "'status'")])
def test_a_command_with_a_typing_mistake_gets_the_near_name(typed: str, meant: str) -> None:
    assert f"No such command '{typed}'. Did you mean {meant}" in refused(typed)


@pytest.mark.parametrize(("typed", "meant"), [
    ("run", "serve MODEL"), ("list", "mgpu-launch status"), ("pull", "downloads"), ("stop", "SIGTERM"),
    ("server", "serve MODEL"), ("version", "--version"), ("check", "mgpu-launch doctor"), ("help", "--help"),
])  # fmt: skip
def test_a_command_of_another_program_gets_a_sentence(typed: str, meant: str) -> None:
    said = refused(typed)
    assert meant in said
    assert "Did you mean" not in said


def test_a_word_that_resembles_nothing_gets_the_list() -> None:
    assert "The commands are: serve, plan," in refused("xyzzy")


@pytest.mark.parametrize(("typed", "meant"), [
    (("--port", "8000"), "--bind tcp://127.0.0.1:8000"),
    (("--port=8000", "--host=10.0.0.5"), "--bind tcp://10.0.0.5:8000"),
    (("--host", "10.0.0.5"), "--bind tcp://10.0.0.5:PORT"),
    (("--port", "8000"), "--http 127.0.0.1:8000"),
    (("--api-key", "secret"), "--http-keys FILE"),
    (("--ssl-certfile", "x.pem"), "--http-tls-cert x.pem"),
    (("--tensor-parallel-size", "2"), "--tp 2"),
    (("-tp", "2"), "--tp 2"),
    (("--max-model-len=8k",), "--max-seq-len 8k"),
    (("-c", "4096"), "--max-seq-len 4096"),
    (("--max-sequence-len", "4096"), "--max-seq-len 4096"),
    (("--ctx-size", "4096"), "--max-seq-len 4096"),
    (("--gpu-memory-utilization", "0.8"), "--memory-fraction 0.8"),
    (("--quantization", "bitsandbytes"), "--quant 8"),
    (("--quantization", "fp8"), "--quant fp8"),
    (("--quantization", "awq"), "'awq' names a format of files, and that comes from the model's files: leave it out"),
    (("-q", "gptq_marlin"), "leave it out. --quant 8, 4 or fp8 quantizes while loading"),
    (("--quantization",), "--quant 8"),
    (("-ngl", "99"), "all layers run on the GPUs"),
    (("--n-gpu-layers", "99"), "all layers run on the GPUs"),
    (("--served-model-name", "x"), "--served-name x"),
    (("--max-num-seqs", "64"), "--max-rows 64"),
    (("--max-num-batched-tokens", "2048"), "--max-batch-tokens 2048"),
    (("-c", "server.toml"), "--config server.toml"),
    (("-ctx", "4096"), "--max-seq-len 4096"),
    (("--data-parallel-size", "2"), "--replicas 2"),
    (("--load-in-4bit",), "--quant 4"),
    (("--bits", "8"), "--quant 8"),
    (("--local-files-only",), "--offline"),
    (("--reasoning-parser", "qwen3"), "chat template shows it; leave it out"),
    (("--temp", "0.7"), "each request chooses its sampling"),
    (("--cpu-offload-gb", "4"), "all weights must fit the GPUs"),
    (("--enable-chunked-prefill",), "by itself; leave it out"),
    (("-fa", "on"), "chosen by the server"),
    (("--hf-token", "x"), "HF_TOKEN"),
    (("--speculative-config", "{}"), "no speculative decoding"),
    (("--lora", "x"), "no adapters"),
    (("--rope-scaling", "{}"), "config.json says it"),
    (("--nnodes", "2"), "one machine"),
    (("--mmproj", "x"), "text only"),
    (("--gpu", "1"), "CUDA_VISIBLE_DEVICES"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["serve", "plan", "config"])
def test_an_option_of_another_server_gets_ours_with_the_value(command: str, typed: tuple[str, ...], meant: str) -> None:
    said = refused(command, *typed)
    assert meant.lower() in said.lower()
    assert "Did you mean" not in said


@pytest.mark.parametrize(("typed", "meant"), [
    (("http", "--port", "8001"), "Here it is --http 127.0.0.1:8001."),
    (("route", "--port=8001"), "Here it is --http 127.0.0.1:8001 (--bind tcp://127.0.0.1:8001 is for"),
    (("route", "--worker-urls", "ipc:///a"), "Here it is --replica ipc:///a."),
    (("generate", "x", "--host", "10.0.0.5"), "Here it is --endpoint tcp://10.0.0.5:PORT."),
    (("generate", "x", "--max-new-tokens", "5"), "Here it is --max-tokens 5."),
    (("generate", "x", "--format", "json"), "Here it is --json-schema FILE."),
    (("generate", "x", "--stream"), "Answers are shown as they come"),
    (("generate", "x", "--system", "y"), "'mgpu-launch chat' takes a system message"),
    (("generate", "x", "--min-p", "0.1"), "those of mgpu.Client and of HTTP"),
    (("chat", "--multiline"), 'two lines of """'),
    (("chat", "--model", "x"), "The model is chosen when the server starts"),
    (("status", "--watch"), "'mgpu-launch top'"),
])  # fmt: skip
def test_other_commands_answer_too(typed: tuple[str, ...], meant: str) -> None:
    assert meant in refused(*typed)


@pytest.mark.parametrize(("command", "typed"), [("generate", "--json"), ("serve", "--qort"), ("status", "--port")])
def test_names_that_only_look_alike_are_not_suggested(command: str, typed: str) -> None:
    assert "Did you mean" not in refused(command, typed)


def test_an_option_with_a_typing_mistake_gets_the_near_name() -> None:
    assert "Did you mean '--max-rows'?" in refused("serve", "--max-row", "3")
    assert "Did you mean '--temperature'?" in refused("chat", "--temper", "3")


def test_a_value_that_looks_like_an_option_is_a_value() -> None:
    assert CliRunner().invoke(cli, ["config", "--served-name", "--port"]).exit_code == 0
    assert CliRunner().invoke(cli, ["config", "-n0:1"]).exit_code == 0


@pytest.mark.parametrize("command", ["chat", "status", "top"])
def test_a_model_behind_a_command_that_takes_none_is_answered(command: str) -> None:
    said = refused(command, "nomodel")
    assert f"{command} takes no argument, and got 'nomodel'" in said
    assert "The model is chosen when the server starts: 'mgpu-launch serve MODEL'" in said
