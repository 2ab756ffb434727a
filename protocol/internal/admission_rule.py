"""What makes a request runnable: one rule, which the gateway asks on arrival and the engine before it queues.

Each has its own words for a problem: the gateway knows what the client wrote, the engine its KV blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Problem = Literal["empty prompt", "unknown token", "no new token", "too long"]


@dataclass(frozen=True, slots=True)
class AdmissionRule:
    """The model's vocabulary, and how much one request may need."""

    longest: int
    """Most tokens, prompt and answer together."""
    vocab_size: int

    def problem_of(self, prompt_ids: Sequence[int], max_tokens: int) -> Problem | None:
        """Return the first reason why a request can never run; None if it can."""
        if not prompt_ids:
            return "empty prompt"
        if self.unknown_id(prompt_ids) is not None:
            return "unknown token"
        if max_tokens < 1:
            return "no new token"
        return "too long" if max_tokens > self.room_after(len(prompt_ids)) else None

    def unknown_id(self, token_ids: Sequence[int]) -> int | None:
        """Return a token id outside the vocabulary; None if all are in it."""
        lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
        return lowest if lowest < 0 else highest if highest >= self.vocab_size else None

    def room_after(self, prompt_tokens: int) -> int:
        """Return the most tokens that may follow a prompt; below 1 if the prompt alone is too long."""
        return self.longest - prompt_tokens
