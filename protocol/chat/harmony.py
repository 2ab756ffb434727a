"""The channels of gpt-oss: `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`.

The prompt ends with `<|start|>assistant`. The channel `analysis` is reasoning; a message to a tool, which its header
names (`to=functions.f`), is a call; all other messages are content.
"""

import re
from collections.abc import Callable

from mgpu.protocol.chat.json_scanner import JsonScanner
from mgpu.protocol.chat.machine import Found, Machine, first_of, held_chars

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
_MAX_HEADER_CHARS = 512
_RECIPIENT = re.compile(r"to=functions\.([a-zA-Z0-9_-]{1,64})(?![\w.-])")
_ANY_RECIPIENT = re.compile(r"(?:^|\s)to=")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_HEADERS = (CHANNEL, START, MESSAGE, " to=", "to=")


class Harmony(Machine):
    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._state = self._header_or_text
        self._arguments = JsonScanner()
        self._name = ""

    def _outside(self) -> bool:
        return self._read_content()

    def _header_or_text(self) -> bool:
        """Look whether the answer begins with a header; a model may write plain text instead."""
        if any(map(self._may_begin, _HEADERS)):
            return False
        self._state = self._read_header if self._buffer.startswith(_HEADERS) else self._read_content
        return bool(self._buffer)

    def _read_header(self) -> bool:
        end = self._buffer.find(MESSAGE, 0, _MAX_HEADER_CHARS)
        if end < 0 and (self._has_ended or len(self._buffer) >= _MAX_HEADER_CHARS):
            self._state = self._plain  # never a message: shown as it is
            return True
        if end < 0:
            return False
        header = self._buffer[:end]
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient and recipient[1] in self._found.tools:
            self._name, self._arguments = recipient[1], JsonScanner()
            self._take_call(end + len(MESSAGE))
            self._state = self._begin_arguments
            return True
        if _ANY_RECIPIENT.search(_CHANNEL.sub(" ", header)):
            self._state = self._plain  # a tool that was not offered
            return True
        self._taken(end + len(MESSAGE))
        self._state = self._read_reasoning if channel and channel[1] == "analysis" else self._read_content
        return True

    def _plain(self) -> bool:
        """Show a header that leads to no message for this server, as content."""
        self._found.content(self._taken(1))
        self._state = self._read_content
        return True

    def _read_content(self) -> bool:
        return self._read_body(self._found.content)

    def _read_reasoning(self) -> bool:
        return self._read_body(self._found.reasoning)

    def _read_body(self, show: Callable[[str], None]) -> bool:
        """Show a message up to the marker of its end."""
        at, marker = first_of(self._buffer, ENDS)
        if not marker:
            held = 0 if self._has_ended else held_chars(self._buffer, ENDS)
            show(self._taken(len(self._buffer) - held))
            return False
        show(self._taken(at))
        self._end_message(marker)
        return True

    def _end_message(self, marker: str) -> None:
        if marker != START:
            self._taken(len(marker))
        self._state = self._header_or_text

    # ------------------------------------------------------------------ calls

    def _begin_arguments(self) -> bool:
        if not self._skips_space():
            return False
        if not self._buffer.startswith("{"):
            return self._break()
        self._found.begin(self._name)
        self._state = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        return self._follow(self._arguments, self._after_call, are_arguments=True)

    def _after_call(self) -> bool:
        """Skip the marker of the end; what comes before it becomes content."""
        if not self._skips_space(of_call=False) or any(map(self._may_begin, ENDS)):
            return False
        at, marker = first_of(self._buffer, ENDS)
        if at == 0 and marker:
            self._end_message(marker)
            return True
        self._state = self._read_content
        return bool(self._buffer)
