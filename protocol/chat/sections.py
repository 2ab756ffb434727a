"""Calls between markers of their own, in a section that has markers too, as DeepSeek and Kimi K2 write them.

DeepSeek V3 and R1 have `function`, a separator, the name and a block of JSON in each call, V3.1 name, separator and
JSON. Kimi K2 writes an id such as `functions.get_weather:0`, which holds the name; its template names earlier calls by
their ids alone, so such an id is the call's.
"""

import re

from mgpu.protocol.chat.json_scanner import BrokenJson, JsonScanner
from mgpu.protocol.chat.machine import Found, Machine, new_call_id

FENCE = "```"
_MOST_HEAD_CHARS = 256
_KIMI_ID = re.compile(r"functions\.([a-zA-Z0-9_-]{1,64}):\d{1,6}")
_FENCED = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})\s*```(?:json)?\s*(?=\{)")


class Sections(Machine):
    """Reads a head up to ``separator``, then JSON. ``_read_name`` says what the head means."""

    section, call, separator, call_end, section_end = "", "", "", "", ""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._arguments = JsonScanner()

    @classmethod
    def markers(cls) -> tuple[str, ...]:
        return cls.section, cls.call, cls.separator, cls.call_end, cls.section_end

    def _outside(self) -> bool:
        return self._pass_content((self.section, self.call), self._after_marker)

    def _after_marker(self) -> bool:
        """Go on with the head of a call; after the marker of a section its own marker must follow."""
        if self._found.marker == self.call:
            self._state = self._read_head
            return True
        if not self._skips_space() or self._may_begin(self.call):
            return False
        if not self._buffer.startswith(self.call):
            return self._break()
        self._take_call(len(self.call))
        self._state = self._read_head
        return True

    def _read_head(self) -> bool:
        at = self._buffer.find(self.separator)
        if at < 0:
            may_come = len(self._buffer) < _MOST_HEAD_CHARS and not self._has_ended
            return False if may_come else self._break()
        return self._read_name(self._buffer[:at].strip(), at + len(self.separator))

    def _read_name(self, head: str, length: int) -> bool:
        raise NotImplementedError

    def _begin_call(self, name: str, length: int, call_id: str = "") -> bool:
        """Announce a call whose arguments follow after so many characters."""
        try:
            self._found.begin(name, call_id)
        except BrokenJson:
            return self._break()
        self._take_call(length)
        self._arguments, self._state = JsonScanner(), self._begin_arguments
        return True

    def _begin_arguments(self) -> bool:
        if not self._skips_space():
            return False
        if not self._buffer.startswith("{"):
            return self._break()
        self._state = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        return self._follow(self._arguments, self._after_arguments, are_arguments=True)

    def _after_arguments(self) -> bool:
        return self._skip_end(FENCE, self._after_fence)

    def _after_fence(self) -> bool:
        return self._skip_end(self.call_end, self._after_call)

    def _after_call(self) -> bool:
        return self._skip_end(self.section_end, self._outside)


class DeepSeek(Sections):
    section, section_end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call, separator, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

    def _read_name(self, head: str, length: int) -> bool:
        rest = self._buffer[length:]
        if rest.lstrip().startswith("{"):
            return self._begin_call(head, length)
        if fenced := _FENCED.match(rest):
            return self._begin_call(fenced[1], length + fenced.end())
        may_come = len(rest) < _MOST_HEAD_CHARS and not self._has_ended
        return False if may_come else self._break()


class Kimi(Sections):
    section, section_end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call, separator, call_end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._ids: set[str] = set()

    def _read_name(self, head: str, length: int) -> bool:
        named = _KIMI_ID.fullmatch(head)
        if named is None:
            return self._break()
        call_id = head if head not in self._ids else f"{head}-{new_call_id()}"
        self._ids.add(head)
        return self._begin_call(named[1], length, call_id)
