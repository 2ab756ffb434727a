"""The configuration of the HTTP process. It comes on standard input, whose end means that the parent is gone."""

from dataclasses import dataclass, field

from mgpu.protocol.internal.codec import Codec

READY = b"ready\n"
"""What the HTTP process writes to its ``report_fd`` when it accepts connections. Any other text says why it cannot."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A client of the HTTP server. The key itself stays in its file."""

    name: str
    digest: bytes = field(repr=False)
    """SHA-256 of the key."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Who may use the HTTP server, and how it is encrypted."""

    api_keys: list[ApiKey] | None = None
    """None: no key is asked for."""
    cors: list[str] = field(default_factory=list)
    """Origins whose pages may use the server; ``*``: all."""
    allowed_hosts: list[str] = field(default_factory=list)
    """More host names that requests may name; ``*``: all."""
    tls_cert: str = ""
    tls_key: str = ""
    head_timeout_s: float = 10.0
    """From the beginning of a request, or of a connection, to the end of its head."""
    max_connections: int = 20_000


@dataclass(frozen=True, slots=True)
class HttpSpec:
    listen_fd: int
    """The listening socket, which the parent made: it stays open while one process replaces another."""
    report_fd: int
    """A pipe to the parent."""
    endpoint: str
    """The front channel."""
    front_keys: list[bytes]
    """Secret, public and the server's key for a front channel that is encrypted; else empty."""
    options: HttpOptions
    unix_path: str
    """The file of a unix socket, empty for TCP. The process removes it if the parent is gone and cannot."""
    is_loopback_port: bool
    """It is a TCP port of a loopback address: only this machine reaches it, but every browser there."""


@dataclass(frozen=True, slots=True)
class NewApiKeys:
    """Other keys, after SIGHUP made the parent read its files again. It follows the spec on standard input."""

    api_keys: list[ApiKey] | None


HTTP_LINK = Codec(HttpSpec, NewApiKeys)
