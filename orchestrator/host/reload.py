"""SIGHUP: read the configuration and the keys again, and use the options that may change while the server runs.

All or nothing: if anything in the files is wrong, the server goes on as before and the log says what.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.internal.http_spec import ApiKey
from mgpu.protocol.keys import fingerprint

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

    def changes_from(self, before: "Reloadable") -> list[str]:
        """Say what differs from the values in use, with both values."""
        changes = [
            f"{each.name} {getattr(before.client_limits, each.name)} -> {getattr(self.client_limits, each.name)}"
            for each in fields(ClientLimits)
            if getattr(before.client_limits, each.name) != getattr(self.client_limits, each.name)
        ]
        if before.drain_timeout_s != self.drain_timeout_s:
            changes.append(f"drain_timeout {before.drain_timeout_s:g} -> {self.drain_timeout_s:g}")
        if before.api_keys != self.api_keys:
            changes.append(f"{len(self.api_keys or ())} API keys instead of {len(before.api_keys or ())}")
        old, new = (set(each.keys.clients if each.keys else ()) for each in (before, self))
        changes += [f"the key {fingerprint(key)} may connect" for key in sorted(new - old)]
        return changes + [f"the key {fingerprint(key)} may not connect any more" for key in sorted(old - new)]


class Reloader:
    """Reads the files of one server again."""

    def __init__(
        self,
        keys: ServerKeys | None,
        read: Callable[[], Reloadable] | None,
        api_keys: list[ApiKey] | None = None,
        used: Reloadable | None = None,
    ) -> None:
        """The keys are those of the running server; ``read`` is None when there are no files to read.

        ``used`` are the values of the start, to say what has changed since.
        """
        self._keys = keys
        self._api_keys = api_keys
        self._read = read
        self._used = used

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
        changes = values.changes_from(self._used) if self._used is not None else []
        self._used = values
        keys = "" if values.keys is None else f"; {len(values.keys.clients)} client keys may connect"
        log.info("reloaded: %s%s", ", ".join(changes) or "nothing has changed", keys)
        return values

    def _check_keys(self, keys: ServerKeys | None) -> None:
        if (keys is None) != (self._keys is None):
            raise UserError("keys cannot be taken into use, or out of it, while the server runs; restart it")
        if keys is not None and self._keys is not None and keys.secret != self._keys.secret:
            raise UserError("the server's own key has changed; restart it to use the new one")
