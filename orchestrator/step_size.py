"""How many tokens one step may have: the default of each kind of device, and what cannot work."""

from typing import Literal

from mgpu.orchestrator.errors import UserError

_DEFAULT_TOKENS = {"cuda": 2048, "cpu": 512}


class LimitsError(UserError):
    """Limits that no scheduler can work with."""


def batch_tokens(asked: int, max_rows: int, device_kind: Literal["cpu", "cuda"]) -> int:
    """Give the most tokens of a step: as asked, or for 0 what suits the device and leaves room to prefill."""
    return asked or max(_DEFAULT_TOKENS[device_kind], 2 * max_rows)


def check_batch_tokens(max_batch_tokens: int, max_rows: int) -> None:
    """LimitsError when a step of decoding requests alone could fill the budget."""
    if max_batch_tokens <= max_rows:
        raise LimitsError(
            f"max_batch_tokens {max_batch_tokens} must exceed max_rows {max_rows}: a step decodes up to "
            f"{max_rows} requests and prefills with the rest; lower --max-rows or raise --max-batch-tokens"
        )
