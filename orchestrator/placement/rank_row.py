"""What one rank of a plan holds."""

from dataclasses import dataclass

from mgpu.orchestrator.placement.machine.devices import DeviceInfo
from mgpu.protocol.model.placement import HeadShard


@dataclass(frozen=True, slots=True)
class RankRow:
    """What one rank holds. Bytes are in the type that the model is served in."""

    rank: int
    device: DeviceInfo
    stage_index: int
    first_layer: int
    end_layer: int
    heads: HeadShard
    weight_bytes: int
    """On the device."""
    reserve_bytes: int
    """Estimate of all memory that is neither weights nor KV cache."""
    budget_bytes: int
    """All memory that the worker may use."""
    kv_token_bytes: int
    kv_tokens: int
    """Tokens that this rank alone could hold, in whole blocks."""
    window_token_bytes: int = 0
    """Part of ``kv_token_bytes`` that is in layers with a window."""
    window_tokens: int = 0
    """Tokens that these keep, in whole pages; 0: all."""
    least_window_tokens: int = 0
    """Tokens that they must have room for, for one sequence."""
    state_bytes: int = 0
    """Of one sequence, in its linear layers."""
    states: int = 0
    """Running sequences whose states the rank holds; all ranks hold the same number."""
    snapshots: int = 0
    """States that it keeps beside them; all ranks keep the same number."""

    host_bytes: int = 0
    """Of experts that a worker on a GPU keeps in the machine's memory."""

    @property
    def all_state_bytes(self) -> int:
        return (self.states + self.snapshots) * self.state_bytes

    @property
    def kv_bytes(self) -> int:
        return self.pool_bytes(self.kv_tokens, self.window_tokens)

    def pool_bytes(self, tokens: int, window_tokens: int) -> int:
        """Return the bytes of keys and values of ``tokens``, of which layers with a window keep some; 0: all."""
        full = self.kv_token_bytes - self.window_token_bytes
        return tokens * full + (window_tokens or tokens) * self.window_token_bytes

    def needs(self, tokens: int) -> int:
        """Return all bytes that the rank needs for a KV pool of ``tokens``, and the states of one sequence."""
        return self.weight_bytes + self.reserve_bytes + self.least_pool(tokens)

    def least_pool(self, tokens: int) -> int:
        """Return the bytes of the smallest pools in which a request of ``tokens`` can run, its states included."""
        return self.pool_bytes(tokens, min(tokens, self.least_window_tokens)) + self.state_bytes
