"""SIGHUP: read the configuration and the keys again, and use the options that may change while the server runs.

All or nothing: if anything in the files is wrong, the server goes on as before and the log says what.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.internal.http_spec import ApiKey

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reloadable:
    """What a running server takes from its files again."""

    keys: ServerKeys | None
    """Only the list of clients: the server's own key is part of the socket."""
    client_limits: ClientLimits
    drain_timeout_s: float
    needs_restart: tuple[str, ...] = ()
    """Options that have changed too and take effect at the next start."""
    api_keys: list[ApiKey] | None = None
    """Those of the HTTP server."""


class Reloader:
    """Reads the files of one server again."""

    def __init__(
        self,
        keys: ServerKeys | None,
        read: Callable[[], Reloadable] | None,
        api_keys: list[ApiKey] | None = None,
    ) -> None:
        """The keys are those of the running server; ``read`` is None when there are no files to read."""
        self._keys = keys
        self._api_keys = api_keys
        self._read = read

    def read(self) -> Reloadable | None:
        """Return what the files say now; None, with the reason in the log, when that cannot be used."""
        if self._read is None:
            log.warning("SIGHUP: this server has no files to read again")
            return None
        try:
            values = self._read()
            self._check_keys(values.keys)
            if (values.api_keys is None) != (self._api_keys is None):
                raise UserError("API keys cannot be taken into use, or out of it, while the server runs; restart it")
        except (UserError, OSError) as error:
            log.error("not reloaded, everything stays as it was: %s", error)
            return None
        if values.needs_restart:
            log.warning("a changed %s takes effect at the next start", ", ".join(values.needs_restart))
        log.info("reloaded%s", "" if values.keys is None else f"; {len(values.keys.clients)} client keys may connect")
        return values

    def _check_keys(self, keys: ServerKeys | None) -> None:
        if (keys is None) != (self._keys is None):
            raise UserError("keys cannot be taken into use, or out of it, while the server runs; restart it")
        if keys is not None and self._keys is not None and keys.secret != self._keys.secret:
            raise UserError("the server's own key has changed; restart it to use the new one")
