"""Where HTTP listens and who may use it, as the options say. Checked before a model is looked for."""

import importlib.util
import logging
import re
import ssl
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from mgpu.launch.settings.config import ServeConfig
from mgpu.launch.settings.values import ConfigError
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.api_keys import read_api_keys
from mgpu.orchestrator.host.listening import HttpAddress, HttpAddressError, parse_address
from mgpu.protocol.internal.http_spec import HttpOptions

log = logging.getLogger(__name__)

_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
PACKAGES = ("starlette", "uvicorn", "httptools")
"""What the extra ``http`` brings, and HTTP is not served without: bounds of connections are those of httptools."""


def http_address(config: ServeConfig, is_typed: bool) -> HttpAddress | None:
    """Return where HTTP is served; None if it is not. UserError for what cannot be, or is not safe.

    ``is_typed``: the user has asked for this address. The default is left out if the packages for it are missing.
    """
    address = parse_address(config.http)
    if address is None:
        return None
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        text = f"HTTP needs {' and '.join(missing)}; type: pip install 'mgpu[http]'"
        if is_typed:
            raise UserError(f"{text}, or --http none")
        log.warning("%s. This server has no HTTP; the front channel is served.", text)
        return None
    if not address.is_loopback and not (config.http_keys or config.http_no_auth):
        raise HttpAddressError(
            f"refusing to serve HTTP on {address}: anyone who reaches it could use this server. Write API keys into a "
            f"file and add --http-keys FILE, or --http-no-auth if anyone may, or use --http 127.0.0.1:{address.port}"
        )
    if not address.is_loopback and not config.http_tls_cert:
        log.warning("HTTP on %s is not encrypted; --http-tls-cert and --http-tls-key change that", address)
    return replace(address, is_encrypted=bool(config.http_tls_cert))


def http_options(config: ServeConfig) -> HttpOptions:
    """Read the files that the options name. UserError says which cannot be used."""
    if config.http_keys and config.http_no_auth:
        raise ConfigError("--http-keys asks for keys and --http-no-auth for none; drop one of them")
    _check_tls(config.http_tls_cert, config.http_tls_key)
    api_keys = read_api_keys(Path(config.http_keys)) if config.http_keys else None
    origins = [_checked_origin(each.strip()) for each in config.http_cors.split(",") if each.strip()]
    hosts = [_checked_host(each.strip()) for each in config.http_allowed_hosts.split(",") if each.strip()]
    return HttpOptions(api_keys, origins, hosts, config.http_tls_cert, config.http_tls_key)


def _checked_host(name: str) -> str:
    if name != "*" and not _HOST_NAME.fullmatch(name):
        raise ConfigError(
            f"--http-allowed-hosts has {name!r}; write names such as llm.example.com, without http:// and a port, "
            "separated by commas, or *"
        )
    return name


def _checked_origin(origin: str) -> str:
    parts = urlsplit(origin)
    if origin != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query):
        raise ConfigError(
            f"--http-cors has {origin!r}; write origins such as https://chat.example.com, separated by commas, or *"
        )
    return origin


def _check_tls(cert: str, key: str) -> None:
    if not cert and not key:
        return
    if not cert or not key:
        lacking = "--http-tls-key" if cert else "--http-tls-cert"
        raise ConfigError(f"{lacking} is missing: TLS needs a certificate and its key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error.args[0]
        raise ConfigError(f"the TLS files {cert} and {key} cannot be used: {reason}") from None
