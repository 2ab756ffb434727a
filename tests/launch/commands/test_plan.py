"""`mgpu-launch plan` from the command line."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from harness.command_line import run_command
from harness.models.demo_model import demo_model
from harness.models.model_files import write_llama_folder

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("Qwen3-32B")
    (folder / "config.json").write_text(json.dumps(QWEN3_32B))
    return str(folder)


def launch(*args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return run_command("plan", *args, **environ)


@pytest.mark.parametrize(
    ("count", "title"),
    [(1, "whole model on one GPU"), (2, "tensor-parallel over 2"), (4, "over 4"), (8, "over 8"), (16, "on 2 ranks")],
)
def test_described_machines(model: str, count: int, title: str) -> None:
    done = launch("-m", model, "--gpus", str(count))
    assert done.returncode == 0, done.stderr
    assert title in done.stdout
    assert done.stderr == ""


def test_several_hosts_are_planned_without_an_address_to_join(model: str) -> None:
    done = launch(model, "--gpus", "4xH200", "--nodes", "2", "-n", "0+1+2+3:32;4+5+6+7:32")
    assert done.returncode == 0, done.stderr
    assert_has_all(done.stdout, "host 1 has ranks 4, 5, 6, 7", "partial sums by nccl", "speed: not estimated")
    assert "peer access" not in done.stdout


@pytest.mark.parametrize(("count", "taken"), [(1, "one GPU"), (2, "GPU 0 of 2"), (4, "0, 1, 2 of 4"), (8, "1, 2 of 8")])
def test_the_demo_runs_on_any_number_of_gpus_and_says_on_which(count: int, taken: str) -> None:
    done = launch("demo", "--gpus", str(count), MGPU_CACHE=str(Path(demo_model()).parent.parent))
    assert done.returncode == 0, done.stderr
    assert taken in " ".join(done.stdout.split())


def test_the_layout_fits_80_columns_unless_the_wide_one_is_asked_for(model: str) -> None:
    done = launch(model, "--gpus", "8")
    lines = [line for line in done.stdout.splitlines() if model not in line]  # a command to type is not broken
    assert max(map(len, lines)) <= 80
    assert "own [0, 1)" not in done.stdout
    assert "own [0, 1)" in launch(model, "--gpus", "8", "-v").stdout


def test_the_file_of_the_demo_is_a_model_like_others() -> None:
    done = launch(demo_model(), "--gpus", "2")
    assert done.returncode == 78
    assert_has_all(done.stderr, "Compatible sizes: 1, 3, 9", "Use --gpus 1 instead")


def test_the_model_may_be_named_without_its_option(model: str) -> None:
    named = launch("-m", model, "--gpus", "2")
    for arguments in ([model], [model, "-m", model]):
        assert launch(*arguments, "--gpus", "2").stdout == named.stdout != ""
    done = launch(model, "-m", "another", "--gpus", "2")
    assert done.returncode == 64
    assert_has_all(done.stderr, model, "-m 'another'", "name one")


@pytest.mark.parametrize("count", [3, 6])
def test_refusals_are_one_line_with_a_status(model: str, count: int) -> None:
    done = launch("-m", model, "--gpus", str(count))
    assert done.returncode == 78
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert_has_all(done.stderr, "1, 2, 4, 8, 16, 32, 64", f"Use --gpus {2 if count == 3 else 4} instead")


def test_json(model: str) -> None:
    data = json.loads(launch("-m", model, "--gpus", "141GiB,80GiB", "-n", "0:40;1:24", "--json").stdout)
    assert data["mode"] == "layer-mapped"
    assert [rank["layers"] for rank in data["ranks"]] == [[0, 40], [40, 64]]
    assert data["ranks"][0]["total_bytes"] == 141 << 30


def test_the_nccl_switch(model: str) -> None:
    assert "layer-mapped over 2 GPUs" in launch("-m", model, "--gpus", "2", MGPU_NO_NCCL="1").stdout


def test_options_may_come_from_the_environment(model: str) -> None:
    assert "(--tp 2)" in launch("--gpus", "4", MGPU_MODEL=model, MGPU_TP="2").stdout


def test_cpu_workers(tmp_path: Path) -> None:
    config = QWEN3_32B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = ("-m", str(tmp_path), "--device", "cpu")
    assert "one worker on the CPU" in launch(*args).stdout
    assert "tensor-parallel over 4 CPU workers" in launch(*args, "--workers", "4").stdout
    assert "tensor-parallel over 2 CPU workers" in launch(*args, "--tp", "2").stdout
    assert "layer-mapped over 3 CPU workers" in launch(*args, "-n", "0:1;2:2;1:1").stdout


@pytest.mark.parametrize(("args", "expected"), [
    (["--gpus", "4", "-n", "0:32"], "64 layers"),
    (["--gpus", "4", "-n", "0:32;1:32", "--tp", "2"], "contradict"),
    (["--gpus", "4", "--max-seq-len", "99999"], "40960"),
    (["--gpus", "4", "--workers", "2"], "--gpus"),
    (["--gpus", "many"], "141GiB,80GiB"),
    (["--gpus", "24GiB"], "4 GPUs of this size"),
    (["--device", "cuda"], "--device cpu"),
    (["--client-weights", "x"], "--client-weights"),
    (["--bind", "tcp://0.0.0.0:5555"], "refusing to bind tcp://0.0.0.0:5555"),
    (["--bind", "/tmp/x"], "use ipc:///path/to/socket or tcp://"),
])  # fmt: skip
def test_mistakes_end_without_a_traceback(model: str, args: list[str], expected: str) -> None:
    done = launch("-m", model, *args, CUDA_VISIBLE_DEVICES="")
    assert done.returncode not in (0, 1)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_the_configuration_of_a_unit_may_have_its_keys_elsewhere(model: str, tmp_path: Path) -> None:
    config = tmp_path / "unit.toml"
    config.write_text(f'model = "{model}"\nbind = "tcp://*:5555"\n')
    done = launch("--config", str(config), "--gpus", "4")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("args", "status"), [(["--tp", "two"], 78), (["--no-such-option"], 64), (["extra"], 64)])
def test_wrong_usage_has_another_status(model: str, args: list[str], status: int) -> None:
    done = launch("-m", model, *args)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    write_llama_folder(tmp_path)
    done = launch(str(tmp_path), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert_has_all(done.stderr, "no tokenizer.json", "only requests with prompt_ids will work")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert launch(str(tmp_path), "--device", "cpu").stderr == ""


WITHOUT_GGUF = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gguf" else found(name, *rest)
from mgpu.launch.cli import main
main()
"""


@pytest.mark.parametrize("command", ["plan", "serve"])
def test_plan_and_serve_refuse_a_file_that_needs_the_gguf_package(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GGUF, command, demo_model(), "--device", "cpu"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert "tensors needs the gguf package; type: pip install gguf" in done.stderr


def test_planning_takes_little_cpu_time(model: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mgpu.launch.cli", "plan", model, "--gpus", "4"]
    assert "tensor-parallel over 4" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # a quarter on a quiet machine


def test_planning_imports_neither_torch_nor_the_driver(model: str) -> None:
    code = (
        "import sys\n"
        "from mgpu.launch.commands.plan import plan_command\n"
        f"plan_command(['-m', {model!r}, '--gpus', '2'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'numpy', 'pynvml', 'zmq', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_folder_with_pickled_weights_only_is_refused_as_serve_does(model: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    done = launch("-m", str(tmp_path), "--gpus", "2")
    assert done.returncode == 78
    assert "no .safetensors weights; 'pytorch_model.bin' can run code when it is read" in done.stderr


def test_all_gpus_and_a_map_are_not_asked_for_at_once(model: str) -> None:
    done = launch("-m", model, "--gpus", "2", "--tp", "0", "-n", "0:32;1:32")
    assert done.returncode == 78
    assert "--tp 0 (command line) asks for all GPUs and --device-layers (command line) for certain ones" in done.stderr
    assert launch("-m", model, "--gpus", "2", "-n", "0:32;1:32").returncode == 0


def test_the_status_says_that_there_is_no_gpu(model: str) -> None:
    done = launch("-m", model, "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 69
    assert "no GPU is visible" in done.stderr


def test_a_plan_has_the_speed_and_recommends_what_to_type(model: str) -> None:
    done = launch(model, "--gpus", "2xH200", "--max-rows", "64", "--no-prefix-cache")
    text = " ".join(done.stdout.split())
    assert "speed, estimated: 107 tokens/s of one stream" in text
    assert "within 15 % of measurements" in text
    command = text[text.index("type: ") :].replace(" \\", "")
    assert command == f"type: mgpu-launch serve {model} --max-rows 64 --no-prefix-cache --quant fp8"
    found = json.loads(launch(model, "--gpus", "2xH200", "--json").stdout)
    assert found["speed"]["tokens_per_s_of_1_stream"] == pytest.approx(104.5, rel=0.15)
    assert found["recommended"][0]["options"] == "--quant fp8"
