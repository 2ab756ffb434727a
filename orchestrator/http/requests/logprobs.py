"""Log-probabilities in the forms of OpenAI's two kinds of completions."""

from collections.abc import Sequence
from typing import Any

from mgpu.protocol.client.results import TokenLogprob


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """Return the form of chat completions; None if none were asked for."""
    if logprobs is None:
        return None
    content = [
        {**_entry(each.text, each.logprob), "top_logprobs": [_entry(text, value) for _, value, text in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def text_logprobs(logprobs: Sequence[TokenLogprob] | None, offset: int) -> dict[str, Any] | None:
    """Return the form of text completions, for tokens whose first character is at ``offset`` of the answer."""
    if logprobs is None:
        return None
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{text: value for _, value, text in each.top} for each in logprobs],
        "text_offset": offsets,
    }
