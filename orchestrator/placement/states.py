"""How much of a pool the states of linear layers take, beside the keys and values of the other layers."""

_SNAPSHOTS = 4
"""Most states that are kept for prompts that begin alike, for each row: more would hardly be found again."""


def held_states(most: int, pool: int, left: int, state_bytes: int) -> int:
    """Return of how many running sequences a pool holds the states, at most ``most``.

    At least one; else at most half of the pool, and no more than ``left`` bytes beside the shortest KV cache.
    """
    return max(1, min(most, pool // 2 // state_bytes, left // state_bytes)) if state_bytes else most


def kept_states(running: int, pool: int, left: int, state_bytes: int) -> int:
    """Return how many states are kept beside those of the ``running``: at most a quarter of the pool."""
    most = _SNAPSHOTS * running
    return max(0, min(most, pool // 4 // state_bytes, left // state_bytes - running)) if state_bytes else most
