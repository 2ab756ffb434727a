"""Turn tokens into text one by one: whole characters only, and nothing past a stop string."""

import codecs
import re
from collections.abc import Callable, Sequence

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_table() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte (GPT-2's bytes_to_unicode, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_LEVEL = byte_level_table()


def byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a byte-level token; characters outside the alphabet stand for themselves."""
    try:
        return bytes([_BYTE_LEVEL[character] for character in piece])
    except KeyError:
        return piece.encode()


def sentence_piece_bytes(piece: str) -> bytes:
    """Return the bytes of a SentencePiece token: ``▁`` is a space, ``<0x0A>`` a byte."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


class StopSearch:
    """Pass text through up to the first stop string, holding back any text that may be the beginning of one.

    Of several stop strings the one that is complete first counts, however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that has ended the text."""

    def push(self, text: str) -> str:
        """Return the text that is safe to show; nothing more after ``found``."""
        if not self._stops or self.found is not None:
            return text if self.found is None else ""
        text = self._held + text
        match = self._first_complete(text)
        if match is not None:
            start, end = match
            self.found, self._held = text[start:end], ""
            return text[:start]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """Return the text that was held back: nothing follows, so it is not the beginning of a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, text: str) -> tuple[int, int] | None:
        """Return where the stop string begins and ends that ends first, of those the longest."""
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not ends:
            return None
        end, start = min(ends)
        return start, end

    def _possible_start(self, text: str) -> int:
        longest = max(map(len, self._stops)) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)


class Detokenizer:
    """Text of one choice. Each token costs its own bytes only, however long the text already is."""

    def __init__(self, bytes_of: Callable[[int], bytes], stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        """``bytes_of`` returns a token's bytes, none for a token that is not shown. Stop strings are looked for in the
        text after the first ``min_tokens`` tokens."""
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._search = StopSearch(stops)
        self._exempt = min_tokens

    @property
    def stopped(self) -> bool:
        return self._search.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the text."""
        return self._search.found

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        text = self._utf8.decode(self._bytes_of(token_id))
        if self._exempt > 0:
            self._exempt -= 1
            return text
        return self._search.push(text) if text else ""

    def flush(self) -> str:
        """Return the text that was held back; bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        return self._search.push(self._utf8.decode(b"", final=True)) + self._search.flush()
