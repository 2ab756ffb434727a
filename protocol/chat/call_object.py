"""A tool call that is a JSON object with a name and arguments, read while it arrives."""

import json
from collections.abc import Callable
from typing import Protocol

from mgpu.protocol.chat.json_scanner import BrokenJson, JsonScanner

SPACE = " \t\n\r"
_ARGUMENTS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id")
_MAX_HEAD_CHARS = 4096
"""Of a key, a name, or the value of another key than the arguments."""


class Calls(Protocol):
    """Takes the calls that are found."""

    def begin(self, name: str) -> None:
        """Begin a call. BrokenJson if there is no such tool."""

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that has begun."""


class CallObject:
    """Reads `{"name": "f", "arguments": {…}}`. Arguments are passed on as they come, if the name came before them."""

    def __init__(self, calls: Calls) -> None:
        self.is_complete = False
        self._calls = calls
        self._read: Callable[[str, int], int] = self._read_open
        self._scanner = JsonScanner()
        self._held: list[str] = []
        """Text of the key or value that is read."""
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None
        """Held until the name is known."""
        self._has_begun = False

    def scan(self, text: str, at: int = 0) -> int:
        """Return the end of what belongs to the call. BrokenJson where it is no call."""
        while at < len(text) and not self.is_complete:
            at = self._read(text, at)
        return at

    def _read_open(self, text: str, at: int) -> int:
        return self._read_mark(text, at, {"{": self._read_first_key})

    def _read_mark(self, text: str, at: int, then: dict[str, Callable[[str, int], int]]) -> int:
        if text[at] in SPACE:
            return at + 1
        if text[at] not in then:
            raise BrokenJson("a mark is at the wrong place")
        self._read = then[text[at]]
        return at + 1

    def _read_first_key(self, text: str, at: int) -> int:
        if text[at] == "}":
            return self._end(at)
        return self._read_key(text, at)

    def _read_key(self, text: str, at: int) -> int:
        if not self._held and text[at] in SPACE:
            return at + 1
        if not self._held and text[at] != '"':
            raise BrokenJson("a key is not a string")
        end = self._hold(text, at)
        if self._scanner.is_complete:
            self._key = json.loads(self._taken())
            is_known = self._key in ("name", *_ARGUMENTS, *_OTHER_KEYS)
            if not is_known or (self._key == "name" and self._name is not None):
                raise BrokenJson("the object is no call")
            if self._key in _ARGUMENTS and (self._arguments is not None or self._has_begun):
                raise BrokenJson("the call has arguments twice")
            self._read = self._read_colon
        return end

    def _read_colon(self, text: str, at: int) -> int:
        return self._read_mark(text, at, {":": self._read_value})

    def _read_value(self, text: str, at: int) -> int:
        if not self._held and text[at] in SPACE:
            return at + 1
        if not self._held and self._key in _ARGUMENTS and self._name is not None and text[at] == "{":
            self._begin(self._name)
            self._read = self._read_arguments
            return at
        end = self._hold(text, at)
        if self._scanner.is_complete:
            self._take_value(self._taken())
            self._read = self._read_after
        return end

    def _read_arguments(self, text: str, at: int) -> int:
        """Pass arguments on as they come."""
        end = self._scanner.scan(text, at)
        self._calls.arguments(text[at:end])
        if self._scanner.is_complete:
            self._scanner = JsonScanner()
            self._read = self._read_after
        return end

    def _read_after(self, text: str, at: int) -> int:
        if text[at] == "}":
            return self._end(at)
        return self._read_mark(text, at, {",": self._read_key})

    def _hold(self, text: str, at: int) -> int:
        end = self._scanner.scan(text, at)
        self._held.append(text[at:end])
        if self._key not in _ARGUMENTS and sum(map(len, self._held)) > _MAX_HEAD_CHARS:
            raise BrokenJson("the object is no call")
        return end

    def _taken(self) -> str:
        self._scanner, text = JsonScanner(), "".join(self._held)
        self._held.clear()
        return text

    def _take_value(self, text: str) -> None:
        if self._key == "name":
            self._name = _string(text)
        elif self._key in _ARGUMENTS:
            self._arguments = object_text(text)

    def _end(self, at: int) -> int:
        if self._name is None:
            raise BrokenJson("the call has no name")
        if not self._has_begun:
            self._begin(self._name)
            self._calls.arguments(self._arguments or "{}")
        self.is_complete = True
        return at + 1

    def _begin(self, name: str) -> None:
        self._has_begun = True
        self._calls.begin(name)


def _string(text: str) -> str:
    value = json.loads(text)
    if not isinstance(value, str):
        raise BrokenJson("the name is not a string")
    return value


def object_text(text: str) -> str:
    """Return arguments as the text of a JSON object; they may be null, or a string that holds an object."""
    value = json.loads(text)
    if value is None:
        return "{}"
    if isinstance(value, str):
        text = value.strip() or "{}"
        scanner = JsonScanner()
        if not text.startswith("{") or scanner.scan(text) != len(text) or not scanner.is_complete:
            raise BrokenJson("the arguments are no object")
        return text
    if not isinstance(value, dict):
        raise BrokenJson("the arguments are no object")
    return text
