"""Pack the log-probabilities of tokens into bytes: a twelfth of the objects' size, and easy to slice."""

import math
from collections.abc import Iterable
from struct import Struct, error

from mgpu.protocol.internal.worker_messages import TokenLogprobs


class LogprobPacking:
    """Records of one width, in float32, in which workers compute."""

    def __init__(self, num_top: int) -> None:
        """``num_top`` is the largest number of candidates of a token."""
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
        except (error, OverflowError):  # wrong numbers from a worker must not end the server
            return self._record.pack(0, math.nan, *([0] * (2 * self._num_top)))

    def unpack(self, data: bytes) -> list[TokenLogprobs]:
        """Return the log-probabilities of each token. struct.error if ``data`` is not a whole number of records."""
        end = 2 + self._num_top
        return [
            TokenLogprobs(chosen, list(rest[:count]), list(rest[end - 2 : end - 2 + count]))
            for count, chosen, *rest in self._record.iter_unpack(data)
        ]
