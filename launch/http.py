"""Where `serve` and `http` listen, as the options say. Checked before a model is looked for."""

import importlib.util
import logging

from mgpu.launch.config import ServeConfig
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.listening import HttpAddress, HttpAddressError, parse_address

log = logging.getLogger(__name__)

PACKAGES = ("starlette", "uvicorn")
"""What the extra ``http`` brings, and nothing works without."""


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
    if not address.is_loopback and not config.http_no_auth:
        raise HttpAddressError(
            f"refusing to serve HTTP on {address}: anyone who reaches it could use this server. Add --http-no-auth if "
            f"that is meant, or use --http 127.0.0.1:{address.port}"
        )
    return address
