"""Turn bytes into decisions, so that a mutator of bytes builds structured inputs: maps, texts, files."""

import struct
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

NUMBERS = (
    0, 1, -1, 2, 3, 7, 16, 64, 255, 256, 1024, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1,
    -(2**63), 2**64 - 1, 10**18,
)  # fmt: skip
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
CODE_POINTS = (
    0x0, 0x9, 0xA, 0xD, 0x1B, 0x20, 0x7F, 0x85, 0xA0, 0xAD, 0x130, 0x149, 0x17F, 0x1C4, 0x300, 0x301, 0x344, 0x345,
    0x34F, 0x3A3, 0x5D0, 0x600, 0x640, 0x6DD, 0x958, 0xE33, 0xFB4, 0x1100, 0x1161, 0x11A8, 0x1E9E, 0x1F82, 0x200B,
    0x200D, 0x200E, 0x2028, 0x202E, 0x2060, 0x2126, 0x2581, 0x3000, 0x3099, 0x4E2D, 0xA9C1, 0xAC00, 0xD7FF, 0xE000,
    0xF900, 0xFB2C, 0xFDFA, 0xFE0F, 0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF, 0x10000, 0x1D160, 0x1D15E, 0x1F1E9, 0x1F468,
    0x1F3FD, 0x2F800, 0xE0001, 0xE0061, 0xE01EF, 0xF0000, 0x10FFFF,
)  # fmt: skip
"""Controls, marks, joiners, directions, letters that change their length, private and last ones."""
REPEATS = (2, 3, 10, 100, 1000, 20_000)
MOST_CHARS = 200_000
"""Of all texts of one input."""


class Choices:
    """Decisions that follow from bytes. When these are used up, every further one is the first possible."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._chars_left = MOST_CHARS

    @property
    def is_empty(self) -> bool:
        return self._at >= len(self._data)

    def number(self, most: int = 255) -> int:
        """Return an integer from 0 to ``most``."""
        width = max(1, (most.bit_length() + 7) // 8)
        return int.from_bytes(self.data(width), "big") % (most + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.number(len(items) - 1)]

    def data(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def rest(self) -> bytes:
        return self.data(len(self._data))

    def integer(self) -> int:
        """Return an integer: a small one, one at an edge, or a neighbour of one."""
        kind = self.number(3)
        if kind == 0:
            return self.number()
        return self.pick(NUMBERS) + (kind == 1) - (kind == 2)

    def real(self) -> float:
        if self.number(3):
            return self.pick(FLOATS)
        [value] = struct.unpack("<d", self.data(8).ljust(8, b"\0"))
        return float(value)

    def text(self, words: Sequence[str] = ("",)) -> str:
        """Return a text of a few pieces: plain, odd code points, words, repetitions."""
        parts: list[str] = []
        while not self.is_empty and len(parts) < 200 and self._chars_left > 0:
            piece = self._piece(parts[-1] if parts else "", words)
            if piece is None:
                break
            parts.append(piece[: self._chars_left])
            self._chars_left -= len(parts[-1])
        return "".join(parts)

    def _piece(self, before: str, words: Sequence[str]) -> str | None:
        kind = self.number(7)
        if kind == 0:
            return None
        if kind in (1, 2):
            return self.data(self.number(40)).decode("utf-8", "replace")
        if kind == 3:
            return chr(self.pick(CODE_POINTS))
        if kind == 4:
            return self.pick(words)
        if kind == 5:
            return before[:1000] * self.pick(REPEATS)
        if kind == 6:
            return self.pick(
                (" ", "\n", "\r\n", "\t", "  ", "'s", "123", "a", "A", "é", "中", "<", ">", "|", "{{", "}}")
            )
        code = self.number(0x10FFFF)
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"

    def value(self, depth: int = 3, words: Sequence[str] = ("",)) -> object:
        """Return a value of any kind that JSON or MessagePack can hold."""
        kind = self.number(11)
        if kind == 0:
            return None
        if kind <= 2:
            return self.integer()
        if kind == 3:
            return self.real()
        if kind <= 5:
            return self.text(words)
        if kind == 6:
            return self.pick((True, False))
        if kind == 7:
            return self.data(self.number(24))
        if kind == 8 and depth:  # few texts: many copies of a long one would be the target's own load
            return [self.pick((self.integer(), self.real(), self.pick(words), None))] * self.pick((1, 2, 16, 64, 300))
        if kind == 9 and depth:
            return self.fields(words, depth - 1)
        return [self.value(depth - 1, words) for _ in range(self.number(5))] if depth else self.pick(words)

    def fields(self, words: Sequence[str], depth: int = 3) -> dict[object, object]:
        """Return a map whose keys are mostly known words."""
        return {self.key(words): self.value(depth, words) for _ in range(self.number(8))}

    def key(self, words: Sequence[str]) -> str:
        return self.pick(words) if self.number(15) else self.text(words)

    def changed(self, whole: Mapping[str, object], words: Sequence[str]) -> dict[str, object]:
        """Return ``whole`` with a few of its entries replaced, dropped or added."""
        found = dict(whole)
        for _ in range(self.number(4)):
            name = self.key([*whole, *words])
            if self.number(7):
                found[name] = self.value(3, words)
            else:
                found.pop(name, None)
        return found
