"""What clients may ask of one server at the same time. The gateway applies it; a reload replaces it as a whole.

The options say client, as users do. What they bound is an account: a key, or one connection without a key.
"""

from dataclasses import dataclass, field

DEFAULT_WEIGHT = 1.0
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Bounds of the requests in flight. A request beyond a bound is answered ``overloaded`` with a time to wait."""

    max_client_requests: int = 256
    """Requests of one account, running or waiting."""
    max_client_queue: int = 8 << 20
    """Bytes of one account's requests without a token yet; a request with ``n`` choices counts ``n`` times."""
    max_sequences: int = 4096
    """Choices of all requests of all accounts; one account may have a quarter of them, or 64."""
    max_queue: int = 256 << 20
    """As ``max_client_queue``, of all accounts."""
    client_weights: dict[str, float] = field(default_factory=dict)
    """Share of the server while it is full, by identity such as ``uid:1000``; others have `DEFAULT_WEIGHT`."""
    max_client_connections: int = 512
    """Open connections of one key; a process on ipc may have half of all that are possible."""

    @property
    def max_client_sequences(self) -> int:
        """Choices of all requests of one account, so that it cannot keep all others out."""
        return max(self.max_sequences // 4, min(self.max_sequences, 64))

    def weight_of(self, identity: str) -> float:
        """Return the weight of each account of ``identity``; `DEFAULT_WEIGHT` if it is not named."""
        return self.client_weights.get(identity, DEFAULT_WEIGHT)
