"""One declaration, four sources: flags over environment over file over default."""

import re
from pathlib import Path

import pytest

from mgpu.launch.config import OTHER_VARIABLES, ConfigError, ServeConfig, declared_options, load_config, parse_bytes


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
    ("max-rows = true", "must be of type int"),
    ("max-rows = 0", "must be between 1 and 4096"),
    ("memory-fraction = nan", "must be between 0.05 and 0.99"),
    ("model = 3", "must be text in quotes"),
    ('model = ""', "is empty"),
    ('device = "tpu"', "choose one of auto, cuda, cpu"),
    ('kv-memory = "2 apples"', "is not a size"),
    ('prefix-cache = "maybe"', "write true or false"),
    ("model = ", "is not valid TOML"),
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


@pytest.mark.parametrize(
    ("text", "size"),
    [("12", 12), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("64mib", 64 << 20), ("7B", 7), ("2 TiB", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_every_option_has_help_and_its_own_flag() -> None:
    options = declared_options()
    assert all(option.help for option in options)
    assert len({option.flag for option in options}) == len(options)


def test_every_variable_that_sources_and_docs_name_is_accepted() -> None:
    root = Path(__file__).parents[2]
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
