"""The configuration of `serve`, declared once: flags, environment names, TOML keys and help all come from here.

Precedence: flag, then ``MGPU_*`` environment variable, then the TOML file of ``--config``, then the default.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from mgpu.launch.settings.peer_names import key_hint
from mgpu.launch.settings.values import Bytes, ConfigError, Option, Tokens, parsed
from mgpu.orchestrator.config import Restarts, Timeouts
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.process.logs import LEVEL_VARIABLE, LogFormat, LogLevel
from mgpu.protocol.model.facts import KvCacheDtype, ModelCode
from mgpu.protocol.model.quantization import Quant

OTHER_VARIABLES = frozenset(
    {
        "MGPU_CACHE",
        "MGPU_CONFIG",
        "MGPU_ENDPOINT",
        "MGPU_FLOAT8_ROUNDING",
        "MGPU_KERNELS",
        "MGPU_NO_NCCL",
        "MGPU_NO_P2P",
        "MGPU_PAIR_CHECK",
        "MGPU_PEER_REDUCE",
        "MGPU_STAGE_RELAY",
        "MGPU_COPY",
        "MGPU_RUNTIME_DIR",
    }
)
"""Variables that start with MGPU_ and are read elsewhere."""

_SERVICE_LINK = re.compile(
    r"MGPU(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""Kubernetes sets such variables in every container beside a service whose name begins with mgpu."""
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")
"""How the value of a variable in _PORT begins, if Kubernetes has set it."""


def _option(
    default: Any, text: str, low: float | None = None, high: float | None = None, short: str = "", group: str = ""
) -> Any:
    """Declare an option. ``group`` begins a group of the help page, which goes on to the next one that is named."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "short": short, "group": group})


_LAYOUT, _TIMEOUTS, _RESTARTS, _CLIENTS = LayoutOptions(), Timeouts(), Restarts(), ClientLimits()
"""The parts that go on as a whole: an option that belongs to one has its name and its default there."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Every option of ``mgpu-launch serve``. A field's unit (``_s``) is not part of the option's name."""

    model: str = _option(
        "",
        "Model folder (Hugging Face format), .gguf file, hub id, or 'demo' for the small built-in one.",
        short="-m",
        group="Model",
    )
    served_name: str = _option("", "Model name that clients see (empty: from --model).")
    offline: bool = _option(False, "Download nothing: a model of the hub must be in its local cache.")
    generation_config: Literal["auto", "none"] = _option(
        "auto", "Sampling of requests that do not say: auto is what the model's files say, none is greedy."
    )
    model_code: ModelCode = _option(  # noqa: RUF009
        "auto",
        "Whose code runs the model: mgpu's own, the installed transformers', or own if it has the family.",
    )
    tool_format: Literal[
        "auto", "none", "harmony", "gemma4", "deepseek-v3", "deepseek-v3.1", "deepseek-v3.2", "kimi-k2", "minimax",
        "glm", "qwen3-coder", "mistral", "hermes", "pythonic", "llama"
    ] = _option("auto", "How the model writes tool calls: auto is what its chat template shows.")  # fmt: skip
    reasoning_format: Literal["auto", "none", "harmony", "think", "mistral", "gemma4"] = _option(
        "auto", "How the model marks its reasoning: auto is what its chat template shows; none leaves it in the text."
    )
    quant: Quant = _option(  # noqa: RUF009 (a field like the others)
        _LAYOUT.quant, "Quantize linear layers while loading: int8 (8), group-wise int4 (4), or float8 (fp8) weights."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Arithmetic: auto is bfloat16 on GPUs and on CPUs that multiply it, else float32."
    )
    kv_cache_dtype: KvCacheDtype = _option(  # noqa: RUF009
        _LAYOUT.kv_cache_dtype, "Keys and values in the cache: auto is the type of --dtype; fp8 takes a byte each."
    )
    device: Literal["auto", "cuda", "cpu"] = _option(
        "auto", "Where to run; auto takes all visible GPUs, else the CPU.", group="Devices and layout"
    )
    tp: int = _option(0, "Tensor-parallel size: use the first N visible GPUs (0: all of them).", 0)
    tp_shares: str = _option("", "Tensor-parallel by unequal shares: the KV heads of each GPU, such as 3,3,2.")
    device_layers: str = _option(
        "",
        'Manual layer mapping, ordered device:count pairs: "0:32;1:32"; "0+1:32" splits, "cpu:8" offloads.',
        short="-n",
    )
    topology: str = _option("", "YAML file that places and quantizes by layer range or tensor (docs/multi-gpu.md).")
    experts: Literal["auto", "tensor", "parallel"] = _option(
        "auto", "How GPUs share experts: a slice of each (tensor), or some whole (parallel); auto: slices if they fit."
    )
    workers: int = _option(0, "Worker processes on the CPU (0: one), or on shared GPUs with --oversubscribe.", 0)
    replicas: int = _option(
        1, "Whole copies of the model behind one endpoint, each on its share of the GPUs, or of the cores.", 1, 256
    )
    nodes: int = _option(
        0, "Hosts whose workers an outside launcher starts: wait for them at --join (docs/several-hosts.md).", 0, 1024
    )
    join: str = _option("", "Where these workers join: tcp://ADDRESS:PORT; needs --keys.")
    join_timeout_s: float = _option(
        600.0, "Seconds to wait for all of them, at the start or after one is lost.", 1, 86400
    )
    host_timeout_s: float = _option(10.0, "Seconds of silence after which one of these hosts counts as lost.", 2, 3600)
    max_seq_len: Tokens = _option(  # noqa: RUF009
        Tokens(0),
        "Longest prompt plus output, in tokens, such as 8192 or 8k (0: what the model allows).",
        0,
        group="Memory and batching",
    )
    max_rows: int = _option(_LAYOUT.max_rows, "Largest number of requests that run at once.", 1, 4096)
    max_batch_tokens: Tokens = _option(  # noqa: RUF009
        Tokens(_LAYOUT.max_batch_tokens),
        "Tokens in one step, at most (0: 8192 on GPUs of 40 GiB and more, 16384 with experts on those of 80 GB, 2048 "
        "on other GPUs, 512 on the CPU).", 0, 1 << 20,
    )  # fmt: skip
    memory_fraction: float = _option(
        _LAYOUT.memory_fraction, "Share of each GPU's memory for weights, activations and KV cache.", 0.05, 0.99
    )
    kv_memory: Bytes = _option(  # noqa: RUF009
        Bytes(_LAYOUT.kv_memory), "KV-cache bytes per worker, such as 2GiB (0: what fits).", 0, 1 << 50
    )
    block_size: int = _option(_LAYOUT.block_size, "Tokens per KV-cache block (0: 64 on GPUs, 16 on the CPU).", 0, 256)
    prefix_cache: bool = _option(True, "Reuse the KV cache of prompts that begin alike.")
    http: str = _option(
        "127.0.0.1:8000", "OpenAI-compatible HTTP: ADDRESS:PORT, unix:/path/to/socket, or none.", group="HTTP"
    )
    http_keys: str = _option("", "File of API keys for HTTP, each line a name and a key; read again on SIGHUP.")
    http_no_auth: bool = _option(False, "Let anyone use HTTP who reaches it, also beyond this machine.")
    http_cors: str = _option("", "Origins whose web pages may use HTTP, such as https://chat.example.com; *: all.")
    http_allowed_hosts: str = _option(
        "", "Host names, such as llm.example.com, for which HTTP on the loopback answers beside localhost; *: all."
    )
    http_tls_cert: str = _option("", "Certificate file (PEM, with its chain) to serve HTTPS.")
    http_tls_key: str = _option("", "Key file of the certificate.")
    bind: str = _option(
        "",
        "Front endpoint: tcp://127.0.0.1:PORT, with --keys any tcp://ADDRESS:PORT; empty: a private ipc socket.",
        group="Clients",
    )
    keys: str = _option("", "Folder of keys (see keygen): tcp is encrypted, and only listed clients may connect.")
    max_client_requests: int = _option(
        _CLIENTS.max_client_requests,
        "Requests of one client that run or wait, at most; one more is answered 'overloaded'.", 1, 1 << 20,
    )  # fmt: skip
    max_client_queue: Bytes = _option(  # noqa: RUF009
        Bytes(_CLIENTS.max_client_queue),
        "Bytes of one client's requests that wait for their first token, at most.", 1, 1 << 40,
    )  # fmt: skip
    max_sequences: int = _option(
        _CLIENTS.max_sequences,
        "Requests of all clients that run or wait, at most; each of n choices counts.", 1, 1 << 20,
    )  # fmt: skip
    max_queue: Bytes = _option(  # noqa: RUF009
        Bytes(_CLIENTS.max_queue), "Bytes of all requests that wait for their first token, at most.", 1, 1 << 40
    )
    max_client_connections: int = _option(
        _CLIENTS.max_client_connections, "Connections of one key that are open at the same time, at most.", 1, 1 << 20
    )
    client_weights: str = _option(
        "", 'Shares of named clients while requests wait: "uid:1000=4,uid:1001=0.5" (others: 1).'
    )
    drain_timeout_s: float = _option(
        _TIMEOUTS.drain_timeout_s,
        "Seconds that running requests get after SIGTERM.",
        0,
        86400,
        group="Stopping and recovering",
    )
    worker_timeout_s: float = _option(
        _TIMEOUTS.worker_timeout_s, "Seconds that a worker waits for its peers before it gives up.", 1, 86400
    )
    hang_timeout_s: float = _option(
        _TIMEOUTS.hang_timeout_s,
        "Seconds without a result after which workers count as hung; slow steps get longer.", 0.1, 86400,
    )  # fmt: skip
    max_restarts: int = _option(
        _RESTARTS.max_restarts, "Restarts of failed processes within ten minutes before the server gives up.", 0
    )
    standby: bool = _option(
        _RESTARTS.standby,
        "Keep a second process per worker that has imported torch, to recover sooner (0.2 GB each; default with GPUs).",
    )
    log_level: LogLevel = _option("info", "Least weight of lines in the log.", group="Log")  # noqa: RUF009
    log_format: LogFormat = _option(  # noqa: RUF009
        "auto", "text for people, json for programs, journal for systemd's journal; auto: journal where it is one."
    )
    access_log: bool = _option(False, "Log a line for each request: account, tokens, times, how it ended; no text.")
    load_format: Literal["auto", "dummy"] = _option(
        "auto", "'dummy' makes random weights from config.json alone.", group="For tests"
    )
    seed: int = _option(0, "Seed of dummy weights.", 0, (1 << 63) - 1)
    oversubscribe: bool = _option(False, "Let several workers share one GPU (for tests; slow).")


def declared_options() -> tuple[Option, ...]:
    """List the options in the order of the class."""
    hints = get_type_hints(ServeConfig)
    groups: Iterator[str] = accumulate(
        (item.metadata["group"] for item in fields(ServeConfig)), lambda last, named: named or last
    )
    return tuple(
        Option(
            name=item.name.removesuffix("_s"),
            field=item.name,
            type=str if get_args(hints[item.name]) else hints[item.name],
            choices=get_args(hints[item.name]),
            default=item.default,
            **{**item.metadata, "group": group},
        )
        for item, group in zip(fields(ServeConfig), groups, strict=True)
    )


def load_config(
    flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None
) -> tuple[ServeConfig, dict[str, str]]:
    """Merge flags, environment and file. Return the configuration and, per option, where its value came from.

    ``flags`` holds only what the user typed. ConfigError names the option, the value and what is allowed.
    """
    options = {option.name: option for option in declared_options()}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(options, "default")
    for origin, layer in (
        (str(file), _file_values(file, options)),
        ("environment", _environment_values(environ, options)),
        ("command line", flags),
    ):
        for name, value in layer.items():
            values[name] = parsed(options[name], value, origin)
            origins[name] = options[name].variable if origin == "environment" else origin
    config = ServeConfig(**{options[name].field: value for name, value in values.items()})
    if config.device_layers and config.tp == 0 and origins["tp"] != "default":
        raise ConfigError(
            f"--tp 0 ({origins['tp']}) asks for all GPUs and --device-layers ({origins['device_layers']}) for certain "
            "ones; drop one of them"
        )
    return config, origins


def _file_values(file: Path | None, options: Mapping[str, Option]) -> dict[str, object]:
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8-sig")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}{_quotes_hint(text, str(error))}") from error
    values: dict[str, object] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            raise ConfigError(f"{file}: [{key}] begins a table, and there are none; write the keys without it")
        if name not in options:
            hint = key_hint(key, table, options)
            raise ConfigError(f"{file}: unknown key {key!r}{f'; {hint}' if hint else _nearest(name, options)}")
        if name in values:
            raise ConfigError(f"{file}: {name} is set twice, with a hyphen and with an underscore")
        values[name] = value
    return values


def _quotes_hint(text: str, error: str) -> str:
    """Return how the line that a TOML error names is written if it only lacks its quotes, or ''."""
    at = re.search(r"at line (\d+)", error)
    line = text.splitlines()[int(at[1]) - 1] if at else ""
    found = re.fullmatch(r"\s*([\w-]+)\s*=\s*([^\s\"'\[{#][^\"']*?)\s*(#.*)?", line)
    if found is None:
        return ""
    key, value = found[1], found[2]
    if value.lower() in ("true", "false"):
        return f"; write it in small letters: {key} = {value.lower()}"
    return f"; text stands in quotes: {key} = {json.dumps(value, ensure_ascii=False)}"


def _environment_values(environ: Mapping[str, str], options: Mapping[str, Option]) -> dict[str, object]:
    by_variable = {option.variable: name for name, option in options.items()}
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if variable == LEVEL_VARIABLE and not text:
            continue
        if variable in by_variable:
            values[by_variable[variable]] = text
        elif variable.startswith("MGPU_") and variable not in OTHER_VARIABLES and not _is_service_link(variable, text):
            known = by_variable.keys() | OTHER_VARIABLES
            raise ConfigError(f"unknown environment variable {variable}{_nearest(variable, known)}")
    return values


def _is_service_link(variable: str, text: str) -> bool:
    if variable.endswith("_PORT") and _SERVICE_URL.match(text):
        return True
    return _SERVICE_LINK.fullmatch(variable) is not None


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; 'mgpu-launch config' lists all"
