"""The rules that scale rotary frequencies, as lists of divisors: plain numbers in, plain numbers out.

Without scaling, frequency i of K / 2 is ``theta ** (-2 i / K)``. Each rule divides it by a number of its own, so a
worker needs to know no rule. ``size`` is K: the components of a head that are rotated.
"""

import math


def linear_divisors(factor: float, size: int) -> tuple[float, ...]:
    """Return the divisors that stretch all positions alike."""
    return (factor,) * (size // 2)


def llama3_divisors(
    factor: float, low: float, high: float, original: int, theta: float, size: int
) -> tuple[float, ...]:
    """Return Llama 3.1's divisors: slow frequencies by ``factor``, fast ones by 1, a blend of both in between.

    ``low`` and ``high`` bound the blend, in turns over the ``original`` context.
    """
    divisors = []
    for index in range(size // 2):
        turns = original / (2 * math.pi * theta ** (2 * index / size))
        share_kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / ((1 - share_kept) / factor + share_kept))
    return tuple(divisors)


def yarn_divisors(
    factor: float, original: int, theta: float, size: int, beta_fast: float, beta_slow: float, truncate: bool = True
) -> tuple[float, ...]:
    """Return YaRN's divisors (https://arxiv.org/abs/2309.00071, section 3.2).

    Frequencies that turn more than ``beta_fast`` times over the ``original`` context stay, those that turn less than
    ``beta_slow`` times are divided by ``factor``, and in between the share grows with the index. ``truncate`` widens
    the range in between to whole indexes.
    """

    def index_of(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    divisors = []
    for index in range(size // 2):
        share_scaled = min(1.0, max(0.0, (index - first) / (last - first)))
        divisors.append(1 / (share_scaled / factor + (1 - share_scaled)))
    return tuple(divisors)


def yarn_attention(factor: float, multiplier: float = 1.0) -> float:
    """Return YaRN's factor on cos and sin, which sharpens attention over a longer context."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def longrope_attention(factor: float, original: int) -> float:
    """Return LongRoPE's factor on cos and sin."""
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
