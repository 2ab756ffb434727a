"""One declaration, four sources: flags over environment over file over default."""

import re
from pathlib import Path

import pytest

from mgpu.launch.settings.config import OTHER_VARIABLES, ServeConfig, declared_options, load_config
from mgpu.launch.settings.values import ConfigError, parse_bytes


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mgpu.toml"
    path.write_text(text)
    return path


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'model = "from-file"\nmax-rows = 8\nblock_size = 32\n')
    environ = {"MGPU_MODEL": "from-environment", "MGPU_MAX_ROWS": "9"}
    config, origins = load_config({"model": "from-flag"}, environ, file)
    assert (config.model, config.max_rows, config.block_size) == ("from-flag", 9, 32)
    assert origins["model"] == "command line"
    assert origins["max_rows"] == "MGPU_MAX_ROWS"
    assert origins["block_size"] == str(file)
    assert origins["tp"] == "default"


def test_nothing_given_is_the_default() -> None:
    assert load_config({}, {}, None)[0] == ServeConfig()


@pytest.mark.parametrize(("text", "message"), [
    ("max-seq-lens = 3", "unknown key 'max-seq-lens'; did you mean 'max_seq_len'?"),
    ("max-rows = 3\nmax_rows = 4", "max_rows is set twice"),
    ("max-rows = true", "must be a whole number"),
    ("max-rows = 0", "must be between 1 and 4096"),
    ("memory-fraction = nan", "must be between 0.05 and 0.99"),
    ("model = 3", "must be text in quotes"),
    ('model = ""', "is empty"),
    ('device = "tpu"', "choose one of auto, cuda, cpu"),
    ('device = "cuda:1"', "choose one of auto, cuda, cpu; CUDA_VISIBLE_DEVICES says which GPUs"),
    ('device = "0,1"', "CUDA_VISIBLE_DEVICES says which GPUs"),
    ('quant = "q4_k_m"', "other formats come from the model's files: leave the option out"),
    ('quant = "AWQ"', "other formats come from the model's files: leave the option out"),
    ('tp = "many"', "is 'many'; it must be a whole number"),
    ('memory-fraction = "most"', "it must be a number"),
    ('memory-fraction = "100%"', "must be between 0.05 and 0.99"),
    ('kv-memory = "2 apples"', "is not a size"),
    ('prefix-cache = "maybe"', "write true or false"),
    ("model = ", "is not valid TOML"),
    ("tp = 2\nmodel = ./tiny  # mine", 'text stands in quotes: model = "./tiny"'),
    ("max-seq-len = 8k", 'text stands in quotes: max-seq-len = "8k"'),
    ("http = 127.0.0.1:8000", 'text stands in quotes: http = "127.0.0.1:8000"'),
    ("prefix-cache = True", "write it in small letters: prefix-cache = true"),
    ("port = 1", 'unknown key \'port\'; here it is http = "127.0.0.1:1" (bind = "tcp://127.0.0.1:1" is for'),
    ('port = 1\nhost = "0.0.0.0"', 'here it is http = "0.0.0.0:1"'),
    ("tensor_parallel_size = 2", "here it is tp = 2"),
    ("max_sequence_len = 4096", "here it is max_seq_len = 4096"),
    ('max-model-len = "8k"', 'here it is max_seq_len = "8k"'),
    ('quantization = "int4"', 'here it is quant = "4"'),
    ('model_path = "/srv/m"', 'here it is model = "/srv/m"'),
    ("enable_prefix_caching = false", "here it is prefix_cache = false"),
    ("n_gpu_layers = 99", "all layers run on the GPUs"),
    ("ngl = 99", "all layers run on the GPUs"),
    ("pipeline_parallel_size = 2", 'here it is device_layers, for example device_layers = "0:32;1:32"'),
    ("xyzzy = 1", "unknown key 'xyzzy'; 'mgpu-launch config' lists all"),
    ('[server]\nmodel = "x"', "[server] begins a table, and there are none; write the keys without it"),
    ('tp = {size = 2}', "[tp] begins a table"),
])  # fmt: skip
def test_a_bad_file_is_refused_with_what_would_work(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config({}, {}, write(tmp_path, text))
    assert message in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_config({}, {}, tmp_path / "none.toml")


def test_an_unknown_variable_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="MGPU_MODL; did you mean 'MGPU_MODEL'"):
        load_config({}, {"MGPU_MODL": "x"}, None)


def test_variables_that_are_read_elsewhere_pass() -> None:
    load_config({}, {"MGPU_ENDPOINT": "ipc:///x", "MGPU_NO_NCCL": "1", "HOME": "/x"}, None)


def test_a_typed_but_empty_map_is_never_ignored() -> None:
    with pytest.raises(ConfigError, match="--device-layers is empty"):
        load_config({"device_layers": ""}, {}, None)


def test_all_gpus_and_a_map_of_some_contradict() -> None:
    with pytest.raises(ConfigError, match=r"--tp 0 \(command line\) .* and --device-layers \(MGPU_DEVICE_LAYERS\)"):
        load_config({"tp": 0}, {"MGPU_DEVICE_LAYERS": "0:32;1:32"}, None)
    load_config({"tp": 2, "device_layers": "0:32;1:32"}, {}, None)
    load_config({"device_layers": "0:32;1:32"}, {}, None)


@pytest.mark.parametrize(("text", "size"), [
    ("12", 12), ("7B", 7), ("3 KB", 3_000), ("1.5 MB", 1_500_000), ("2GB", 2 * 10**9), ("1tb", 10**12),
    ("4KiB", 4 << 10), ("64mib", 64 << 20), ("2GiB", 2 << 30), ("2 TiB", 2 << 40),
])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_every_option_has_help_and_its_own_flag() -> None:
    options = declared_options()
    assert all(option.help for option in options)
    assert len({option.flag for option in options}) == len(options)


def test_every_variable_that_sources_and_docs_name_is_accepted() -> None:
    root = Path(__file__).parents[3]
    files = [root / "README.md", *root.glob("docs/*.md")]
    files += [
        file for folder in ("launch", "orchestrator", "protocol", "worker") for file in root.glob(f"{folder}/**/*.py")
    ]
    named = {name for file in files for name in re.findall(r"MGPU_[A-Z0-9_]*[A-Z0-9]", file.read_text())}
    assert named >= {"MGPU_KERNELS", "MGPU_NO_NCCL"}
    assert named <= OTHER_VARIABLES | {option.variable for option in declared_options()}


@pytest.mark.parametrize(("name", "value", "message"), [
    ("kv_memory", "abc", "--kv-memory: 'abc' is not a size"),
    ("kv_memory", "9" * 400, "--kv-memory: a size of 400 digits"),
    ("kv_memory", -5, "--kv-memory is -5; it must be between 0 and"),
    ("seed", str(2**64), "--seed is '18446744073709551616'; it must be between 0 and 9223372036854775807"),
    ("max_batch_tokens", 2**21, "--max-batch-tokens is 2097152; it must be between 0 and 1048576"),
    ("hang_timeout", 0.0, "--hang-timeout is 0.0; it must be between 0.1 and 86400"),
])  # fmt: skip
def test_numbers_beyond_reason_are_refused_with_the_option(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config({name: value}, {}, None)


@pytest.mark.parametrize(("name", "text", "value"), [
    ("dtype", "bf16", "bfloat16"), ("dtype", "half", "float16"), ("dtype", "fp16", "float16"),
    ("dtype", "fp32", "float32"), ("dtype", "float", "float32"), ("dtype", "BFloat16", "bfloat16"),
    ("quant", "int4", "4"), ("quant", "4bit", "4"), ("quant", "int8", "8"), ("quant", "8bit", "8"),
    ("quant", "none", ServeConfig().quant), ("quant", "FP8", "fp8"),
    ("max_seq_len", "8k", 8192), ("max_seq_len", "32K", 32768), ("max_seq_len", "25.6k", 26214),
    ("max_seq_len", "auto", 0), ("tp", "auto", 0), ("workers", "Auto", 0), ("kv_memory", "auto", 0),
    ("memory_fraction", "85%", 0.85), ("memory_fraction", " 9 % ", 0.09), ("device", "GPU", "cuda"),
    ("load_format", "safetensors", "auto"), ("reasoning_format", "deepseek", "think"),
    ("tool_format", "qwen3_coder", "qwen3-coder"), ("kv_cache_dtype", "fp8_e4m3", "fp8"),
    ("max_seq_len", "4096", 4096), ("max_batch_tokens", "2k", 2048), ("max_batch_tokens", "1M", 1 << 20),
])  # fmt: skip
def test_common_ways_to_write_a_value_mean_the_same_everywhere(
    tmp_path: Path, name: str, text: str, value: object
) -> None:
    variable, file = {f"MGPU_{name.upper()}": text}, write(tmp_path, f'{name} = "{text}"')
    for flags, environ, path in (({name: text}, {}, None), ({}, variable, None), ({}, {}, file)):
        assert getattr(load_config(flags, environ, path)[0], name) == value


@pytest.mark.parametrize("text", ["8q", "k", "8kk", "-8k", "1e3", "8 apples", "9" * 400])
def test_what_is_no_number_of_tokens_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-seq-len.* is not a number of tokens.*8k \(1k = 1024\)"):
        load_config({"max_seq_len": text}, {}, None)


def test_a_byte_order_mark_does_not_spoil_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mgpu.toml"
    file.write_bytes(b"\xef\xbb\xbfmax-rows = 8\n")
    assert load_config({}, {}, file)[0].max_rows == 8


def test_a_wrong_log_level_is_refused() -> None:
    for level in ("debug", "WARNING", "Info", ""):
        load_config({}, {"MGPU_LOG_LEVEL": level}, None)
    with pytest.raises(ConfigError, match=r"--log-level .MGPU_LOG_LEVEL. is 'foo'; choose one of debug, info, warning"):
        load_config({}, {"MGPU_LOG_LEVEL": "foo"}, None)


@pytest.mark.parametrize("service", ["MGPU", "MGPU_X", "MGPU_MODEL_2", "MGPU_SERVICE", "MGPU_PORT"])
def test_variables_that_kubernetes_sets_for_a_service_are_ignored(service: str) -> None:
    links = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "5555", "SERVICE_PORT_FRONT_TCP": "5555"}
    links |= {"PORT": "tcp://10.0.0.1:5555", "PORT_5555_TCP": "tcp://10.0.0.1:5555", "PORT_5555_TCP_PROTO": "tcp"}
    links |= {"PORT_5555_TCP_PORT": "5555", "PORT_5555_TCP_ADDR": "10.0.0.1", "PORT_53_UDP": "udp://10.0.0.1:53"}
    environ = {f"{service}_{name}": value for name, value in links.items()}
    assert load_config({}, environ, None)[0] == ServeConfig()


def test_a_port_that_a_person_sets_is_still_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown environment variable MGPU_PORT"):
        load_config({}, {"MGPU_PORT": "8000"}, None)
