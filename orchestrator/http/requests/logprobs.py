"""Log-probabilities in the forms of OpenAI's completions and responses."""

from collections.abc import Sequence
from typing import Any

from mgpu.protocol.client.requests.results import Piece, TokenLogprob


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """Return the form of chat completions; None if none were asked for."""
    if logprobs is None:
        return None
    return {"content": _entries(logprobs), "refusal": None}


def _entries(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {**_entry(each.text, each.logprob), "top_logprobs": [_entry(text, value) for _, value, text in each.top]}
        for each in logprobs
    ]


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


class MessageLogprobs:
    """Finds the tokens of an answer that are text of its message, not reasoning or calls.

    Tokens are held until a piece has their text: it may lag behind, and text that begins like a call may be none. The
    token that ends the answer has no text and is left out. After reasoning or a call the message begins with as many
    tokens as its text needs, so that markers stay out. Example: of `</think>`, a line break and `Hi` the text `Hi`
    needs one.
    """

    def __init__(self) -> None:
        self._held: list[TokenLogprob] = []
        self._follows_other = False
        """What came last was no text of a message."""

    def of(self, piece: Piece) -> list[dict[str, Any]]:
        """Return those of the piece's text, in the form of responses."""
        self._held += piece.logprobs or ()
        self._follows_other |= bool(piece.reasoning or piece.tool_calls)
        if not piece.text:
            if piece.reasoning:
                self._held = []
            return []
        found = _last(self._held, len(piece.text)) if self._follows_other else self._held
        self._held, self._follows_other = [], bool(piece.tool_calls) and not piece.tool_calls[-1].is_broken
        return _entries(found)


def _last(logprobs: list[TokenLogprob], length: int) -> list[TokenLogprob]:
    """Return as many of the last tokens as have ``length`` characters."""
    start = len(logprobs)
    while start and length > 0:
        start -= 1
        length -= len(logprobs[start].text)
    return logprobs[start:]
