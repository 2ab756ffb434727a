"""Refuse what no server could be started with. `serve` and `plan` ask here, so they say the same."""

import os
import resource
from collections.abc import Mapping

from mgpu.launch.prepare.http import http_address, http_options
from mgpu.launch.prepare.parts import client_limits
from mgpu.launch.settings.config import ServeConfig
from mgpu.launch.settings.hosts import check_hosts
from mgpu.launch.settings.values import ConfigError
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.listening import check_address
from mgpu.orchestrator.models.find import check_name
from mgpu.protocol.internal.gateway_messages import ServerKeys

LEAST_FILES = 256
"""Open files that a process of a server may need; libzmq aborts a process that has none left."""


def check_options(
    config: ServeConfig,
    origins: Mapping[str, str],
    environ: Mapping[str, str] = os.environ,
    keys_may_come: bool = False,
    only_plans: bool = False,
) -> ServerKeys | None:
    """Return the keys of a server with these options. UserError for names, limits, keys or addresses that are wrong.

    The model's name comes before addresses: a port that another program has must not hide a typo.

    ``keys_may_come``: a unit gets them as a credential, of which a plan knows nothing. ``only_plans``: no worker of
    another host joins.
    """
    if any("\ud800" <= character <= "\udfff" for character in config.served_name):  # bytes that are not UTF-8
        raise ConfigError("--served-name must be UTF-8 text")
    client_limits(config)
    check_name(config.model, environ)
    if origins["http"] != "default":
        address = http_address(config, is_typed=True)
        if address is not None and not keys_may_come:  # the folder of a unit's socket is made when it starts
            check_address(address)
    http_options(config)
    check_hosts(config, only_plans)
    keys = keys_for(config.bind, config.keys, environ)
    if config.bind:
        from mgpu.orchestrator.gateway.front.endpoint import (
            check_endpoint,  # imports zmq, which most plans can do without
        )

        check_endpoint(config.bind, keys is not None or (keys_may_come and not config.keys))
    return keys


def keys_for(
    bind: str, folder: str, environ: Mapping[str, str] = os.environ, needs_clients: bool = True
) -> ServerKeys | None:
    """Load the keys if ``bind`` is tcp; else MGPU_KEYS may be meant for a client. KeysError for unusable keys."""
    if not bind.startswith("tcp://"):
        return None
    from mgpu.orchestrator.host.server_keys import load_server_keys  # imports zmq

    return load_server_keys(folder, environ, needs_clients)


def check_open_files() -> None:
    """Raise UserError when a process may have too few open files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        raise UserError(
            f"a process may have {hard} open files here and a server needs {LEAST_FILES}: raise the limit first "
            "(ulimit -n 1024, or LimitNOFILE=65536 in a unit)"
        )
