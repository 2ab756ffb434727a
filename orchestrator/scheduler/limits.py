"""The limits of the scheduler, and the check of sequences that can never run within them."""

from dataclasses import dataclass

from mgpu.orchestrator.placement.options import check_batch_tokens
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.protocol.internal.admission_rule import AdmissionRule
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.model.attention_facts import Sight
from mgpu.protocol.model.layout import StepLimits


class RequestRefused(ValueError):
    """The request can never run on this server; the text tells the client why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(StepLimits):
    """What the scheduler may use: in one step, and in all."""

    num_blocks: int
    num_pages: int = 0
    """Blocks' worth of keys and values in the pool of window layers; 0: they have none of their own."""
    sight: Sight = (None, False)
    """Of window layers."""
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
    def admission(self) -> AdmissionRule:
        """The rule for a sequence: it may have a token more than the pool holds, as the last one is never computed."""
        return AdmissionRule(min(self.max_seq_len, self.kv_tokens + 1), self.vocab_size)


def checked_sequence(submit: Submit, arrival: int, limits: Limits) -> Sequence:
    """Turn a submission into a sequence. RequestRefused when it can never run."""
    if len(submit.token_ids) % 4:
        raise RequestRefused(f"a prompt of {len(submit.token_ids)} bytes is not a list of int32 token ids")
    prompt_len = len(submit.token_ids) // 4 - submit.num_emitted
    seq = Sequence.from_submit(submit, arrival, prompt_len + submit.max_tokens)
    problem = limits.admission.problem_of(seq.tokens, submit.max_tokens - submit.num_emitted)
    if problem == "empty prompt":
        raise RequestRefused("a prompt of 0 bytes is not a list of int32 token ids")
    if problem == "unknown token":
        raise RequestRefused(f"token ids must be between 0 and {limits.vocab_size - 1}")
    if problem == "no new token":
        raise RequestRefused(f"max_tokens is {submit.max_tokens}; it must be at least 1")
    if problem == "too long":
        raise RequestRefused(_too_long(prompt_len, submit.max_tokens, limits))
    return seq


def _too_long(prompt_len: int, max_tokens: int, limits: Limits) -> str:
    asked = f"prompt of {prompt_len} tokens + max_tokens {max_tokens} = {prompt_len + max_tokens}"
    longest, room = limits.admission.longest, limits.admission.room_after(prompt_len)
    advice = f"ask for at most {room} tokens" if room > 0 else f"shorten the prompt to at most {longest - 1} tokens"
    if longest == limits.max_seq_len:
        return f"{asked} exceeds the context of {limits.max_seq_len} tokens; {advice}"
    return (
        f"{asked} exceeds the KV cache of {limits.kv_tokens} tokens ({limits.num_blocks} blocks of "
        f"{limits.block_size}); {advice}, or give the server more KV memory"
    )
