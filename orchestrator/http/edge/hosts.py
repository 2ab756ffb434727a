"""The hosts that a request may name: a web page must not pass for this server's own.

Theory. A page of evil.example may let its name lead to 127.0.0.1 once its script runs (DNS rebinding). To the browser
this server is then the page's own: the script reads every answer, and its GETs carry no `origin` header. But `host`
still says evil.example. So a server on the loopback that asks for no key takes hosts that nobody else can own:
localhost and loopback addresses. A page has no key, and no browser reaches a unix socket, so neither needs the check.
"""

import ipaddress
import re
from collections.abc import Sequence

from mgpu.orchestrator.http.edge.errors import HttpError

ANY = "*"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::[0-9]*)?")


class Hosts:
    """Which hosts this server answers for."""

    def __init__(self, allowed: Sequence[str], is_loopback_port: bool) -> None:
        """``allowed``: more names. ``is_loopback_port``: see `HttpSpec`."""
        self._allowed = frozenset(name.lower().strip("[]") for name in allowed)
        self._is_loopback_port = is_loopback_port

    def check(self, hosts: Sequence[str], has_keys: bool) -> None:
        """Raise HttpError for several hosts, and for one that is not this server's. A request without one passes."""
        if len(hosts) > 1:
            raise HttpError(400, f"a request has one host header, this one has {len(hosts)}", code="bad_http")
        is_checked = bool(self._allowed) or (self._is_loopback_port and not has_keys)
        if hosts and hosts[0] and is_checked and ANY not in self._allowed and not self._is_ours(hosts[0]):
            raise self._refusal(hosts[0])

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        name = found[1].strip("[]").rstrip(".").lower() if found else ""
        if name in self._allowed or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_loopback_port  # an address cannot be made to lead elsewhere

    def _refusal(self, host: str) -> HttpError:
        found = _HOST.fullmatch(host[:100])
        name = found[1].rstrip(".") if found and found[1] else "NAME"
        known = "localhost or 127.0.0.1" if self._is_loopback_port else "one of its addresses"
        return HttpError(
            403, f"this server does not answer for the host {host[:100]!a}; call it {known}, or start it with "
            f"--http-allowed-hosts {ascii(name)[1:-1]}",
            "permission_error", "host_not_allowed",
        )  # fmt: skip
