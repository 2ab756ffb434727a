"""Refuse requests that can never run, on arrival and with the numbers."""

from dataclasses import dataclass

from mgpu.orchestrator.placement.options import check_batch_tokens
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.protocol.internal.gateway_messages import Submit


class RequestRefused(ValueError):
    """The request can never run on this server; the text tells the client why and what would."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may use."""

    num_blocks: int
    block_size: int
    max_rows: int
    max_batch_tokens: int
    max_seq_len: int
    num_stages: int = 1
    vocab_size: int = 1 << 31
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        check_batch_tokens(self.max_batch_tokens, self.max_rows)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.num_blocks * self.block_size

    @property
    def longest_request(self) -> int:
        """Most tokens of a request: the last one is only emitted, its keys and values are never needed."""
        return min(self.max_seq_len, self.kv_tokens + 1)


def checked_sequence(submit: Submit, arrival: int, limits: Limits) -> Sequence:
    """Turn a submission into a sequence. RequestRefused when it can never run."""
    if not submit.token_ids or len(submit.token_ids) % 4:
        raise RequestRefused(f"a prompt of {len(submit.token_ids)} bytes is not a list of int32 token ids")
    if submit.max_tokens < 1:
        raise RequestRefused(f"max_tokens is {submit.max_tokens}; it must be at least 1")
    prompt_len = len(submit.token_ids) // 4
    length = prompt_len + submit.max_tokens
    if length > limits.longest_request:
        raise RequestRefused(_too_long(prompt_len, submit.max_tokens, limits))
    seq = Sequence.from_submit(submit, arrival, length)
    if min(seq.tokens) < 0 or max(seq.tokens) >= limits.vocab_size:
        raise RequestRefused(f"token ids must be between 0 and {limits.vocab_size - 1}")
    return seq


def _too_long(prompt_len: int, max_tokens: int, limits: Limits) -> str:
    asked = f"prompt of {prompt_len} tokens + max_tokens {max_tokens} = {prompt_len + max_tokens}"
    longest = limits.longest_request
    room = longest - prompt_len
    advice = f"ask for at most {room} tokens" if room > 0 else f"shorten the prompt to at most {longest - 1} tokens"
    if longest == limits.max_seq_len:
        return f"{asked} exceeds the context of {limits.max_seq_len} tokens; {advice}"
    return (
        f"{asked} exceeds the KV cache of {limits.kv_tokens} tokens ({limits.num_blocks} blocks of "
        f"{limits.block_size}); {advice}, or give the server more KV memory"
    )
