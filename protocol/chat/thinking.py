"""Tell reasoning from the answer where a model marks it, as by `<think>` and `</think>`.

Reasoning is what comes first. Spaces at its ends, and those before the answer, belong to the markers.
"""

from mgpu.protocol.chat.machine import held_chars

_MAX_HELD_SPACES = 1024


class ThinkSplitter:
    """Splits one answer. `push` returns reasoning and answer, whose parts may be empty."""

    def __init__(self, begin: str, end: str, is_inside: bool) -> None:
        """``is_inside``: the prompt has ended with the marker of the beginning."""
        self._begin, self._end = begin, end
        self._buffer = ""
        self._place = "inside" if is_inside else "start"
        self._is_at_edge = True
        """No reasoning, or after it no answer, has come yet: spaces are dropped."""

    def push(self, text: str, has_ended: bool = False) -> tuple[str, str]:
        """Take the next part of the answer."""
        self._buffer += text
        if self._place == "start":
            self._look_for_begin(has_ended)
        reasoning = self._reasoning(has_ended) if self._place == "inside" else ""
        return reasoning, self._answer() if self._place in ("answer", "after") else ""

    def _look_for_begin(self, has_ended: bool) -> None:
        text = self._buffer.lstrip()
        if len(self._buffer) - len(text) > _MAX_HELD_SPACES:
            self._place = "answer"
        elif text.startswith(self._begin):
            self._place, self._buffer = "inside", text[len(self._begin) :]
        elif has_ended or not self._begin.startswith(text):
            self._place = "answer"

    def _reasoning(self, has_ended: bool) -> str:
        text = self._buffer.lstrip() if self._is_at_edge else self._buffer
        end = text.find(self._end)
        if end >= 0:
            self._place, self._buffer, self._is_at_edge = "after", text[end + len(self._end) :], True
            return text[: max(len(text[:end].rstrip()), end - _MAX_HELD_SPACES)]
        keep = 0 if has_ended else held_chars(text, (self._end,))
        shown = text[: len(text) - keep].rstrip()
        cut = max(len(shown), len(text) - keep - _MAX_HELD_SPACES)
        self._buffer = "" if has_ended else text[cut:]
        self._is_at_edge = self._is_at_edge and not cut
        return text[:cut]

    def _answer(self) -> str:
        text, self._buffer = self._buffer, ""
        if self._place == "after" and self._is_at_edge:
            text = text.lstrip()
            self._is_at_edge = not text
        return text
