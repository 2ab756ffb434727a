"""What each account has in flight, on all replicas together.

Each replica has the same bounds for itself. Without these, a client of four replicas could have four times as much as
its limit says.
"""

from dataclasses import dataclass

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.protocol.internal.client_limits import ClientLimits


@dataclass(slots=True)
class _Usage:
    requests: int = 0
    choices: int = 0


class InFlight:
    """Counts requests and their choices by account."""

    def __init__(self, limits: ClientLimits | None = None) -> None:
        """``limits`` are those of the whole server; None: only the replicas have limits."""
        self._limits = limits
        self._usage: dict[Account, _Usage] = {}

    def check(self, account: Account, n: int) -> None:
        """Raise Refusal if a request of ``n`` choices is too much for its account."""
        usage, limits = self._usage.get(account), self._limits
        if usage is None or limits is None:
            return
        if usage.requests >= limits.max_client_requests:
            self._refuse(usage.requests, "requests", limits.max_client_requests)
        if usage.choices + n > limits.max_client_sequences:
            self._refuse(usage.choices, "sequences", limits.max_client_sequences)

    def _refuse(self, held: int, what: str, most: int) -> None:
        text = f"this client has {held} {what} in flight on all replicas, the limit is {most}"
        raise Refusal("overloaded", text, RETRY_AFTER_S)

    def add(self, account: Account, n: int) -> None:
        """Count a request."""
        usage = self._usage.setdefault(account, _Usage())
        usage.requests += 1
        usage.choices += n

    def remove(self, account: Account, n: int) -> None:
        """Count a request no more."""
        usage = self._usage[account]
        usage.requests -= 1
        usage.choices -= n
        if not usage.requests:
            del self._usage[account]
