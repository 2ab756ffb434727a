"""Log-probabilities as bytes."""

import math
import struct

import pytest

from mgpu.protocol.internal.packed_logprobs import LogprobPacking
from mgpu.protocol.internal.worker_messages import TokenLogprobs


def single(value: float) -> float:
    """Round as a worker does."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_packing_keeps_everything_that_workers_say(num_top: int) -> None:
    packing = LogprobPacking(num_top)
    tokens = [
        TokenLogprobs(single(-0.1 * at), list(range(at, at + count)), [single(-1 / 3 - at)] * count)
        for at, count in enumerate([num_top, num_top, num_top // 2])
    ]
    tokens.append(TokenLogprobs(-math.inf, [], []))
    data = packing.pack(tokens)
    assert len(data) == len(tokens) * packing.width
    assert packing.unpack(data) == tokens
    assert packing.unpack(data[packing.width : 3 * packing.width]) == tokens[1:3]


def test_a_token_with_twenty_candidates_has_165_bytes() -> None:
    assert LogprobPacking(20).width == 165


def test_nonsense_of_a_worker_becomes_an_unknown_value() -> None:
    packing = LogprobPacking(1)
    nonsense = [TokenLogprobs(1e300, [1], [0.0]), TokenLogprobs(0.0, [1 << 40], [0.0]), TokenLogprobs(0.0, [1, 2], [])]
    unpacked = packing.unpack(packing.pack(nonsense))
    assert all(math.isnan(token.chosen) and not token.top_ids for token in unpacked)
