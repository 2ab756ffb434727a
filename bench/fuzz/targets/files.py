"""Files of a model folder, and others that a server reads: GGUF, safetensors, JSON, keys, configuration."""

import fcntl
import json
from contextlib import suppress
from functools import cache
from pathlib import Path

from bench.fuzz.choices import Choices
from bench.fuzz.target import Target
from bench.fuzz.targets.model_files import CONFIGS, GGUF_WORDS, HEADER, gguf_seeds, safetensors_seeds
from bench.fuzz.targets.scratch import written
from mgpu.launch.settings.config import ConfigError, load_config
from mgpu.orchestrator.errors import PlacementError, UserError
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import load_codec
from mgpu.orchestrator.placement.split.layer_map import parse_layer_map
from mgpu.protocol.checkpoint.files.gguf_file import read_gguf
from mgpu.protocol.checkpoint.files.safetensors_file import read_safetensors
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.discovery import INFO_NAME, LOCK_NAME, running_servers
from mgpu.protocol.keys import KeyFileError, read_keys
from mgpu.protocol.model.facts import ModelFacts

_SPARSE = (0, 0, 0, 0, 1 << 20, 1 << 28, 1 << 34, 1 << 40)
"""How much longer than its bytes a file says that it is."""


def read_gguf_model(data: bytes) -> None:
    """Read a GGUF file as planner and gateway do."""
    choices = Choices(data)
    longer = choices.pick(_SPARSE)
    path = written("model.gguf", choices.rest(), longer)
    for step in (lambda: read_checkpoint(path), lambda: _text_of(path), lambda: read_gguf(path, with_arrays=True)):
        with suppress(CheckpointError, TokenizerError):
            step()


def _text_of(path: Path) -> None:
    codec = load_codec(str(path), "gguf")
    if codec is not None:
        codec.encode("a <0x0A>\u2581 é")
        codec.text_of(0)


def read_weights(data: bytes) -> None:
    choices = Choices(data)
    longer = choices.pick(_SPARSE)
    read_safetensors(written("x.safetensors", choices.rest(), longer))


def read_model_config(data: bytes) -> None:
    """Read config.json and generation_config.json: the first byte says how the rest becomes JSON."""
    choices = Choices(data)
    folder = written("configured/config.json", _json(choices, choices.pick(CONFIGS))).parent
    generation: dict[str, object] = {"eos_token_id": [1, 2]}
    written("configured/generation_config.json", _json(choices, generation))
    read_config_facts(folder)


def _json(choices: Choices, whole: dict[str, object]) -> bytes:
    if not choices.number(3):
        return choices.data(choices.number(2000))
    words = [
        *whole,
        "full_attention",
        "sliding_attention",
        "linear",
        "llama3",
        "yarn",
        "default",
        "factor",
        "rope_type",
    ]
    return json.dumps(choices.changed(whole, words), default=repr).encode("utf-8", "replace")


def read_folder(data: bytes) -> None:
    """Read an index with the shards that it names."""
    choices = Choices(data)
    folder = written("sharded/config.json", json.dumps(CONFIGS[0]).encode()).parent
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index: dict[str, object] = {"metadata": {}, "weight_map": {"a": shards[0], "b": shards[1]}}
    written("sharded/model.safetensors.index.json", _json(choices, index))
    for shard in shards:
        header = json.dumps(choices.changed(HEADER, [*HEADER, "model.norm.weight"]), default=repr).encode()
        written(f"sharded/{shard}", len(header).to_bytes(8, "little") + header + bytes(choices.number(600)))
    read_checkpoint(folder)


def read_key_file(data: bytes) -> None:
    read_keys(written("x.client", data), "secret", "server", is_secret=False)


def read_layer_map(data: bytes) -> None:
    facts = _facts()
    parse_layer_map(data.decode("utf-8", "replace"), facts, 4, "CPU worker")


@cache
def _facts() -> ModelFacts:
    return read_config_facts(written("facts/config.json", json.dumps(CONFIGS[0]).encode()).parent)


def read_configuration(data: bytes) -> None:
    load_config({}, {}, written("mgpu.toml", data))


def read_server_file(data: bytes) -> None:
    """List the running servers where one has left these bytes."""
    folder = written("0123abcd/" + INFO_NAME, data).parent
    with open(folder / LOCK_NAME, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running_servers({"MGPU_RUNTIME_DIR": str(folder.parent)})


FILES: dict[str, Target] = {
    "gguf": Target(read_gguf_model, (), gguf_seeds, GGUF_WORDS, most_s=6.0, longest=8192),
    "safetensors": Target(read_weights, (CheckpointError,), safetensors_seeds),
    "config": Target(
        read_model_config, (CheckpointError,), lambda: [bytes([at, 1, 0, 1, 0]) for at in range(len(CONFIGS))]
    ),
    "index": Target(read_folder, (CheckpointError,), lambda: [bytes([1, 0, 0, 0, 0])]),
    "keys": Target(
        read_key_file, (KeyFileError,), lambda: [b"secret " + b"0" * 40 + b"\nserver " + b"a" * 40 + b"\n#"]
    ),
    "layer-map": Target(read_layer_map, (PlacementError,), lambda: [b"0:1;1:1", b"0+1:2"], longest=200),
    "configuration": Target(
        read_configuration,
        (ConfigError, UserError),
        lambda: [b'model = "demo"\ntp = 2\nmax_queue = 5\nkv_memory="2GiB"\n'],
    ),
    "server-file": Target(
        read_server_file,
        (),
        lambda: [b'{"endpoint": "ipc:///x", "pid": 5, "model": "m", "version": "1"}'],
        longest=100_000,
    ),
}
