"""What clients may ask of one server at the same time. The gateway applies it; a reload replaces it as a whole.

The options say client, as users do. What they bound is an account: a key, one connection without a key, or a client
that such a connection has named. An owner (a key, else a process or an address) has bounds for all of its accounts.
"""

from dataclasses import dataclass, field

DEFAULT_WEIGHT = 1.0
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
FEW = 64
"""Sequences that are not worth dividing."""
FREE_TIMES = 3
"""An owner may have so many times what is free. So one alone gets three quarters, each of two 3/7, and a newcomer finds
room however many there are."""


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
    """Share of the server while it is full, of a key (``key:…``), of each process of a user (``uid:1000``), or of a
    client among those that the same owner names (``client:…``); others have `DEFAULT_WEIGHT`."""
    max_client_connections: int = 512
    """Open connections of one key; a process on ipc may have half of all that are possible."""

    @property
    def max_client_sequences(self) -> int:
        """Choices of all requests of one account, so that it cannot keep all others out."""
        return max(self.max_sequences // 4, min(self.max_sequences, FEW))

    def most_sequences_of_owner(self, num_sequences: int) -> int:
        """Return how many choices an owner may have while all have ``num_sequences``: room is left for newcomers."""
        if self.max_sequences <= FEW:
            return self.max_sequences
        return FREE_TIMES * (self.max_sequences - num_sequences)

    def most_bytes_of_owner(self, queued_bytes: int) -> int:
        """Return how many bytes an owner may have waiting while all have ``queued_bytes``."""
        return max(FREE_TIMES * (self.max_queue - queued_bytes), self.max_client_queue)

    def weight_of(self, name: str) -> float:
        """Return the weight of an identity or of a named client."""
        return self.client_weights.get(name, DEFAULT_WEIGHT)
