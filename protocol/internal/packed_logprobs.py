"""Log-probabilities of a sequence's tokens as bytes: a twelfth of the objects' size, and any part can be cut out."""

import math
from collections.abc import Iterable
from struct import Struct, error

from mgpu.protocol.internal.worker_messages import TokenLogprobs


class LogprobPacking:
    """Records of one width. Workers compute in float32, so nothing is lost."""

    def __init__(self, num_top: int) -> None:
        """``num_top`` is the most candidates that a token has."""
        self._num_top = num_top
        self._record = Struct(f"<Bf{num_top}i{num_top}f")

    @property
    def width(self) -> int:
        """Bytes per token."""
        return self._record.size

    def pack(self, tokens: Iterable[TokenLogprobs]) -> bytes:
        """Pack one record per token."""
        return b"".join(map(self._pack, tokens))

    def _pack(self, token: TokenLogprobs) -> bytes:
        ids, values = token.top_ids[: self._num_top], token.top_logprobs[: self._num_top]
        padding = [0] * (self._num_top - len(ids))
        try:
            return self._record.pack(len(ids), token.chosen, *ids, *padding, *values, *padding)
        except (error, OverflowError):  # a worker's nonsense must not end the server
            return self._record.pack(0, math.nan, *([0] * (2 * self._num_top)))

    def unpack(self, data: bytes) -> list[TokenLogprobs]:
        """Give the tokens' log-probabilities back. struct.error when ``data`` is no whole number of records."""
        end = 2 + self._num_top
        return [
            TokenLogprobs(chosen, list(rest[:count]), list(rest[end - 2 : end - 2 + count]))
            for count, chosen, *rest in self._record.iter_unpack(data)
        ]
