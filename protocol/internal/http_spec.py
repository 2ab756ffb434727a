"""The configuration of the HTTP process. It comes on standard input, whose end means that the parent is gone."""

from dataclasses import dataclass

from mgpu.protocol.internal.codec import Codec

READY = b"ready\n"
"""What the HTTP process writes to its ``report_fd`` when it accepts connections. Any other text says why it cannot."""


@dataclass(frozen=True, slots=True)
class HttpSpec:
    listen_fd: int
    """The listening socket, which the parent made: it stays open while one process replaces another."""
    report_fd: int
    """A pipe to the parent."""
    endpoint: str
    """The front channel."""
    model_name: str
    unix_path: str
    """The file of a unix socket, empty for TCP. The process removes it if the parent is gone and cannot."""


HTTP_SPEC = Codec(HttpSpec)
