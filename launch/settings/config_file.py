"""Write a configuration file, such as `serve --config FILE` reads."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mgpu.launch.settings.config import ServeConfig, declared_options
from mgpu.launch.settings.values import Bytes, ConfigError

PATHS = ("model", "keys", "topology")
"""Options that may name a file or a folder: relative to where they were typed, which a service does not know."""


def config_text(config: ServeConfig, origins: Mapping[str, str], comments: Iterable[str] = ()) -> str:
    """Return TOML with all options that were set anywhere, after the comments."""
    lines = [f"# {line}".rstrip() for line in comments]
    for option in declared_options():
        if origins.get(option.name, "default") != "default":
            value = getattr(config, option.field)
            lines.append(f"{option.name} = {toml_value(absolute(value) if option.name in PATHS else value)}")
    return "\n".join(lines) + "\n"


def absolute(name: str) -> str:
    """Return the absolute path if a file or folder has this name; else the name, such as one of the hub."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


def toml_value(value: object) -> str:
    """Write a value as TOML does. ConfigError for text that is not UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{value!a} is not UTF-8 text, so a configuration file cannot hold it") from None
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Bytes):
        return str(int(value))
    return json.dumps(value)


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet. ConfigError when it does, or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; remove it first, or choose another name") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
