"""Facts about kinds of attention: rotary scaling, wider heads, states of linear layers, latent vectors."""

from dataclasses import dataclass

Sight = tuple[int | None, bool]
"""How many tokens a token sees, itself included; None: all before it. True: those of its own chunk of so many."""


def first_key(position: int, sight: Sight) -> int:
    """Return the first position that the token at ``position`` sees.

    Example: at position 10 with a window of 4 it is 7, with chunks of 4 it is 8.
    """
    window, in_chunks = sight
    if window is None:
        return 0
    return position // window * window if in_chunks else max(0, position - window + 1)


def window_blocks(sight: Sight, block_size: int) -> int:
    """Return over how many blocks a window reaches at most.

    Example: 8 tokens reach over three blocks of 4, the last tokens of one and the first ones of another among them.
    """
    return -(-(sight[0] or 0) // block_size) + 1


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary frequencies, by any rule.

    Each of the K / 2 frequencies is divided by its own number of ``divisors``, then cos and sin are multiplied by
    ``attention_factor``. With ``long_divisors`` (LongRoPE) these count instead on a server whose longest request
    exceeds ``original_max_position``: all keys of a cache must be rotated alike.
    """

    divisors: tuple[float, ...]
    attention_factor: float = 1.0
    long_divisors: tuple[float, ...] = ()
    original_max_position: int = 0

    def divisors_for(self, longest: int) -> tuple[float, ...]:
        """Return the divisors on a server whose longest request has so many tokens."""
        return self.long_divisors if self.long_divisors and longest > self.original_max_position else self.divisors


@dataclass(frozen=True, slots=True)
class FullHeads:
    """Heads of the layers with full attention, where they are others than in sliding layers (Gemma 4)."""

    num_kv: int
    head_dim: int
    rotated_size: int
    """Components that turn: the first pairs (i, i + head_dim / 2), as fast as they would in a whole head."""
    keys_are_values: bool
    """True if there is no projection of values: a value is what its key is before it is normalized and rotated."""


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """Layers of linear attention (gated delta rule): each sequence has a state of fixed size in each of them.

    The state of a value head is a matrix [key_dim, value_dim] in float32. Queries, keys and values go through a
    convolution over the last ``conv_width`` tokens first, of which the inputs of all but the newest are kept.
    """

    layers: tuple[bool, ...]
    """One flag per layer: True if it is linear, False if it has keys and values of all tokens."""
    key_heads: int
    """Of queries and keys; ``value_heads / key_heads`` consecutive value heads share one."""
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    values_are_tiled: bool = False
    """True if the columns of the stored output projection have the first value head of each key head, then the second
    of each, and so on (GGUF files of Qwen3.5); else the heads that share a key head are neighbours."""

    @property
    def tiles(self) -> tuple[int, ...]:
        """The place of each value head among those that are stored tiled."""
        shared = self.value_heads // self.key_heads
        return tuple(each * self.key_heads + head for head in range(self.key_heads) for each in range(shared))

    def channels(self, tp_size: int = 1) -> int:
        """Return the inputs of the convolution on one of ``tp_size`` ranks: queries, keys and values."""
        return (2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim) // tp_size

    def state_bytes(self, num_layers: int, tp_size: int, dtype_bytes: int) -> int:
        """Return what one sequence keeps in ``num_layers`` linear layers on a rank: states, and inputs to convolve."""
        state = 4 * self.value_heads * self.key_dim * self.value_dim // tp_size
        return num_layers * (state + (self.conv_width - 1) * self.channels(tp_size) * dtype_bytes)


@dataclass(frozen=True, slots=True)
class LatentFacts:
    """Latent attention (MLA): a token's keys and values of all heads are projections of one vector, which is cached.

    The vector has ``rank`` components without position, then ``rotated`` ones that are rotated. A head's key is
    ``plain`` components that are projected from the first part, and the second part itself.
    """

    rank: int
    rotated: int
    plain: int
    value_dim: int
    query_rank: int = 0
    """Width between the two projections of queries; 0: they have one."""
    is_interleaved: bool = True
    """True if the rotated pairs are (0, 1), (2, 3), …; else they are (i, i + rotated / 2)."""
    query_growth: float = 0.0
    """Queries at position p are multiplied by ``1 + growth * log(1 + p // growth_from)`` (Mistral 4); 0: by 1."""
    growth_from: int = 1
    keys_apart: bool = False
    """True if keys and values have projections of their own in the file, that of keys transposed (GGUF)."""

    @property
    def width(self) -> int:
        """Components of a token in the cache."""
        return self.rank + self.rotated

    @property
    def head_dim(self) -> int:
        """Components of a head's query, and of its key."""
        return self.plain + self.rotated
