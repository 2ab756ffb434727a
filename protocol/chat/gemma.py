"""Calls as Gemma 4 writes them: `<|tool_call>call:f{city:<|"|>Bern<|"|>,days:3}<tool_call|>`, any number of them.

Arguments are like JSON, but keys have no quotes, and strings stand between two tokens of their own. So a string may
hold anything, quotes and brackets too. Keys and strings with the quotes of JSON are taken as well: demanded calls have
them where a schema says more of a string than its length.
"""

import json
import re

from mgpu.protocol.chat.json_scanner import MAX_DEPTH, BrokenJson, JsonScanner
from mgpu.protocol.chat.machine import Found, Machine, held_chars

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_HEAD = re.compile(r"\s*call:([a-zA-Z0-9_.-]{1,64})\{")
_MAYBE_HEAD = re.compile(r"\s*(?:|c|ca|cal|call|call:[a-zA-Z0-9_.-]{0,64})")
_KEY = re.compile(r"\s*([^\s:,{}\[\]<\"]{1,256})\s*:")
_JSON_KEY = re.compile(r'("(?:[^"\\\x00-\x1f]|\\.){0,256}")\s*:')
_WORD = re.compile(r"[-+.\w]+")
_MAX_HEAD_CHARS = 512


class Gemma(Machine):
    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._stack: list[str] = []
        """The brackets that are open, as the ones that close them."""
        self._seen: list[set[str]] = []
        """The keys of each object that is open."""
        self._string = JsonScanner()

    def _outside(self) -> bool:
        return self._pass_content((BEGIN,), self._read_head)

    def _read_head(self) -> bool:
        head = _HEAD.match(self._buffer)
        if head is None:
            is_cut = _MAYBE_HEAD.fullmatch(self._buffer) and len(self._buffer) < _MAX_HEAD_CHARS
            return False if is_cut and not self._has_ended else self._break()
        try:
            self._found.begin(head[1])
        except BrokenJson:
            return self._break()
        self._found.arguments("{")
        self._take_call(head.end())
        self._stack, self._seen, self._state = ["}"], [set()], self._first_key
        return True

    # ------------------------------------------------------------------ objects and lists

    def _first_key(self) -> bool:
        return self._close("}") if self._sees("}") else self._read_key()

    def _read_key(self) -> bool:
        """Read a key and its colon. A key between the tokens of a string is taken too."""
        if not self._skips_space():
            return False
        if self._buffer.startswith(QUOTE):
            end = self._buffer.find(QUOTE, len(QUOTE))
            key, taken = self._buffer[len(QUOTE) : end], self._buffer[end + len(QUOTE) :].lstrip()
            length = len(self._buffer) - len(taken) + 1 if end >= 0 and taken.startswith(":") else 0
            is_cut = end < 0 or not taken
        elif self._buffer.startswith('"'):
            match = _JSON_KEY.match(self._buffer)
            key, length = (_text(match[1]), match.end()) if match else ("", 0)
            is_cut = re.fullmatch(r'"(?:[^"\\]|\\.)*(?:\\|"\s*)?', self._buffer) is not None
        else:
            match = _KEY.match(self._buffer)
            key, length = (match[1], match.end()) if match else ("", 0)
            is_cut = self._may_begin(QUOTE) or not re.search(r"[:,{}\[\]<\"]", self._buffer)
        if not length:
            return False if is_cut and len(self._buffer) < _MAX_HEAD_CHARS and not self._has_ended else self._break()
        if key in self._seen[-1]:
            return self._break()
        self._pass(("" if not self._seen[-1] else ", ") + json.dumps(key, ensure_ascii=False) + ": ", length)
        self._seen[-1].add(key)
        self._state = self._read_value
        return True

    def _first_item(self) -> bool:
        return self._close("]") if self._sees("]") else self._read_value()

    def _read_value(self) -> bool:
        if not self._skips_space() or self._may_begin(QUOTE):
            return False
        if self._buffer.startswith(QUOTE):
            self._pass('"', len(QUOTE))
            self._state = self._read_string
            return True
        mark = self._buffer[:1]
        if mark == '"':
            self._string, self._state = JsonScanner(), self._read_json_string
            return True
        if mark in ("{", "[") and len(self._stack) < MAX_DEPTH:
            self._pass(mark, 1)
            self._stack.append("}" if mark == "{" else "]")
            self._seen.append(set())
            self._state = self._first_key if mark == "{" else self._first_item
            return True
        return self._read_word()

    def _read_word(self) -> bool:
        """Read a number, or true, false or null."""
        word = _WORD.match(self._buffer)
        end = word.end() if word else 0
        if end == len(self._buffer) and end < _MAX_HEAD_CHARS and not self._has_ended:
            return False
        text, scanner = self._buffer[:end], JsonScanner()
        text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
        try:
            is_value = end > 0 and scanner.scan(text + " ") >= len(text) and scanner.is_complete
        except BrokenJson:
            is_value = False
        if not is_value:
            return self._break()
        self._pass(text, end)
        self._state = self._after_value
        return True

    def _read_string(self) -> bool:
        """Pass a string on as it comes."""
        end = self._buffer.find(QUOTE)
        if end < 0:
            if self._has_ended:
                return self._break()
            held = held_chars(self._buffer, (QUOTE,))
            self._pass_string(len(self._buffer) - held)
            return False
        self._pass_string(end)
        self._pass('"', len(QUOTE))
        self._state = self._after_value
        return True

    def _read_json_string(self) -> bool:
        """Pass a string of JSON on as it comes."""
        try:
            end = self._string.scan(self._buffer)
        except BrokenJson:
            return self._break()
        self._pass(self._buffer[:end], end)
        if self._string.is_complete:
            self._state = self._after_value
            return True
        return self._has_ended and self._break()

    def _after_value(self) -> bool:
        if not self._skips_space():
            return False
        if self._buffer.startswith(self._stack[-1]):
            return self._close(self._stack[-1])
        if not self._buffer.startswith(","):
            return self._break()
        is_object = self._stack[-1] == "}"
        self._pass("" if is_object else ", ", 1)
        self._state = self._read_key if is_object else self._read_value
        return True

    def _close(self, mark: str) -> bool:
        self._stack.pop()
        self._seen.pop()
        self._pass(mark, 1)
        self._state = self._after_value
        if not self._stack:
            self._found.complete()
            self._state = self._after
        return True

    def _after(self) -> bool:
        return self._skip_end(END, self._outside)

    # ------------------------------------------------------------------ parts

    def _sees(self, mark: str) -> bool:
        return self._skips_space() and self._buffer.startswith(mark)

    def _pass(self, arguments: str, length: int) -> None:
        """Take so many characters, which are ``arguments`` in JSON."""
        self._found.arguments(arguments)
        self._take_call(length)

    def _pass_string(self, length: int) -> None:
        self._pass(json.dumps(self._buffer[:length], ensure_ascii=False)[1:-1], length)


def _text(string: str) -> str:
    """Return the text of a string in JSON; empty if it is none."""
    try:
        return str(json.loads(string))
    except ValueError:
        return ""
