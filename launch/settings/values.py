"""What the value of an option may be, and how it is read from text, from TOML and from the environment."""

import re
from configparser import RawConfigParser
from dataclasses import dataclass
from typing import Any

from mgpu.orchestrator.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
          "TIB": 2**40}  # fmt: skip


_ALIASES = {
    "dtype": {"bf16": "bfloat16", "half": "float16", "fp16": "float16", "f16": "float16", "fp32": "float32",
              "f32": "float32", "float": "float32"},
    "quant": {"int4": "4", "4bit": "4", "4-bit": "4", "q4": "4", "int8": "8", "8bit": "8", "8-bit": "8", "q8": "8",
              "float8": "fp8"},
    "log_level": {"warn": "warning", "fatal": "critical", "notset": "debug"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8", "float8": "fp8"},
    "device": {"gpu": "cuda", "nvidia": "cuda"},
    "load_format": {"safetensors": "auto", "hf": "auto"},
    "reasoning_format": {"deepseek": "think", "deepseek_r1": "think", "deepseek-r1": "think", "qwen3": "think",
                         "glm45": "think", "minimax_m2": "think"},
    "tool_format": {"qwen3_coder": "qwen3-coder", "llama3_json": "llama", "openai": "harmony", "glm45": "glm",
                    "glm47": "glm", "minimax_m2": "minimax", "llama4_pythonic": "pythonic",
                    "deepseek_v3": "deepseek-v3", "deepseek_v31": "deepseek-v3.1",
                    "deepseek_v32": "deepseek-v3.2", "kimi_k2": "kimi-k2"},
}  # fmt: skip
"""What other programs call the values of these options."""

_REMARKS = {
    "device": (r"(cuda:?)?\d+(,\s*(cuda:?)?\d+)*", "CUDA_VISIBLE_DEVICES says which GPUs, such as 0,1"),
    "quant": (
        r"awq.*|gptq.*|mxfp4|nvfp4|fp4|nf4|compressed.tensors|i?q\d.*|gguf",
        "other formats come from the model's files: leave the option out",
    ),
}
"""By option: values that belong elsewhere, and where."""
_KINDS: dict[type, str] = {int: "a whole number", float: "a number"}


class ConfigError(UserError):
    """A configuration value that cannot be used; the text names the option and the accepted values."""


class Bytes(int):
    """A number of bytes, written like ``2GiB``."""


def parse_bytes(text: str) -> Bytes:
    """Read ``123``, ``512MiB``, ``1.5 GB``. ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write for example 512MiB or 2GiB")
    try:
        return Bytes(float(match[1]) * _UNITS[match[2].upper()])
    except OverflowError:
        raise ConfigError(f"a size of {len(match[1])} digits is more than any memory; write 512MiB or 2GiB") from None


class Tokens(int):
    """A number of tokens, which may be written like ``8k``."""


def parse_tokens(text: str) -> int:
    """Read ``8192``, ``8k``, ``25.6K``, ``1M``; 1k is 1024. ConfigError for anything else."""
    match = re.fullmatch(r"\s*(-?\d+)\s*|\s*(\d+(?:\.\d+)?)\s*([kKmM])\s*", text)
    if match is None or len(text) > 30:
        raise ConfigError(f"{text!r} is not a number of tokens; write for example 8192 or 8k (1k = 1024)")
    return int(match[1]) if match[1] else int(float(match[2]) * (1 << 10 if match[3] in "kK" else 1 << 20))


@dataclass(frozen=True, slots=True)
class Option:
    """One option as flags, environment and files spell it."""

    name: str
    field: str
    """Of `ServeConfig`."""
    type: type
    choices: tuple[str, ...]
    default: Any
    help: str
    low: float | None
    high: float | None
    short: str
    group: str
    """Title of its group on the help page."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "MGPU_" + self.name.upper()


def parsed(option: Option, value: object, origin: str) -> object:
    """Return the value as the option's type. ConfigError names the option, where it came from and what is allowed."""
    where = f"{option.flag} ({option.variable if origin == 'environment' else origin})"
    where = option.flag if origin == "command line" else where
    converted = _converted(option, value, where)
    if option.choices and isinstance(converted, str) and converted not in option.choices:
        lower = converted.strip().lower()
        converted = next((each for each in (lower, _ALIASES.get(option.name, {}).get(lower)) if each in option.choices),
                         converted)  # fmt: skip
    if option.choices and converted not in option.choices:
        pattern, remark = _REMARKS.get(option.name, ("", ""))
        hint = f"; {remark}" if re.fullmatch(pattern, str(value), re.IGNORECASE) and remark else ""
        raise ConfigError(f"{where} is {value!r}; choose one of {', '.join(option.choices)}{hint}")
    if isinstance(converted, (int, float)) and not isinstance(converted, bool):
        low, high = option.low, option.high
        if converted != converted or (low is not None and converted < low) or (high is not None and converted > high):
            allowed = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{where} is {value!r}; it must be {allowed}")
    return converted


def _converted(option: Option, value: object, where: str) -> object:
    if isinstance(value, str):
        if option.default == option.low == 0 and value.strip().lower() == "auto":
            value = "0"  # the server chooses
        elif option.high is not None and option.high < 1 and (share := re.fullmatch(r"\s*([\d.]+)\s*%\s*", value)):
            value = f"{share[1]}e-2"
    if option.type is Bytes:
        if isinstance(value, int) and not isinstance(value, bool):
            return Bytes(value)
        try:
            return parse_bytes(str(value))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if option.type is Tokens and isinstance(value, str) and value:
        try:
            return parse_tokens(value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if option.type is bool:
        return _to_bool(value, where)
    if option.type is str and not isinstance(value, str):
        raise ConfigError(f"{where} is {value!r}; it must be text in quotes")
    if value == "" and not option.choices:
        raise ConfigError(f"{where} is empty; give it a value or leave it out")
    try:
        if isinstance(value, bool) or (option.type is int and isinstance(value, float)):
            raise ValueError
        return int(value) if option.type is Tokens else option.type(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        kind = _KINDS.get(int if option.type is Tokens else option.type, "text")
        raise ConfigError(f"{where} is {value!r}; it must be {kind}") from None


def _to_bool(value: object, where: str) -> bool:
    found = RawConfigParser.BOOLEAN_STATES.get(str(value).lower())  # 1 and 0, true and false, yes and no, on and off
    if found is None:
        raise ConfigError(f"{where} is {value!r}; write true or false")
    return found
