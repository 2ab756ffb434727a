"""Follow a JSON value while its text arrives: say where it ends, and that all of it so far is valid."""

import math
import re
from typing import Literal

MAX_DEPTH = 64
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER_CHARS = re.compile(r"[-+0-9.eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_NUMBER_BEGIN = re.compile(r"-?(?:0|[1-9]\d*|)(?:(?<=\d)\.\d*)?(?:(?<=\d)[eE][-+]?\d*)?")
_MAX_NUMBER_CHARS = 400
_WORDS = {"t": "true", "f": "false", "n": "null"}

_Place = Literal["value", "first item", "first key", "key", "colon", "after"]


class BrokenJson(ValueError):
    """The text is not the beginning of a JSON value."""


class JsonScanner:
    """One value. It may arrive in any number of parts; each character is looked at once.

    Example: of `{"a": [1, 2]} and more` it consumes the first 13 characters.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._stack: list[str] = []
        """The brackets that are open, as the ones that close them."""
        self._place: _Place = "value"
        self._in_string = False
        self._is_key = False
        self._escape = ""
        """What has come of an escape sequence, without its backslash; a space right after it."""
        self._rest_of_word = ""
        self._number = ""

    def scan(self, text: str, at: int = 0) -> int:
        """Return the end of what belongs to the value. BrokenJson where it is not valid."""
        while at < len(text) and not self.is_complete:
            if self._in_string:
                at = self._scan_string(text, at)
            elif self._rest_of_word:
                at = self._scan_word(text, at)
            elif self._number:
                at = self._scan_number(text, at)
            else:
                at = self._scan_mark(text, at)
        return at

    def _scan_string(self, text: str, at: int) -> int:
        if self._escape:
            return self._scan_escape(text[at], at)
        plain = _PLAIN.match(text, at)
        at = plain.end() if plain else at
        if at == len(text):
            return at
        if text[at] == '"':
            self._in_string = False
            self._place = "colon" if self._is_key else "after"
            self._end_value(is_value=not self._is_key)
        elif text[at] == "\\":
            self._escape = " "
        else:
            raise BrokenJson("a control character is in a string")
        return at + 1

    def _scan_escape(self, character: str, at: int) -> int:
        if self._escape == " ":
            if character not in '"\\/bfnrtu':
                raise BrokenJson("there is no such escape sequence")
            self._escape = "u" if character == "u" else ""
        elif character in "0123456789abcdefABCDEF":
            self._escape = "" if len(self._escape) == 4 else self._escape + character
        else:
            raise BrokenJson("an escape sequence is not hexadecimal")
        return at + 1

    def _scan_word(self, text: str, at: int) -> int:
        if text[at] != self._rest_of_word[0]:
            raise BrokenJson("there is no such word")
        self._rest_of_word = self._rest_of_word[1:]
        if not self._rest_of_word:
            self._end_value()
        return at + 1

    def _scan_number(self, text: str, at: int) -> int:
        more = _NUMBER_CHARS.match(text, at)
        end = more.end() if more else at
        self._number += text[at:end]
        if len(self._number) > _MAX_NUMBER_CHARS or not _NUMBER_BEGIN.fullmatch(self._number):
            raise BrokenJson("a number is not valid")
        if end < len(text):
            if not _NUMBER.fullmatch(self._number) or not math.isfinite(float(self._number)):
                raise BrokenJson("a number is not valid")
            self._number = ""
            self._end_value()
        return end

    def _scan_mark(self, text: str, at: int) -> int:
        space = _SPACE.match(text, at)
        at = space.end() if space else at
        if at == len(text):
            return at
        mark, place = text[at], self._place
        if place in ("value", "first item") and self._begins_value(mark):
            return at + 1
        if mark in "]}" and place in ("first item", "first key", "after") and self._stack and self._stack[-1] == mark:
            self._stack.pop()
            self._end_value()
        elif mark == '"' and place in ("first key", "key"):
            self._in_string = self._is_key = True
        elif mark == ":" and place == "colon":
            self._place = "value"
        elif mark == "," and place == "after":
            self._place = "key" if self._stack[-1] == "}" else "value"
        else:
            raise BrokenJson("a mark is at the wrong place")
        return at + 1

    def _begins_value(self, mark: str) -> bool:
        if mark in "{[":
            if len(self._stack) == MAX_DEPTH:
                raise BrokenJson("the value is nested too deeply")
            self._stack.append("}" if mark == "{" else "]")
            self._place = "first key" if mark == "{" else "first item"
        elif mark == '"':
            self._in_string, self._is_key = True, False
        elif mark in _WORDS:
            self._rest_of_word = _WORDS[mark][1:]
        elif mark in "-0123456789":
            self._number = mark
        else:
            return False
        return True

    def _end_value(self, is_value: bool = True) -> None:
        if is_value:
            self._place = "after"
            self.is_complete = not self._stack
