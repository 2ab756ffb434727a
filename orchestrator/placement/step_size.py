"""How many tokens one step may have: the default of each kind of device, and what cannot work."""

from typing import Literal

from mgpu.orchestrator.errors import UserError

_CPU_TOKENS = 512
_GPU_TOKENS = 2048
_LARGE_GPU_TOKENS = 8192
_LARGE_GPU = 40 << 30
"""Bytes from which a GPU has room for the activations of a long step, a few GiB. Prompts of many requests then come
through 3 to 5 % faster; decoding waits longer for them."""


class LimitsError(UserError):
    """Limits that no scheduler can work with."""


def batch_tokens(asked: int, max_rows: int, device_kind: Literal["cpu", "cuda"], device_bytes: int = 0) -> int:
    """Give the most tokens of a step: as asked, or for 0 what suits the device and leaves room to prefill.

    ``device_bytes``: memory of the smallest GPU.
    """
    on_gpu = _LARGE_GPU_TOKENS if device_bytes >= _LARGE_GPU else _GPU_TOKENS
    return asked or max(on_gpu if device_kind == "cuda" else _CPU_TOKENS, 2 * max_rows)


def check_batch_tokens(max_batch_tokens: int, max_rows: int) -> None:
    """LimitsError when a step of decoding requests alone could fill the budget."""
    if max_batch_tokens <= max_rows:
        raise LimitsError(
            f"max_batch_tokens {max_batch_tokens} must exceed max_rows {max_rows}: a step decodes up to "
            f"{max_rows} requests and prefills with the rest; lower --max-rows or raise --max-batch-tokens"
        )
